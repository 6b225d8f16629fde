"""Classification losses of the paper, and some published later, in pure torch.

Every module in this folder is imported, so that adding a loss takes one file that registers it
(docs/add_a_loss.md). x_t is the logit signed by the target (appendix A): x_t = x for the object's
class and -x otherwise, so that p_t = sigmoid(x_t).
"""

from importlib import import_module
from pkgutil import iter_modules

from retinanet_ext.losses.cross_entropy import sigmoid_cross_entropy_loss
from retinanet_ext.losses.focal import sigmoid_focal_loss
from retinanet_ext.losses.focal_star import sigmoid_focal_loss_star
from retinanet_ext.losses.hinge import sigmoid_hinge_loss
from retinanet_ext.losses.registry import LOSSES, Interval, bind_loss, register_loss

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = [
    "LOSSES",
    "Interval",
    "bind_loss",
    "register_loss",
    "sigmoid_cross_entropy_loss",
    "sigmoid_focal_loss",
    "sigmoid_focal_loss_star",
    "sigmoid_hinge_loss",
]
