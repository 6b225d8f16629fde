"""``torch.jit.script`` for a torch that no longer has it.

Detectron2 and fvcore apply it to two classes and two functions while they are imported, so without
it neither can be imported. As plain Python these work the same. torch announces to remove it.
Import this module before Detectron2.
"""

from __future__ import annotations

from typing import Any

import torch


def _leave_unscripted(obj: Any, *args: Any, **kwargs: Any) -> Any:
    return obj


if not hasattr(torch.jit, "script"):
    torch.jit.script = _leave_unscripted
