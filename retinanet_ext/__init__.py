"""RetinaNet and the focal loss (arXiv 1708.02002) as a Detectron2 plugin.

Importing this package imports nothing else, so that :mod:`retinanet_ext.losses` and
:mod:`retinanet_ext.sampling` work without Detectron2. Asking for
:func:`add_retinanet_ext_config` imports the plugin, which registers everything.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["add_retinanet_ext_config"]


def __getattr__(name: str) -> Any:
    if name == "add_retinanet_ext_config":
        import retinanet_ext.modeling  # noqa: F401  fills Detectron2's registries
        from retinanet_ext.config import add_retinanet_ext_config

        return add_retinanet_ext_config
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
