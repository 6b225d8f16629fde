"""RetinaNet of the paper as a LazyConfig: Detectron2's model with this plugin's parts.

For ``tools/lazyconfig_train_net.py`` of Detectron2, which reads data, optimizer and schedule from
the same file; add those of ``model_zoo.get_config("common/...")``.
"""

from detectron2.config import LazyCall as L
from detectron2.model_zoo import get_config
from detectron2.modeling.box_regression import Box2BoxTransform

from retinanet_ext.losses import bind_loss
from retinanet_ext.modeling import (
    AnchorMatcher,
    OctaveAnchorGenerator,
    RetinaNetCriterion,
    RetinaNetExt,
    RetinaNetExtHead,
)

model = get_config("common/models/retinanet.py").model
model._target_ = RetinaNetExt
for name in ("box2box_transform", "focal_loss_alpha", "focal_loss_gamma", "input_format"):
    del model[name]

model.head._target_ = RetinaNetExtHead
model.anchor_generator = L(OctaveAnchorGenerator)(
    scales_per_octave=3,
    base_scale=4.0,
    aspect_ratios=[[0.5, 1.0, 2.0]],
    strides=[8, 16, 32, 64, 128],
    offset=0.5,
)
model.anchor_matcher = L(AnchorMatcher)(
    thresholds=[0.4, 0.5], labels=[0, -1, 1], low_quality_matches="ignored_band"
)
model.criterion = L(RetinaNetCriterion)(
    num_classes="${..num_classes}",
    cls_loss=L(bind_loss)(name="focal", gamma=2.0),
    alpha=0.25,
    normalizer="foreground",
    box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
    smooth_l1_beta=0.11,
)
