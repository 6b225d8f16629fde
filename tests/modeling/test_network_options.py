"""Memory format, padding, generated code, precision: how the network is computed, not what."""

import copy
from functools import partial

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import pairwise_iou
from torch.testing import assert_close

from detectors import assert_same_detections, make_batch, make_cfg, make_model
from retinanet_ext.engine.config_check import check_config
from retinanet_ext.engine.predictor import Predictor
from retinanet_ext.errors import InputError


def losses_and_gradients(model, batch):
    """Losses of a training step, and the gradients of all weights."""
    model.train()
    losses = model(batch)
    sum(losses.values()).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {name: loss.detach() for name, loss in losses.items()}, gradients


def pair(key, value):
    """A model and one of the same weights with a config value changed."""
    plain, other = make_model(), make_model(key, value)
    other.load_state_dict(plain.state_dict())
    return plain, other


def assert_same_step(plain, other, batch, **tolerance):
    wanted, wanted_gradients = losses_and_gradients(plain, copy.deepcopy(batch))
    found, gradients = losses_and_gradients(other, copy.deepcopy(batch))
    assert_close(found, wanted, **tolerance)
    assert gradients.keys() == wanted_gradients.keys()
    for name, gradient in gradients.items():
        assert_close(gradient, wanted_gradients[name], **tolerance, msg=name)


def test_channels_last_reaches_the_head_and_changes_rounding_alone():
    plain, other = pair("MODEL.CHANNELS_LAST", True)
    seen = []
    other.head.register_forward_hook(lambda _, inputs, outputs: seen.extend(outputs[0]))
    assert_same_step(plain, other, make_batch([3, 0]), rtol=1e-3, atol=1e-4)
    assert all(logits.is_contiguous(memory_format=torch.channels_last) for logits in seen)


def test_compiled_training_and_inference_are_one_graph_each(compile_by, monkeypatch):
    """Traced alone: generating code takes minutes."""
    counter = compile_by("eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, fullgraph=True))
    plain, other = pair("MODEL.COMPILE", True)
    assert set(plain.state_dict()) == set(other.state_dict())
    assert_same_step(plain, other, make_batch([3, 0], size=(96, 128)), rtol=1e-3, atol=1e-4)
    assert counter.frame_count == 1
    batch = make_batch([3, 0])
    with torch.no_grad():
        for wanted, found in zip(plain.eval()(batch), other.eval()(batch), strict=True):
            tolerances = {"rtol": 1e-3, "atol": 1e-5, "box_rtol": 1e-3, "box_atol": 1e-2}
            assert_same_detections(found["instances"], wanted["instances"], **tolerances)
    assert counter.frame_count == 3  # and backbone and head


@pytest.mark.parametrize("size", [(96, 130), (128, 128)])
def test_padding_to_a_multiple_pads_training_images_with_zeros(size):
    _, model = pair("INPUT.SIZE_DIVISIBILITY", 128)
    batch = make_batch([3, 0], size=size)
    images = model.train().preprocess_image(batch)
    assert images.tensor.shape[-2:] == (128, 256 if size[1] > 128 else 128)
    assert images.image_sizes == [tuple(inputs["image"].shape[1:]) for inputs in batch]
    plain = model.eval().preprocess_image(batch).tensor
    height, width = plain.shape[-2:]
    assert_close(images.tensor[..., :height, :width], plain)
    assert images.tensor.count_nonzero() == plain.count_nonzero()


def make_detector(*opts):
    """A model that finds something, of the same weights whatever its options."""
    model = make_model(*opts).eval()
    with torch.no_grad():
        model.head.cls_score.weight.mul_(20)
        model.head.cls_score.bias.fill_(-2)
    return model


@torch.no_grad()
def detect(model, batch):
    """The detections in the images, and the head's predictions."""
    seen = []
    hook = model.head.register_forward_hook(lambda _, inputs, outputs: seen.append(outputs))
    found = [output["instances"] for output in model(batch)]
    hook.remove()
    (predictions,) = seen
    return found, predictions


def dtypes(predictions):
    return {level.dtype for kind in predictions for level in kind}


def assert_equal(found, expected):
    for f, e in zip(found, expected, strict=True):
        assert len(e) > 20
        assert torch.equal(f.scores, e.scores) and torch.equal(f.pred_classes, e.pred_classes)
        assert torch.equal(f.pred_boxes.tensor, e.pred_boxes.tensor)


def test_bfloat16_finds_nearly_the_same():
    """Before suppression, in which rounding decides between neighbours of nearly equal score."""
    batch, keep_all = make_batch([3, 0]), ("MODEL.RETINANET.NMS_THRESH_TEST", 1.0)
    wanted, _ = detect(make_detector(*keep_all), batch)
    model = make_detector("TEST.PRECISION", "bfloat16", *keep_all)
    found, predictions = detect(model, batch)
    assert dtypes(predictions) == {torch.bfloat16}
    for f, w in zip(found, wanted, strict=True):
        assert f.scores.dtype == f.pred_boxes.tensor.dtype == torch.float32
        assert len(f) == len(w) == 100
        best = f[:50]  # the others' rank may be beyond 100 in float32
        same_class = best.pred_classes[:, None] == w.pred_classes
        overlaps, match = (pairwise_iou(best.pred_boxes, w.pred_boxes) * same_class).max(1)
        assert overlaps.min() > 0.99
        assert_close(best.scores, w.scores[match], rtol=0, atol=2e-3)

    # What follows the head is as without autocast.
    images = model.preprocess_image(batch)
    features = [torch.empty_like(level) for level in predictions[0]]
    plain = model.forward_inference(images, features, predictions)
    for instances in plain:
        instances.pred_boxes.clip(instances.image_size)
    assert_equal(plain, found)


def test_float32_is_plain_inference_and_leaves_a_callers_autocast():
    batch = make_batch([3, 0])
    model = make_detector()
    found, predictions = detect(model, batch)
    assert dtypes(predictions) == {torch.float32}
    with torch.no_grad():
        plain = DenseDetector.forward(model, batch)
    assert_equal(found, [output["instances"] for output in plain])
    with torch.autocast("cpu", torch.bfloat16):
        found, predictions = detect(model, batch)
    assert dtypes(predictions) == {torch.bfloat16}
    assert_equal(found, detect(make_detector("TEST.PRECISION", "bfloat16"), batch)[0])


def test_precision_of_inference_is_none_of_training():
    plain, other = pair("TEST.PRECISION", "bfloat16")
    assert_same_step(plain, other, make_batch([3, 0]), rtol=0, atol=0)


def test_predictor_has_the_precision_of_its_config(tmp_path):
    DetectionCheckpointer(make_detector(), str(tmp_path)).save("weights")
    opts = ("MODEL.WEIGHTS", str(tmp_path / "weights.pth"), "INPUT.MIN_SIZE_TEST", 96)
    image = make_batch([0])[0]["image"].permute(1, 2, 0).numpy()
    found = []
    for precision in ("float32", "bfloat16"):
        predictor = Predictor(make_cfg("TEST.PRECISION", precision, *opts))
        heads = []
        predictor.model.head.register_forward_hook(lambda *args, heads=heads: heads.append(args[2]))
        found.extend(predictor([image]))
        assert dtypes(heads[0]) == {getattr(torch, precision)}
    assert len(found[0]) > 20 and not torch.equal(found[0].scores, found[1].scores)


@pytest.mark.parametrize(
    ("opts", "expected"),
    [
        (("float16",), r"^TEST\.PRECISION float16 needs a CUDA device; .* bfloat16$"),
        (
            ("int8",),
            r"^TEST\.PRECISION 'int8' is unknown; known: 'float32', 'bfloat16', 'float16'$",
        ),
        (
            ("bfloat16", "MODEL.META_ARCHITECTURE", "RetinaNet"),
            r"^TEST\.PRECISION bfloat16 has no effect on MODEL\.META_ARCHITECTURE RetinaNet; ",
        ),
    ],
)
def test_a_precision_that_cannot_be_had_is_refused(opts, expected, tmp_path):
    cfg = make_cfg("TEST.PRECISION", *opts, "OUTPUT_DIR", str(tmp_path))
    for eval_only in (True, False):
        with pytest.raises(InputError, match=expected):
            check_config(cfg, num_processes=1, eval_only=eval_only)
    if cfg.MODEL.META_ARCHITECTURE == "RetinaNetExt":
        with pytest.raises(InputError, match=expected):  # of who builds it without that check
            make_model("TEST.PRECISION", *opts)
