"""Write docs/api.md: the public names of the plugin's packages, from their docstrings.

Run it as ``python docs/make_api.py`` after a change of a public name, signature or docstring.
"""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("api.md")
PACKAGES = ("", ".losses", ".sampling", ".modeling", ".data", ".engine", ".evaluation")
SECTIONS = r"^(Args|Attributes|Returns|Raises|Example):\n"

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
        module = import_module(f"retinanet_ext{package}")
        parts.append(f"## retinanet_ext{package}\n\n{to_markdown(module.__doc__)}\n")
        for name in sorted(module.__all__):
            thing = getattr(module, name)
            parts.append(f"### {name}\n\n{describe(name, thing)}")
    return "\n".join(parts)


def describe(name: str, thing: Any) -> str:
    """Return the text of a class with its public methods, of a function or of a constant."""
    if not (inspect.isclass(thing) or inspect.isfunction(thing)):
        return f"`{thing!r}`\n" if isinstance(thing, int) else to_markdown(thing.__doc__) + "\n"
    text = f"`{name}{signature(thing)}`\n\n{to_markdown(thing.__doc__)}\n"
    for key, member in vars(thing).items() if inspect.isclass(thing) else ():
        method = getattr(member, "__func__", member)
        if not inspect.isfunction(method) or not method.__doc__:
            continue
        if key == "__init__":
            text += f"\n{to_markdown(method.__doc__)}\n"
        elif key == "__call__" or not key.startswith("_"):
            shown = f"{name}(...)" if key == "__call__" else f"{name}.{key}"
            text += f"\n`{shown}{signature(method)}`\n\n{to_markdown(method.__doc__)}\n"
    return text


def signature(thing: Any) -> str:
    """Return a signature without annotations, ``self`` and ``cls``."""
    found = inspect.signature(thing)
    parameters = [p.replace(annotation=p.empty) for p in found.parameters.values()]
    kept = [p for p in parameters if p.name not in ("self", "cls")]
    return str(found.replace(parameters=kept, return_annotation=found.empty))


def to_markdown(docstring: str | None) -> str:
    """Return a docstring as Markdown: sections as lists, the example as a code block."""
    text = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", inspect.cleandoc(docstring or ""))
    head, *sections = re.split(SECTIONS, text.replace("``", "`"), flags=re.MULTILINE)
    parts = [head.strip()]
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        body = inspect.cleandoc("\n" + body)
        if title == "Example":
            parts.append(f"```python\n{body}\n```")
            continue
        items = [body] if title == "Returns" else re.split(r"\n(?=\S)", body)
        lines = ["- " + " ".join(item.split()) for item in items]
        if title != "Returns":
            lines = [re.sub(r"^- (.+?): ", r"- `\1`: ", line) for line in lines]
        parts.append(f"{title}:\n\n" + "\n".join(lines))
    return "\n\n".join(part for part in parts if part)


if __name__ == "__main__":
    PAGE.write_text(make_page(), encoding="utf-8")
    print(f"Wrote {PAGE}")
