"""The film of figure 4: exact, harmless to the training, and never that of another run."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchvision.ops import sigmoid_focal_loss

import stress_kills
from retinanet_ext.analysis.film import GROUPS
from retinanet_ext.engine.loss_film import LOSS_FILM, LossFilm, read_film
from retinanet_ext.errors import InputError
from training import cut_off, make_trainer

PERIOD = ("SOLVER.LOSS_FILM_PERIOD", 2)
OHEM = ("MODEL.RETINANET.SELECTION.NAME", "ohem", "MODEL.RETINANET.SELECTION.OHEM.BATCH_SIZE", 16)

pytestmark = pytest.mark.usefixtures("restore_logging")


def read_lines(folder):
    return [json.loads(line) for line in (folder / LOSS_FILM).read_text().splitlines()]


@pytest.mark.parametrize(
    "opts",
    [
        ("SOLVER.GRAD_ACCUM_STEPS", 2, "MODEL.RETINANET.LOSS_NORMALIZER", "foreground"),
        (*OHEM, "SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "bfloat16"),
    ],
    ids=["accumulated", "OHEM in bfloat16"],
)
def test_training_is_that_without_the_film(opts, tmp_path):
    opts = (*opts, "SOLVER.MAX_ITER", 4)
    make_trainer(tmp_path / "without", *opts).train()
    make_trainer(tmp_path / "with", *opts, *PERIOD).train()
    files = [tmp_path / name / "model_final.pth" for name in ("without", "with")]
    assert stress_kills.differences(*files) == []
    records = read_lines(tmp_path / "with")
    assert [record["iteration"] for record in records] == [0, 2]
    for record in records:
        for quantity in ("loss", "gradient"):
            whole = np.array(record[quantity])
            assert whole.sum() == pytest.approx(1, abs=1e-4) and (whole >= 0).all()
            for parts in (record["levels"], record["classes"]):
                summed = np.sum([part[quantity] for part in parts.values()], axis=0)
                np.testing.assert_allclose(summed, whole, atol=1e-4)


@pytest.mark.parametrize("normalizer", ["foreground_ema", "foreground"])
@pytest.mark.parametrize("opts", [(), OHEM], ids=["all", "OHEM"])
def test_sums_are_those_of_torchvision_and_of_the_training_step(normalizer, opts, tmp_path):
    opts = (*opts, "MODEL.RETINANET.LOSS_NORMALIZER", normalizer)
    trainer = make_trainer(tmp_path, *opts, *PERIOD, "MODEL.RETINANET.CLS_LOSS.WEIGHT", 3.0)
    model, criterion = trainer.model, trainer.model.criterion
    with torch.no_grad():
        model.head.cls_score.bias.add_(2.4)  # to a probability of about .1
    film = LossFilm(model, ["a", "b", "c"])
    film.trainer = SimpleNamespace(cfg=trainer.cfg, iter=0)
    seen = {}
    model.head.register_forward_hook(lambda module, args, output: seen.update(logits=output[0]))
    criterion.register_forward_pre_hook(lambda module, args: seen.update(labels=args[3]))
    film.before_step()
    losses = model(next(iter(trainer.data_loader)))
    for logits in seen["logits"]:
        logits.retain_grad()
    losses["loss_cls"].backward()

    labels = seen["labels"]
    num_foreground = ((labels >= 0) & (labels < 3)).sum(1)
    # Of one batch: the normaliser after it, and the mean over two images.
    divisor = 2 if normalizer == "foreground" else criterion.loss_normalizer.item()
    assert (film._sums.sum((0, 3)) > 0).all()  # each group has some
    total = film._sums[:, 0].sum().item() * 3 / divisor
    assert total == pytest.approx(losses["loss_cls"].item(), rel=1e-5)

    image_weights = 1 / num_foreground.clamp(1) if normalizer == "foreground" else torch.ones(2)
    first = 0
    for level, head_logits in enumerate(seen["logits"]):
        logits, gradient = (
            t.unflatten(1, (-1, 3)).permute(0, 3, 4, 1, 2).flatten(1, 3)
            for t in (head_logits.detach(), head_logits.grad)
        )
        label = labels[:, first : first + logits.shape[1]]
        first += logits.shape[1]
        positive = torch.nn.functional.one_hot(label.clamp(0), 4)[..., :3].bool()
        positive &= (label >= 0)[..., None]
        loss = sigmoid_focal_loss(logits, positive.float(), alpha=0.25, gamma=2)
        loss *= image_weights.view(2, 1, 1) * (label >= 0)[..., None]
        if opts[:1] == OHEM[:1]:
            loss *= (gradient != 0).any(2, keepdim=True)
        hard = (logits.sigmoid() > 0.1) & ~positive
        for group, mask in enumerate((positive, hard, ~positive & ~hard)):
            for quantity, values in enumerate((loss, gradient.abs())):
                expected = (values * mask).sum((0, 1), dtype=torch.float64)
                found = film._sums[level, quantity, group]
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)


def test_a_resumed_film_goes_on_exactly(tmp_path):
    make_trainer(tmp_path / "whole", *PERIOD).train()
    cut_off(make_trainer(tmp_path / "parts", *PERIOD), 7)  # saved after 4
    film = tmp_path / "parts" / LOSS_FILM
    with open(film, "a") as file:
        file.write('{"iteration": 8, "se')  # a kill in the middle of a line
    make_trainer(tmp_path / "parts", *PERIOD, resume=True).train()
    assert film.read_text() == (tmp_path / "whole" / LOSS_FILM).read_text()
    aside = (tmp_path / "parts/loss_film_superseded.json").read_text().splitlines()
    assert [line[:15] for line in aside] == ['{"iteration": 6', '{"iteration": 8']


def test_a_film_of_another_run_is_refused(tmp_path):
    folder = tmp_path / "run"
    trainer = make_trainer(folder, *PERIOD)
    cut_off(trainer, 6)
    (folder / "config.yaml").write_text(trainer.cfg.dump())
    film = read_film(folder)
    assert film.cls_loss == "focal, gamma 2, alpha 0.25" and film.num_iterations == 8
    assert film.iterations.tolist() == [0, 2, 4] and film.shares["loss"].shape == (3, len(GROUPS))
    assert list(film.levels) == ["p3", "p4", "p5", "p6", "p7"]

    other = ("MODEL.RETINANET.FOCAL_LOSS_GAMMA", 1.0)
    message = r"line 1: is the film of another run: cls_loss is focal, gamma 2.* and focal, gamma 1"
    with pytest.raises(InputError, match=message):
        make_trainer(folder, *PERIOD, *other, resume=True).train()
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("SEED: 1\n", "SEED: 2\n"))
    with pytest.raises(InputError, match=r"of another run: seed is 1, and 2 in this run"):
        read_film(folder)
    (folder / "config.yaml").write_text(text.replace("NUM_CLASSES: 3", "NUM_CLASSES: 4"))
    with pytest.raises(InputError, match=r"of another run: it has 3 classes .* config.yaml 4"):
        read_film(folder)
    (folder / LOSS_FILM).write_text("[1]\n")
    (folder / "config.yaml").write_text(text)
    with pytest.raises(InputError, match=r"loss_film.json, line 1: is not a record of a film"):
        read_film(folder)
    (folder / LOSS_FILM).unlink()
    with pytest.raises(InputError, match=r"is not there; .*SOLVER.LOSS_FILM_PERIOD"):
        read_film(folder)
