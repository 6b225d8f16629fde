"""Write docs/api.md: the public names of the plugin's packages, described by their docstrings.

Run it as ``python docs/make_api.py`` after a change of a public name, signature or docstring.
"""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("api.md")
PACKAGES = ["retinanet_ext"] + [
    f"retinanet_ext.{name}"
    for name in ("losses", "sampling", "modeling", "data", "engine", "evaluation")
]

INTRODUCTION = """\
# API

<!-- Made from the docstrings by `python docs/make_api.py`. -->

What each package exports; the tests run the examples. Shapes: N images, R anchors over all levels,
A anchors per cell, K classes, M boxes. Boxes are XYXY in input pixels unless a docstring says
otherwise. Labels: -1 ignore, 0..K-1 class, K background.
"""


def make_page() -> str:
    """Return the text of docs/api.md."""
    parts = [INTRODUCTION]
    for package in PACKAGES:
        module = import_module(package)
        parts.append(f"## {package}\n\n{to_markdown(inspect.getdoc(module) or '')}\n")
        parts += [describe(name, getattr(module, name)) for name in sorted(module.__all__)]
    return "\n".join(parts)


def describe(name: str, thing: Any) -> str:
    """Return the section of a class, with its public methods, of a function or of a constant."""
    text = f"### {name}\n\n"
    if not (inspect.isclass(thing) or inspect.isfunction(thing)):
        return text + f"`{thing!r}`\n" if isinstance(thing, int) else text + entry("", type(thing))
    text += entry(name, thing)
    for key, member in vars(thing).items() if inspect.isclass(thing) else ():
        method = getattr(member, "__func__", member)
        if not inspect.isfunction(method) or not method.__doc__:
            continue
        if key == "__init__":
            text += f"\n{to_markdown(method.__doc__)}\n"
        elif key == "__call__":
            text += "\n" + entry(f"{name}(...)", method)
        elif not key.startswith("_"):
            text += "\n" + entry(f"{name}.{key}", method)
    return text


def entry(name: str, thing: Any) -> str:
    """Return a name with its signature, without annotations and ``self``, and its docstring."""
    text = to_markdown(thing.__doc__ or "") + "\n"
    if not name:
        return text
    found = inspect.signature(thing)
    parameters = [
        p.replace(annotation=p.empty) for p in found.parameters.values() if p.name != "self"
    ]
    shown = found.replace(parameters=parameters, return_annotation=found.empty)
    return f"`{name}{shown}`\n\n{text}"


def to_markdown(docstring: str) -> str:
    """Return a docstring as Markdown: sections as lists, the example as a code block."""
    text = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", inspect.cleandoc(docstring))
    text = text.replace("``", "`")
    head, *sections = re.split(
        r"^(Args|Attributes|Returns|Raises|Example):\n", text, flags=re.MULTILINE
    )
    parts = [head.strip()]
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        body = inspect.cleandoc("\n" + body)
        if title == "Example":
            parts.append(f"```python\n{body}\n```")
            continue
        items = [body] if title == "Returns" else re.split(r"\n(?=\S)", body)
        named = [
            item if title == "Returns" else re.sub(r"^(.+?): ", r"`\1`: ", item) for item in items
        ]
        parts.append(f"{title}:\n\n" + "\n".join("- " + " ".join(item.split()) for item in named))
    return "\n\n".join(part for part in parts if part)


if __name__ == "__main__":
    PAGE.write_text(make_page(), encoding="utf-8")
    print(f"Wrote {PAGE}")
