"""Write docs/keys.md: the plugin's config keys, described by the comments in config.py.

Run it as ``python docs/make_keys.py`` after a change of a key, a comment, a loss, a kind of
finding or a field of the sample set.
"""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

from detectron2.config import get_cfg

from retinanet_ext import add_retinanet_ext_config
from retinanet_ext.config_keys import (
    COUNTS_ONLY_IF,
    all_keys,
    find_conditions,
    loss_parameter_keys,
    read_key,
)
from retinanet_ext.data.findings import KINDS
from retinanet_ext.data.sample_set import SampleSet
from retinanet_ext.losses import LOSSES

PAGE = Path(__file__).with_name("keys.md")

SECTIONS = {
    "MODEL.RETINANET.CLS_LOSS": "Classification loss",
    "MODEL.RETINANET.SELECTION": "Anchors that count in the loss",
    "MODEL.RETINANET": "Labels, normaliser and weights",
    "MODEL.ANCHOR_GENERATOR": "Anchors",
    "MODEL.TIMM": "Backbones of timm",
    "MODEL": "Network",
    "SOLVER": "Optimizer and precision",
    "INPUT": "Images",
    "DATALOADER": "Samplers and batches",
    "DATASETS.CUSTOM": "Your own data",
    "DATASETS.CHECK": "What is done about faults in the data",
    "DATASETS.SAMPLE": "The built-in sample set",
    "DATASETS": "Data sets",
    "TEST": "Evaluation",
    "": "The run",
}
"""Node -> heading. A key is listed under the longest node that it begins with."""

INTRODUCTION = """\
# Config keys

<!-- Made from the comments in retinanet_ext/config.py by `python docs/make_keys.py`. -->

The keys that the plugin adds to Detectron2's. Set them in a YAML file, or as `KEY VALUE` at the end
of a command. A key has no effect unless the keys under "counts only with" have the values given
there. A run warns, before it starts, about keys that are set and have no effect.

Detectron2's keys keep their defaults and meaning. These of them have new values:

- `MODEL.META_ARCHITECTURE RetinaNetExt` is this detector.
- `MODEL.ANCHOR_GENERATOR.NAME OctaveAnchorGenerator` generates its anchors;
  `TorchvisionAnchorGenerator` generates torchvision's.
- `MODEL.BACKBONE.NAME build_retinanet_timm_fpn_backbone` is a model of timm
  ([fine-tuning](fine_tuning.md)). `build_retinanet_resnet_fpn_p5_backbone` and
  `build_mmdet_retinanet_resnet_fpn_backbone` are those of torchvision's v1 and of MMDetection
  ([weights](weights.md)).
- `SOLVER.LR_SCHEDULER_NAME WarmupFlatCosineLR` keeps the learning rate and then lowers it to
  `SOLVER.BASE_LR_END`; see `SOLVER.FLAT_RATIO`.
- `SOLVER.CLIP_GRADIENTS.CLIP_TYPE full_model` clips the norm of all gradients together.

The focal loss reads Detectron2's `MODEL.RETINANET.FOCAL_LOSS_ALPHA` and
`MODEL.RETINANET.FOCAL_LOSS_GAMMA`. With `TEST.DETECTIONS_PER_IMAGE` above 100, AP counts as many
detections per image and is not COCO's.
"""


def make_page() -> str:
    """Return the text of docs/keys.md.

    Raises:
        ValueError: names keys without a description, or nodes whose comment is on no key
    """
    cfg, stock = get_cfg(), set(all_keys(get_cfg()))
    add_retinanet_ext_config(cfg)
    keys = [key for key in all_keys(cfg) if key not in stock]
    comments = read_comments()
    described = comments | describe_losses() | describe_kinds() | describe_sample_set()
    if missing := [key for key in keys if key not in described]:
        raise ValueError(f"no comment above {', '.join(missing)} in retinanet_ext/config.py")
    if unused := comments.keys() - {*keys, *SECTIONS}:
        raise ValueError(f"the comment above {', '.join(unused)} belongs above one of its keys")

    parts = [INTRODUCTION]
    for section, heading in SECTIONS.items():
        rows = [key for key in keys if find_section(key) == section]
        parts.append(f"## {heading}\n")
        if section in comments:
            parts.append(to_markdown(comments[section], "\n") + "\n")
        shared = [what for what in conditions(rows[0]) if all(what in conditions(r) for r in rows)]
        if shared:
            parts.append(f"These keys count only with {' and '.join(shared)}.\n")
        parts += ["| key | default | what | counts only with |", "|---|---|---|---|"]
        for key in rows:
            default = read_key(cfg, key)
            shown = "" if default == "" else f"`{default}`"
            what = to_markdown(described[key], "<br>")
            own = [condition for condition in conditions(key) if condition not in shared]
            parts.append(f"| `{key}` | {shown} | {what} | {'<br>'.join(own)} |")
        parts.append("")
    parts += ["## Detectron2's keys that count only with others\n"]
    parts += ["| key | counts only with |", "|---|---|"]
    for key in COUNTS_ONLY_IF:
        if key in stock:
            parts.append(f"| `{key}` | {'<br>'.join(conditions(key))} |")
    return "\n".join(parts) + "\n"


def read_comments() -> dict[str, str]:
    """Return the comment above each assignment to a key or node in ``add_retinanet_ext_config``."""
    source = inspect.getsource(add_retinanet_ext_config)
    lines = source.splitlines()
    comments = {}
    for statement in ast.walk(ast.parse(source)):
        if not isinstance(statement, ast.Assign):
            continue
        first = start = statement.lineno - 1
        while lines[start - 1].lstrip().startswith("#"):
            start -= 1
        if start < first:
            key = ast.unparse(statement.targets[0]).removeprefix("cfg.")
            block = (line.strip().removeprefix("#")[1:] for line in lines[start:first])
            comments[key] = re.sub(r"\n(?!- )\s*", " ", "\n".join(block))
    return comments


def describe_losses() -> dict[str, str]:
    """Return a description of each parameter of the registered losses."""
    described = {}
    for loss in LOSSES.values():
        formula = (inspect.getdoc(loss.formula) or loss.name).splitlines()[0]
        for name, key in loss_parameter_keys(loss).items():
            what = f'{name.capitalize()} of "{loss.name}" ({loss.reference}), in '
            if name not in loss.parameters:
                described[key] = f"{what}[0, 1]; -1.0: no class balancing"
            else:
                described[key] = f"{what}{loss.parameters[name].allowed.text}: `{formula}`"
    return described


def describe_kinds() -> dict[str, str]:
    """Return a description of each kind of finding, with what may be done about it."""
    return {
        kind.key: f"{kind.what[0].upper()}{kind.what[1:]}: "
        + ", ".join(f'"{policy}"' for policy in kind.policies)
        for kind in KINDS.values()
    }


def describe_sample_set() -> dict[str, str]:
    """Return a description of each field of the sample set, from the docstring of its class."""
    _, _, text = inspect.getdoc(SampleSet).partition("Attributes:\n")
    fields = re.findall(r"^    (\w+): (.+(?:\n {8}.+)*)", text.replace("``", "`"), re.MULTILINE)
    return {
        f"DATASETS.SAMPLE.{name.upper()}": what[0].upper() + re.sub(r"\s+", " ", what[1:])
        for name, what in fields
    }


def find_section(key: str) -> str:
    """Return the longest node of :data:`SECTIONS` that a key is in."""
    nodes = [node for node in SECTIONS if not node or key.startswith(f"{node}.")]
    return max(nodes, key=len)


def conditions(key: str) -> list[str]:
    """Return the keys and values beside which a key counts, as Markdown."""
    return [
        " or ".join(f"`{other} {value}`" for value in values) or f"`{other}` set"
        for other, values in find_conditions(key)
    ]


def to_markdown(comment: str, line_break: str) -> str:
    """Return a comment as Markdown: keys and quoted words as code, pages of docs/ as links."""

    def replace(match: re.Match[str]) -> str:
        code, word, key, page, anchor = match.groups()
        if page:
            return f"[{page}]({page}{anchor or ''})"
        return code or f"`{word or key}`"

    pattern = (
        r"(`[^`]*`)"  # code already
        r'|"(\w+)"'
        r"|\b([A-Z]\w*(?:\.[A-Z][A-Z0-9_]*)+|[A-Z]+(?:_[A-Z]+)+)\b"
        r"|docs/(\w+\.md)(#[\w-]*\w)?"
    )
    return re.sub(pattern, replace, comment).replace("\n", line_break)


if __name__ == "__main__":
    PAGE.write_text(make_page(), encoding="utf-8")
    print(f"Wrote {PAGE}")
