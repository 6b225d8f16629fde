"""Training and inference on a CUDA device without values: dtypes, devices and what waits for it.

:class:`fake_cuda.FakeCuda` is that device, which needs no card.
"""

from itertools import chain, product

import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from torch._subclasses.fake_tensor import DynamicOutputShapeException

from detectors import make_batch, make_cfg
from fake_cuda import FakeCuda, run_backward, to_fake_cuda
from retinanet_ext.engine.solver import build_optimizer
from retinanet_ext.engine.train_step import AccumulatingTrainer
from retinanet_ext.engine.weight_average import WeightAverage
from retinanet_ext.losses import LOSSES
from retinanet_ext.losses.dense import HAS_TRITON
from retinanet_ext.losses.functional import class_weights
from retinanet_ext.modeling.criterion import BOX_IOUS, NORMALIZERS, RetinaNetCriterion
from retinanet_ext.modeling.matching import LOW_QUALITY_MATCHES, AnchorMatcher, label_anchors

# torch looks whether an attribute of a deep copy has data.
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")

IMAGES = {"detectron2.layers.wrappers.move_device_like": "the images are copied to the device"}
TARGETS = {
    "detectron2.structures.boxes.to": "the boxes are copied to the device, once checked",
    "detectron2.structures.instances.to": "so are the classes",
}
STEP = {
    "retinanet_ext.modeling.matching.ignore_anchors": "so are the regions to ignore",
    "retinanet_ext.engine.train_step._agree": "a step that is not finite changes no weight",
    "detectron2.engine.train_loop.write_metrics": "Detectron2 writes the losses of each step",
    "retinanet_ext.modeling.criterion.log_mean_count": "at every 20th step, of which this is one",
}
AVERAGE = {
    "retinanet_ext.engine.weight_average.after_step": "torch copies its count of steps to the "
    "device, once the optimizer is done and little is left to wait for"
}
SCALER = {"torch.amp.grad_scaler._maybe_opt_step": "torch skips a step that overflows"}
OHEM = {
    "retinanet_ext.sampling._survivors": "greedy suppression, and lists of the anchors that remain",
}
OHEM_RATIO = {
    **OHEM,
    "retinanet_ext.sampling._is_full": "the search ends when the mini-batch is full",
    "retinanet_ext.sampling._hardest": "positives and negatives are listed",
}
INFERENCE = {
    "retinanet_ext.modeling.inference.decode_candidates": "NaN is looked for once per batch, and "
    "the scores above the threshold are listed once per image",
    "detectron2.layers.nms.batched_nms": "how many detections remain depends on their boxes",
    "detectron2.structures.boxes.clip": "Detectron2 asserts that boxes are finite",
    "detectron2.structures.boxes.__getitem__": "Detectron2 leaves out empty boxes",
    "detectron2.structures.instances.__getitem__": "and their scores and classes",
}
"""Functions that may make the host wait for the device, and why they do."""

RETINANET = "MODEL.RETINANET"
WITH_OHEM = (f"{RETINANET}.SELECTION.NAME", "ohem")
RATIO = (f"{RETINANET}.SELECTION.OHEM.NEG_POS_RATIO", 3.0)
PREDICTIONS = (f"{RETINANET}.SELECTION.OHEM.NMS_BOXES", "predictions")
LOSS = (f"{RETINANET}.CLS_LOSS.NAME",)
NORMALIZER = (f"{RETINANET}.LOSS_NORMALIZER",)
BOX_LOSS = (f"{RETINANET}.BBOX_REG_LOSS_TYPE",)
GIOU, DIOU = (*BOX_LOSS, "giou"), (*BOX_LOSS, "diou")
AMP = ("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION")
FLOAT16, BFLOAT16 = (*AMP, "float16"), (*AMP, "bfloat16")
ACCUMULATED = ("SOLVER.GRAD_ACCUM_STEPS", 2)
TIMM = (
    *("MODEL.BACKBONE.NAME", "build_retinanet_timm_fpn_backbone", "MODEL.TIMM.NORM", "EvalBN"),
    *("MODEL.TIMM.NAME", "resnet10t", "MODEL.BACKBONE.FREEZE_AT", 0),
)
DIVISIBLE = ("INPUT.SIZE_DIVISIBILITY", 64)
CHANNELS_LAST = ("MODEL.CHANNELS_LAST", True)
FUSED = ("SOLVER.FUSED_OPTIMIZER", True)
ADAMW = ("SOLVER.OPTIMIZER", "AdamW")
CLIP = ("SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE")
IN_PLAIN_TORCH_AND_TRITON = [False, True] if HAS_TRITON else [False]

STEPS = {
    "as Detectron2": ((), {}),
    "channels last, giou, gradients accumulated": (
        (*CHANNELS_LAST, *GIOU, *ACCUMULATED),
        {},
    ),
    "bfloat16, diou, AdamW fused, the whole gradient clipped": (
        (*BFLOAT16, *DIOU, *ADAMW, *FUSED, *CLIP, "full_model", *NORMALIZER, "foreground"),
        {},
    ),
    "bfloat16, channels last, cross entropy, SGD fused": (
        (*BFLOAT16, *CHANNELS_LAST, *FUSED, *LOSS, "cross_entropy"),
        {},
    ),
    "float16, hinge, GroupNorm, AdamW": (
        (*FLOAT16, *LOSS, "hinge", f"{RETINANET}.NORM", "GN", *ADAMW, *DIVISIBLE),
        SCALER,
    ),
    "float16, channels last, BatchNorm, each gradient clipped": (
        (*FLOAT16, *CHANNELS_LAST, "MODEL.RESNETS.NORM", "BN", *CLIP, "norm", *LOSS, "focal_star"),
        SCALER,
    ),
    "bfloat16, a timm backbone": (
        (*BFLOAT16, *TIMM, *ADAMW, *CLIP, "full_model"),
        {},
    ),
    "OHEM": ((*WITH_OHEM, *CLIP, "value"), OHEM),
    "float16, OHEM with a ratio among predictions": (
        (*FLOAT16, *WITH_OHEM, *RATIO, *PREDICTIONS, *NORMALIZER, "selected"),
        {**SCALER, **OHEM_RATIO},
    ),
}
"""Training steps: their config, and where they wait besides. Every second one uses the kernels."""


def make_fake_cfg(*opts):
    return make_cfg("MODEL.DEVICE", "cuda", f"{RETINANET}.NUM_CONVS", 1, *opts)


def make_fake_model(cfg):
    return to_fake_cuda(META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg))


def fake_batch():
    batch = make_batch([3, 0], size=(64, 96))
    batch[0]["ignore_regions"] = torch.tensor([[0.0, 0, 20, 20]])
    return batch


def tensors_in(optimizer):
    return [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.dim()
    ]


@pytest.mark.parametrize("name", STEPS)
def test_a_training_step_waits_only_where_it_is_meant_to(name):
    opts, others = STEPS[name]
    has_triton = HAS_TRITON and list(STEPS).index(name) % 2 == 1
    cfg = make_fake_cfg(*opts)
    seen, predictions = [], []
    waits = {**IMAGES, **TARGETS, **STEP, **others}
    with FakeCuda(waits, has_triton=has_triton) as fake, EventStorage(19):
        model = make_fake_model(cfg).train()
        model.register_forward_hook(lambda *call: seen.append(call[-1]))
        model.head.register_forward_hook(lambda *call: predictions.extend(chain(*call[-1])))
        average = WeightAverage(model, 0.9)
        batches = [fake_batch() for _ in range(cfg.SOLVER.GRAD_ACCUM_STEPS)]
        trainer = AccumulatingTrainer(model, batches, build_optimizer(cfg, model), cfg)
        trainer.iter = 19
        trainer.run_step()
        average.after_step()
        losses = [loss for losses in seen for loss in losses.values()]
        precision = getattr(torch, cfg.SOLVER.AMP.PRECISION if AMP[0] in opts else "float32")
        assert losses and all(loss.dtype == torch.float32 for loss in losses)
        assert predictions and all(tensor.dtype == precision for tensor in predictions)
        if cfg.MODEL.CHANNELS_LAST and precision != torch.bfloat16:  # torch asks a card about that
            assert all(t.is_contiguous(memory_format=torch.channels_last) for t in predictions)
        trained = [p for p in model.parameters() if p.requires_grad]
        assert all(p.grad.dtype == torch.float32 and p.grad.shape == p.shape for p in trained)
        state = tensors_in(trainer.optimizer)
        assert len(state) == len(trained) * (2 if ADAMW[1] in opts else 1)
        kept = [*model.state_dict().values(), *average.model.state_dict().values()]
        grads = [p.grad for p in trained]
        assert all(tensor.is_cuda for tensor in [*losses, *kept, *state, *grads])
    assert fake.met == waits.keys()


def test_a_second_step_waits_no_more_than_the_first():
    """With the optimizer's state, the average and Detectron2's log between its writing."""
    cfg = make_fake_cfg(*ADAMW)
    waits = {**IMAGES, **TARGETS, **STEP, **AVERAGE}
    with FakeCuda(waits, has_triton=HAS_TRITON) as fake, EventStorage(0) as storage:
        model = make_fake_model(cfg).train()
        average = WeightAverage(model, 0.9)
        optimizer = build_optimizer(cfg, model)
        trainer = AccumulatingTrainer(model, [fake_batch()] * 2, optimizer, cfg)
        for trainer.iter in range(2):
            storage.iter = trainer.iter
            trainer.run_step()
            average.after_step()
    assert average.num_steps == 2
    assert waits.keys() - fake.met == {"retinanet_ext.modeling.criterion.log_mean_count"}


NUM_CLASSES, SHAPES = 4, [(4, 6), (2, 3)]
CRITERIA = [
    *[(*LOSS, name, *BFLOAT16) for name in LOSSES],
    *[
        (*selection, *NORMALIZER, name)
        for selection, name in product([(), WITH_OHEM, (*WITH_OHEM, *RATIO)], NORMALIZERS)
    ],
    *[
        (*BOX_LOSS, name, *AMP, precision)
        for name, precision in product(["smooth_l1", *BOX_IOUS], ["float32", "bfloat16", "float16"])
    ],
    (*WITH_OHEM, f"{RETINANET}.SELECTION.OHEM.SCOPE", "process"),
    (f"{RETINANET}.CLS_LOSS.CLASS_ALPHA", [0.2, 0.3, 0.4, 0.5]),
]


@pytest.mark.parametrize("opts", CRITERIA, ids=lambda opts: "-".join(map(str, opts[1::2])))
def test_losses_and_their_gradients_wait_only_with_ohem(opts):
    cfg = make_fake_cfg(*opts)
    dtype = getattr(torch, cfg.SOLVER.AMP.PRECISION)
    for has_triton in IN_PLAIN_TORCH_AND_TRITON:
        with FakeCuda(OHEM_RATIO if WITH_OHEM[0] in opts else (), has_triton=has_triton):
            criterion = to_fake_cuda(
                RetinaNetCriterion.from_config(cfg, Box2BoxTransform((1,) * 4))
            )
            tensors = {"device": "cuda", "dtype": dtype, "requires_grad": True}
            logits = [torch.empty(2, 9 * NUM_CLASSES, *shape, **tensors) for shape in SHAPES]
            num_anchors = 9 * sum(height * width for height, width in SHAPES)
            anchors = torch.empty(num_anchors, 4, device="cuda")
            deltas = torch.empty(2, num_anchors, 4, **tensors)
            labels = torch.empty(2, num_anchors, dtype=torch.int64, device="cuda")
            losses = criterion(anchors, logits, deltas, labels, labels, anchors[:3])
            sum(losses.values()).backward()
            assert all(loss.is_cuda and loss.dtype == torch.float32 for loss in losses.values())
            for tensor in (*logits, deltas):
                assert tensor.grad.dtype == dtype and tensor.grad.shape == tensor.shape


@pytest.mark.parametrize("has_triton", IN_PLAIN_TORCH_AND_TRITON)
@pytest.mark.parametrize("low_quality", LOW_QUALITY_MATCHES)
def test_labels_never_wait(low_quality, has_triton):
    matcher = AnchorMatcher([0.4, 0.5], [0, -1, 1], low_quality)
    targets = [each["instances"] for each in make_batch([3, 0, 1])]
    with FakeCuda(TARGETS, has_triton=has_triton):
        anchors = Boxes(torch.empty(99, 4, device="cuda"))
        found = label_anchors(matcher, anchors, [each.to("cuda") for each in targets], NUM_CLASSES)
        for tensor in found:
            assert tensor.is_cuda and tensor.shape == (3, 99) and tensor.dtype == torch.int64


@pytest.mark.parametrize(
    ("precision", "channels_last", "clip_before_nms"),
    [("float32", False, False), ("bfloat16", True, False), ("float16", True, True)],
)
def test_inference_waits_only_where_it_is_meant_to(precision, channels_last, clip_before_nms):
    cfg = make_fake_cfg(
        *("TEST.PRECISION", precision, CHANNELS_LAST[0], channels_last),
        *(f"{RETINANET}.CLIP_BEFORE_NMS", clip_before_nms),
    )
    features = []
    with FakeCuda({**IMAGES, **INFERENCE}) as fake, torch.no_grad():
        model = make_fake_model(cfg).eval()
        model.backbone.register_forward_hook(lambda *call: features.extend(call[-1].values()))
        found = [output["instances"] for output in model(fake_batch())]
        assert all(feature.dtype == getattr(torch, precision) for feature in features)
        for instances in found:
            assert instances.pred_boxes.tensor.dtype == instances.scores.dtype == torch.float32
            assert instances.pred_boxes.device.type == instances.scores.device.type == "cuda"
    assert fake.met == {*IMAGES, *INFERENCE}


WAITS = {
    "a value": lambda x: x.sum().item(),
    "values": lambda x: x.tolist(),
    "a branch": lambda x: bool(x.any()),
    "a search": lambda x: x.nonzero(),
    "a mask": lambda x: x[x > 0],
    "writing by a mask": lambda x: x.index_put_((x > 0,), x[:1]),
    "a copy to the host": lambda x: x.cpu(),
    "a copy from the host": lambda x: torch.ones(3).to(x),
    "a list on the device": lambda x: torch.tensor([1.0, 2.0], device="cuda"),
    "counting": lambda x: torch.unique(x),
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_a_wait_is_a_failure(wait):
    with FakeCuda(), pytest.raises((AssertionError, DynamicOutputShapeException)):
        wait(torch.empty(5, device="cuda"))


def test_tensors_on_two_devices_are_a_failure():
    with FakeCuda(), pytest.raises((AssertionError, RuntimeError), match="device"):
        torch.empty(5, device="cuda") + torch.ones(5)


def test_gradients_are_those_of_torch():
    """The device's own order of backward functions gives the gradients of torch's engine."""
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.GroupNorm(2, 4), torch.nn.ReLU(), torch.nn.Flatten()
    )
    results = []
    for backward in (torch.Tensor.backward, run_backward):
        model.zero_grad()
        x = torch.linspace(-1, 1, 3 * 25).view(1, 3, 5, 5)
        y = model(x)
        parts = y.split([6, 30], dim=1)
        weights = class_weights(0.25, 4)
        loss = (parts[0] ** 2).mean() + (parts[1] * y[:, 6:].exp()).sum() * weights[0].float()
        backward(loss)
        results.append([p.grad.clone() for p in model.parameters()])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)
