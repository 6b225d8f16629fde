"""The criterion where it differs from Detectron2's: losses, selections, normalisers, state."""

import copy

import pytest
import torch
from detectron2.layers import ciou_loss, diou_loss
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances
from fvcore.nn import giou_loss
from torch.testing import assert_close
from torchvision.ops import box_iou

from detectors import build_without_memory, make_batch, make_cfg, make_model
from retinanet_ext.errors import InputError
from retinanet_ext.losses import LOSSES
from retinanet_ext.losses.functional import elementwise_loss
from retinanet_ext.modeling import RetinaNetCriterion
from retinanet_ext.modeling.criterion import NORMALIZERS
from retinanet_ext.modeling.loss_config import resolve_cls_loss_weight
from retinanet_ext.modeling.matching import AnchorMatcher, label_anchors
from retinanet_ext.sampling import OHEM

K = 4
MODULES = [name for name, loss in LOSSES.items() if loss.is_module]
FVCORE = {"giou": giou_loss, "diou": diou_loss, "ciou": ciou_loss}


def criterion(**arguments):
    defaults = {
        "num_classes": K,
        "cls_loss": LOSSES["focal"].bind(),
        "alpha": 0.25,
        "box2box_transform": Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0)),
        "normalizer": "foreground_batch",
    }
    return RetinaNetCriterion(**{**defaults, **arguments})


def apply(module, anchors, logits, *rest):
    """Call the criterion on logits (N, R, K) as one level of one anchor a cell."""
    return module(anchors, [logits.permute(0, 2, 1).unsqueeze(-1)], *rest)


def dense_targets(labels):
    return torch.nn.functional.one_hot(labels.clamp(min=0), K + 1)[..., :K].float()


def predictions(num_images=3, num_anchors=200, seed=0):
    rng = torch.Generator().manual_seed(seed)
    corner = torch.rand(num_anchors, 2, generator=rng) * 100
    anchors = torch.cat([corner, corner + 8 + 30 * torch.rand(num_anchors, 2, generator=rng)], 1)
    logits = 3 * torch.randn(num_images, num_anchors, K, generator=rng)
    deltas = torch.randn(num_images, num_anchors, 4, generator=rng)
    labels = torch.randint(-1, K + 1, (num_images, num_anchors), generator=rng)
    labels[0] = K  # an image without objects
    boxes = anchors + torch.rand(num_anchors, 4, generator=rng)
    matches = torch.randint(0, num_anchors, (num_images, num_anchors), generator=rng)
    return anchors, logits, deltas, labels, matches, boxes


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - MODULES))
@pytest.mark.parametrize("alpha", [-1.0, 0.3, [0.1, 0.4, 0.6, 0.99]])
def test_anchor_losses_equal_the_loss_of_one_hot_targets(name, alpha):
    _, logits, _, labels, _, _ = predictions()
    formula = LOSSES[name].bind()
    losses = criterion(cls_loss=formula, alpha=alpha).anchor_losses(logits, labels)
    expected = elementwise_loss(formula, logits, dense_targets(labels), alpha).sum(2)
    assert_close(losses[labels >= 0], expected[labels >= 0])


def test_half_precision_logits_are_summed_in_float32():
    anchors, logits, deltas, labels, matches, boxes = predictions()
    half = apply(criterion(), anchors, logits.half(), deltas.half(), labels, matches, boxes)
    rounded = logits.half().float(), deltas.half().float()
    full = apply(criterion(), anchors, *rounded, labels, matches, boxes)
    for name, value in full.items():
        assert half[name].dtype == torch.float32
        assert_close(half[name], value)


@pytest.mark.parametrize("normalizer", ["foreground", "foreground_batch", "foreground_ema",
                                        "selected"])  # fmt: skip
def test_normalisers_by_their_definition(normalizer):
    case = predictions()
    labels = case[3]
    module = criterion(normalizer=normalizer)
    losses = apply(module, *case)
    per_image = module.anchor_losses(case[1], labels).where(labels >= 0, 0).sum(1)
    foreground = ((labels >= 0) & (labels < K)).sum(1)
    total = {
        "foreground": (per_image / foreground.clamp(min=1)).mean(),
        "foreground_batch": per_image.sum() / foreground.sum(),
        "foreground_ema": per_image.sum() / (90 + 0.1 * foreground.sum()),
        "selected": per_image.sum() / (labels >= 0).sum(),
    }
    assert_close(losses["loss_cls"], total[normalizer])


@pytest.mark.parametrize("normalizer", ["foreground", "foreground_batch", "selected"])
def test_a_batch_without_a_single_anchor_that_counts_is_zero_with_a_gradient(normalizer):
    anchors, logits, deltas, labels, matches, boxes = predictions()
    labels[:] = -1
    logits.requires_grad_(), deltas.requires_grad_()
    losses = apply(
        criterion(normalizer=normalizer), anchors, logits, deltas, labels, matches, boxes
    )
    sum(losses.values()).backward()
    assert losses["loss_cls"] == 0 and losses["loss_box_reg"] == 0
    assert not logits.grad.any() and not deltas.grad.any()


def test_ohem_discards_the_rest_from_both_losses():
    anchors, logits, deltas, labels, matches, boxes = predictions()
    logits.requires_grad_(), deltas.requires_grad_()
    ohem = OHEM(batch_size=20, nms_thresh=0.5)
    module = criterion(selection=ohem, normalizer="selected")
    losses = apply(module, anchors, logits, deltas, labels, matches, boxes)
    sum(losses.values()).backward()
    per_anchor = module.anchor_losses(logits, labels).detach()
    selected = ohem(per_anchor, labels, anchors, K)
    assert_close(losses["loss_cls"].detach(), per_anchor[selected].sum() / selected.sum())
    touched = logits.grad.abs().sum(2) > 0
    assert not touched[~selected].any() and touched.sum() > 30
    foreground = (labels >= 0) & (labels < K)
    assert torch.equal(deltas.grad.abs().sum(2) > 0, selected & foreground)


def test_ohem_on_predictions_selects_other_anchors_than_on_anchors():
    case = predictions()
    masks = []
    for nms_boxes in ("anchors", "predictions"):
        logits = case[1].clone().requires_grad_()
        module = criterion(selection=OHEM(batch_size=20, nms_boxes=nms_boxes))
        apply(module, case[0], logits, *case[2:])["loss_cls"].backward()
        masks.append(logits.grad.abs().sum(2) > 0)
    assert not torch.equal(*masks)


def test_moving_average_is_saved_loaded_and_not_missed():
    module, case = criterion(normalizer="foreground_ema"), predictions()
    apply(module, *case)
    saved = copy.deepcopy(module.state_dict())
    assert saved.keys() == {"loss_normalizer"}
    resumed = criterion(normalizer="foreground_ema")
    resumed.load_state_dict(saved)
    expected, found = apply(module, *case), apply(resumed, *case)
    assert torch.equal(expected["loss_cls"], found["loss_cls"])
    result = resumed.load_state_dict({}, strict=False)
    assert result.missing_keys == [] and resumed.loss_normalizer == module.loss_normalizer


LOSS_OPTS = {
    "focal, gamma 0.1": ["MODEL.RETINANET.FOCAL_LOSS_GAMMA", 0.1],
    "focal star": ["MODEL.RETINANET.CLS_LOSS.NAME", "focal_star"],
    "cross entropy": ["MODEL.RETINANET.CLS_LOSS.NAME", "cross_entropy"],
    "cross entropy, no prior": [
        "MODEL.RETINANET.CLS_LOSS.NAME", "cross_entropy", "MODEL.RETINANET.PRIOR_INIT", False],
    "hinge": ["MODEL.RETINANET.CLS_LOSS.NAME", "hinge"],
    "ohem": ["MODEL.RETINANET.SELECTION.NAME", "ohem",
             "MODEL.RETINANET.LOSS_NORMALIZER", "selected"],
    "ohem 1:3, predictions, process": [
        "MODEL.RETINANET.SELECTION.NAME", "ohem",
        "MODEL.RETINANET.SELECTION.OHEM.NEG_POS_RATIO", 3.0,
        "MODEL.RETINANET.SELECTION.OHEM.NMS_BOXES", "predictions",
        "MODEL.RETINANET.SELECTION.OHEM.SCOPE", "process"],
    "ohem, quality focal": ["MODEL.RETINANET.SELECTION.NAME", "ohem",
                            "MODEL.RETINANET.CLS_LOSS.NAME", "quality_focal"],
    **{name: ["MODEL.RETINANET.CLS_LOSS.NAME", name] for name in MODULES},
}  # fmt: skip


@pytest.mark.parametrize("name", LOSS_OPTS)
def test_every_loss_and_selection_trains_the_whole_model_from_config(name):
    model = make_model(*LOSS_OPTS[name]).train()
    losses = model(make_batch([3, 0], size=(96, 96)))
    sum(losses.values()).backward()
    trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(grad is not None and grad.isfinite().all() for grad in trained.values())
    assert all(value.isfinite() for value in losses.values())


def test_prior_gives_every_class_its_probability_and_can_be_left_out():
    prior = make_model("MODEL.RETINANET.PRIOR_PROB", 0.02).head.cls_score.bias
    assert_close(prior.sigmoid(), torch.full_like(prior, 0.02))
    assert not make_model("MODEL.RETINANET.PRIOR_INIT", False).head.cls_score.bias.any()


def test_class_alpha_of_each_class():
    key = "MODEL.RETINANET.CLS_LOSS.CLASS_ALPHA"
    listed = make_model(key, [0.1, 0.2, 0.3, 0.4]).criterion.alpha_weights[0]
    assert listed.tolist() == [0.1, 0.2, 0.3, 0.4]


R = "MODEL.RETINANET."


@pytest.mark.parametrize("name", ["focal", "cross_entropy", "hinge", "focal_star", "ce .75"])
def test_auto_weight_gives_positives_the_gradient_of_balanced_cross_entropy(name):
    """At the initial probability pi; cross entropy with alpha .75 itself gets weight 1."""
    alpha = [R + "CLS_LOSS.CROSS_ENTROPY.ALPHA", 0.75] if name == "ce .75" else []
    opts = [R + "CLS_LOSS.NAME", "cross_entropy" if alpha else name, *alpha]
    cfg = make_cfg(*opts)
    cfg.MODEL.RETINANET.CLS_LOSS.WEIGHT = "auto"
    resolve_cls_loss_weight(cfg)
    if alpha:
        assert pytest.approx(1) == cfg.MODEL.RETINANET.CLS_LOSS.WEIGHT
    module = RetinaNetCriterion.from_config(cfg, Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0)))
    logits = torch.full((1, 1, K), 0.01, dtype=torch.float64).logit().requires_grad_()
    box = torch.tensor([[0.0, 0, 8, 8]])
    module.normalizer = "foreground"
    index = torch.zeros(1, 1, dtype=torch.long)
    apply(module, box, logits, torch.zeros(1, 1, 4), index + 2, index, box)["loss_cls"].backward()
    assert logits.grad[0, 0, 2].item() == pytest.approx(-0.75 * 0.99)


@pytest.mark.parametrize("name", MODULES)
def test_auto_weight_is_for_losses_of_x_t(name):
    cfg = make_cfg(R + "CLS_LOSS.NAME", name)
    cfg.MODEL.RETINANET.CLS_LOSS.WEIGHT = "auto"
    with pytest.raises(InputError, match=f"WEIGHT auto is for a loss of x_t; {name} takes"):
        resolve_cls_loss_weight(cfg)


def test_loss_weight_scales_the_classification_loss_alone():
    data = predictions()
    plain, weighted = (apply(criterion(cls_loss_weight=w), *data) for w in (1.0, 2.5))
    assert_close(weighted["loss_cls"], 2.5 * plain["loss_cls"])
    assert_close(weighted["loss_box_reg"], plain["loss_box_reg"])


@pytest.mark.parametrize(
    ("opts", "words"),
    [
        ([R + "CLS_LOSS.WEIGHT", -1.0], ["CLS_LOSS.WEIGHT", "[0, inf)", "-1.0"]),
        ([R + "CLS_LOSS.NAME", "focl"], ["CLS_LOSS.NAME", "focl", "equalized_focal, focal"]),
        ([R + "SELECTION.NAME", "hard"], ["SELECTION.NAME", "hard", "all, ohem"]),
        ([R + "FOCAL_LOSS_GAMMA", -1.0], ["FOCAL_LOSS_GAMMA", "[0, inf)", "-1.0"]),
        ([R + "FOCAL_LOSS_ALPHA", 1.5], ["FOCAL_LOSS_ALPHA", "[0, 1]", "1.5"]),
        ([R + "CLS_LOSS.NAME", "focal_star", R + "CLS_LOSS.FOCAL_STAR.GAMMA", 0.0],
         ["CLS_LOSS.FOCAL_STAR.GAMMA", "(0, inf)"]),
        ([R + "CLS_LOSS.NAME", "hinge", R + "CLS_LOSS.HINGE.MARGIN", 2.0],
         ["CLS_LOSS.HINGE.MARGIN", "(0, 1]"]),
        ([R + "CLS_LOSS.NAME", "hinge", R + "CLS_LOSS.CLASS_ALPHA", [0.1, 0.2, 0.3, 0.4]],
         ["CLASS_ALPHA", "hinge", "no alpha"]),
        ([R + "CLS_LOSS.NAME", "varifocal", R + "CLS_LOSS.CLASS_ALPHA", [0.1, 0.2, 0.3, 0.4]],
         ["CLASS_ALPHA", "varifocal", "no alpha"]),
        ([R + "CLS_LOSS.NAME", "ghm_c", R + "CLS_LOSS.GHM_C.MOMENTUM", 1.0],
         ["CLS_LOSS.GHM_C.MOMENTUM", "[0, 1)", "1.0"]),
        ([R + "CLS_LOSS.CLASS_ALPHA", [0.1, 0.2]], ["CLASS_ALPHA", "2 values", "4 classes"]),
        ([R + "CLS_LOSS.CLASS_ALPHA", [["x", 0.2]] * 4], ["CLASS_ALPHA names classes", "4 num"]),
        ([R + "CLS_LOSS.CLASS_ALPHA", [0.1, 3.0, 0.2, 0.2]], ["CLASS_ALPHA[1]", "[0, 1]", "3.0"]),
        ([R + "SELECTION.NAME", "ohem", R + "SELECTION.OHEM.BATCH_SIZE", 0],
         ["SELECTION.OHEM", "batch_size", "[1, inf)"]),
        ([R + "SELECTION.NAME", "ohem", R + "SELECTION.OHEM.SCOPE", "gpu"],
         ["SELECTION.OHEM", "scope", "'gpu'"]),
        ([R + "LOSS_NORMALIZER", "positives"], ["LOSS_NORMALIZER", "positives", "foreground_ema"]),
        ([R + "LOW_QUALITY_MATCHES", "some"], ["LOW_QUALITY_MATCHES", "some", "ignored_band"]),
        ([R + "PRIOR_PROB", 0.0], ["PRIOR_PROB", "(0, 1)"]),
        ([R + "BBOX_REG_LOSS_TYPE", "l3"], ["BBOX_REG_LOSS_TYPE", "l3", "giou"]),
        ([R + "SMOOTH_L1_LOSS_BETA", -0.1], ["SMOOTH_L1_LOSS_BETA", "[0, inf)"]),
        ([R + "SCORE_THRESH_TEST", 1.5], ["SCORE_THRESH_TEST", "[0, 1]"]),
        ([R + "NUM_CLASSES", 0], ["NUM_CLASSES", "[1, inf)"]),
        ([R + "IOU_THRESHOLDS", [0.6, 0.5]], ["IOU_THRESHOLDS", "[0.6, 0.5]"]),
        (["MODEL.ANCHOR_GENERATOR.SCALES_PER_OCTAVE", 0], ["SCALES_PER_OCTAVE", "[1, 64]"]),
        (["MODEL.ANCHOR_GENERATOR.BASE_SCALE", 0.0], ["BASE_SCALE", "(0, inf)"]),
        (["MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[0.5, -1.0]]], ["ASPECT_RATIOS", "(0, inf)"]),
        (["MODEL.ANCHOR_GENERATOR.SIZES", [[8, 16]]], ["SIZES", "BASE_SCALE"]),
    ],
)  # fmt: skip
def test_a_bad_value_is_refused_with_its_key(opts, words):
    with pytest.raises(InputError) as error:
        build_without_memory(make_cfg(*opts))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("kind", ["smooth_l1", "giou", "diou", "ciou"])
def test_box_loss_is_that_of_the_anchors_that_count(kind):
    """Computed for all anchors; predictions of the others may be anything."""
    anchors, _, deltas, labels, matches, boxes = predictions()
    module = criterion(box_reg_loss_type=kind)
    counts = (labels >= 0) & (labels < K)
    deltas = (0.3 * deltas).masked_fill(~counts.unsqueeze(2), torch.nan).requires_grad_()
    found = module._box_loss_per_image(anchors, deltas, counts, matches, boxes)
    image, anchor = counts.nonzero(as_tuple=True)
    listed = module.box_losses(
        anchors[anchor], deltas[image, anchor], boxes[matches[image, anchor]]
    )
    expected = listed.new_zeros(len(deltas)).index_add(0, image, listed)
    assert expected[1] > 0 and expected[0] == 0
    assert_close(found, expected)
    assert_close(*(torch.autograd.grad(total.sum(), deltas)[0] for total in (found, expected)))


@pytest.mark.parametrize("box_counts", [[3, 0], [0, 3], [0, 3, 0, 0], [0, 0]])
def test_box_loss_takes_images_without_boxes(box_counts):
    """With the matches that are made for them."""
    anchors, _, deltas, *_ = predictions(num_images=len(box_counts))
    boxes = [anchors[:count] + 1 for count in box_counts]
    gt = [
        Instances((200, 200), gt_boxes=Boxes(b), gt_classes=torch.zeros(len(b), dtype=torch.int64))
        for b in boxes
    ]
    matcher = AnchorMatcher([0.4, 0.5], [0, -1, 1])
    labels, matches = label_anchors(matcher, Boxes(anchors), gt, K)
    found = criterion()._box_loss_per_image(anchors, deltas, labels == 0, matches, torch.cat(boxes))
    assert [bool(loss) for loss in found] == [bool(count) for count in box_counts]


@pytest.mark.parametrize("kind", FVCORE)
def test_iou_losses_equal_fvcores(kind):
    """In float64, values and gradients: overlapping boxes, distant ones, one inside the other."""
    anchors, _, deltas, *_, boxes = predictions()
    anchors, boxes, deltas = anchors.double(), boxes.double(), deltas[0].double()
    boxes[:50] += 300
    module = criterion(box_reg_loss_type=kind)
    module.box2box_transform.apply_deltas = lambda deltas, anchors: anchors + deltas
    results = []
    for loss in (
        lambda deltas: module.box_losses(anchors, deltas, boxes),
        lambda deltas: FVCORE[kind](anchors + deltas, boxes),
    ):
        leaf = deltas.clone().requires_grad_()
        values = loss(leaf)
        results.append((values.detach(), torch.autograd.grad(values.sum(), leaf)[0]))
    # fvcore adds 1e-7 pixels to areas.
    assert_close(*results, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("kind", ["smooth_l1", *FVCORE])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_a_prediction_that_diverged_has_a_loss_that_tells(kind, value):
    """No assertion: what becomes of such a step is the policy's to decide."""
    anchors, _, deltas, labels, matches, boxes = predictions()
    deltas[1, labels[1] == 0, 0] = value
    module, counts = criterion(box_reg_loss_type=kind), (labels >= 0) & (labels < K)
    losses = module._box_loss_per_image(anchors, deltas, counts, matches, boxes)
    assert losses[[0, 2]].isfinite().all()
    assert not losses[1].isfinite() or abs(value) != torch.inf


def test_box_targets_are_detectron2s():
    anchors, *_, boxes = predictions()
    module = criterion(box2box_transform=Box2BoxTransform(weights=(10.0, 5.0, 2.0, 1.0)))
    expected = module.box2box_transform.get_deltas(anchors, boxes)
    assert_close(module._box_targets(anchors, boxes), expected)


@pytest.mark.parametrize(
    ("normalizer", "name"),
    [
        *((normalizer, "") for normalizer in NORMALIZERS),
        *(("foreground_ema", name) for name in MODULES if name != "ghm_c"),
        ("foreground", "equalized_focal"),
    ],
)
def test_micro_batches_are_one_batch(normalizer, name):
    """Losses and gradients of images one by one, an image without objects among them."""
    anchors, logits, deltas, labels, matches, boxes = predictions(num_images=4)
    whole, parts = (
        criterion(
            normalizer=normalizer,
            **({"cls_loss": LOSSES[name].build(K), "alpha": -1.0} if name else {}),
        )
        for _ in range(2)
    )

    def losses_and_gradients(module, images):
        leaves = [t[images].clone().requires_grad_() for t in (logits, deltas)]
        losses = apply(module, anchors, *leaves, labels[images], matches[images], boxes)
        return losses, torch.autograd.grad(sum(losses.values()), leaves)

    for _ in range(2):  # the second goes on with the first's normaliser
        wanted, wanted_gradients = losses_and_gradients(whole, slice(None))
        parts.begin_batch(4)
        steps = [losses_and_gradients(parts, slice(i, i + 1)) for i in range(4)]
        scale = parts.end_batch()
        for name, value in wanted.items():
            assert_close(sum(losses[name] for losses, _ in steps) * scale.float(), value)
        for index, gradient in enumerate(wanted_gradients):
            found = torch.cat([gradients[index] for _, gradients in steps]) * scale.float()
            assert_close(found, gradient)
    assert_close(parts.state_dict(), whole.state_dict(), rtol=1e-6, atol=0)
    assert_close(parts.loss_normalizer, whole.loss_normalizer, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_summed_over_anchors_and_divided_as_any_loss(name):
    anchors, logits, deltas, labels, matches, boxes = predictions()
    deltas *= 0.1
    losses = apply(
        criterion(cls_loss=LOSSES[name].build(K)), anchors, logits, deltas, labels, matches, boxes
    )
    foreground = (labels >= 0) & (labels < K)
    decode = Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0)).apply_deltas
    quality = torch.stack(
        [
            box_iou(decode(image, anchors), boxes[index]).diagonal()
            for image, index in zip(deltas, matches, strict=True)
        ]
    )
    expected = LOSSES[name].build(K)(logits, labels, quality.where(foreground, torch.nan))
    assert_close(losses["loss_cls"], expected.sum() / foreground.sum())


def test_images_without_boxes_have_no_quality_and_a_loss():
    anchors, logits, deltas, labels, matches, boxes = predictions()
    labels[:] = K
    module = criterion(cls_loss=LOSSES["varifocal"].build(K))
    losses = apply(module, anchors, logits, deltas, labels, 0 * matches, boxes[:0])
    assert losses["loss_cls"] > 0 and losses["loss_box_reg"] == 0


def test_the_soft_target_has_no_gradient_and_needs_its_boxes():
    anchors, logits, deltas, labels, matches, boxes = predictions()
    deltas = (0.1 * deltas).requires_grad_()
    logits.requires_grad_()
    module = criterion(cls_loss=LOSSES["quality_focal"].build(K))
    losses = apply(module, anchors, logits, deltas, labels, matches, boxes)
    gradients = torch.autograd.grad(losses["loss_cls"], [logits, deltas], allow_unused=True)
    assert gradients[0].any() and gradients[1] is None
    with pytest.raises(InputError, match="needs the quality of each anchor"):
        module.anchor_losses(logits, labels)


def test_statistics_are_loaded_where_they_are_and_kept_where_not():
    case, efl = predictions(), criterion(cls_loss=LOSSES["equalized_focal"].build(K))
    apply(efl, *case)
    saved = copy.deepcopy(efl.state_dict())
    resumed = criterion(cls_loss=LOSSES["equalized_focal"].build(K))
    resumed.load_state_dict(saved)
    assert torch.equal(apply(efl, *case)["loss_cls"], apply(resumed, *case)["loss_cls"])
    ghm = criterion(cls_loss=LOSSES["ghm_c"].build(K))
    apply(ghm, *case)
    before = ghm.cls_loss.density.clone()
    for module in (ghm, criterion()):
        result = module.load_state_dict(saved)  # of another loss
        assert not result.missing_keys and not result.unexpected_keys
    assert before[0] > 0 and torch.equal(ghm.cls_loss.density, before)
