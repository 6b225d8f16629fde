"""The adviser: its measurements are those of the documents, and it says where it has none."""

import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml

from retinanet_ext.cli import main
from retinanet_ext.config_keys import read_key
from retinanet_ext.data import prepare_datasets
from retinanet_ext.engine import load_config
from retinanet_ext.engine.config_warnings import ineffective_keys
from retinanet_ext.engine.loss_film import describe_cls_loss
from retinanet_ext.engine.trainer import Trainer
from retinanet_ext.errors import InputError
from retinanet_ext.experiments import advice, measured_losses
from retinanet_ext.experiments.measured_losses import (
    CANDIDATES,
    DEFAULT,
    Advice,
    Setting,
    Situation,
    advised_keys,
    leave_one_out,
    one_loss_everywhere,
    read_measurements,
    recommend,
)
from retinanet_ext.experiments.tables import TABLES
from retinanet_ext.modeling.matching import label_anchors

ROOT = Path(__file__).parents[2]
SETTINGS, LOSSES = read_measurements()
HERE = Situation(100, 1400, 200, "SGD", "random")

pytestmark = pytest.mark.usefixtures("restore_logging")


def make_setting(name, rows, **situation):
    return Setting(name, "here", replace(HERE, **situation), rows)


OF_A_SETTING = ("DATASETS", "DATALOADER", "INPUT", "MODEL.TIMM", "MODEL.ANCHOR_GENERATOR.BASE")
"""Keys of a table's row that are not about its loss."""


def model_with(keys):
    """The config of a model with these keys, as text."""
    pairs = [pair for pair in sorted(keys.items()) if not pair[0].startswith(OF_A_SETTING)]
    return load_model(tuple(str(part) for pair in pairs for part in pair))


@cache
def load_model(opts):
    return load_config("configs/small_R18_FPN.yaml", opts).MODEL.dump()


def recorded(setting):
    """AP of each seed of the recorded runs of a setting, by their model."""
    content = yaml.safe_load(Path(measured_losses.__file__).with_suffix(".yaml").read_text())
    campaign, ending = next(e["runs"] for e in content["settings"] if e["name"] == setting.name)
    found = {}
    for run in json.loads((ROOT / setting.source).read_text()):
        table, row = run["rows"][0].split("/")
        is_here = run["campaign"] == campaign and row.endswith(ending)
        if is_here and 4 * run["iterations"] == setting.situation.images_seen:
            found.setdefault((table, row), []).append(round(run["AP"], 1))
    return {model_with(TABLES[table][row].overrides): aps for (table, row), aps in found.items()}


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_measurements_are_those_of_their_source(setting):
    assert DEFAULT in setting.rows and set(setting.rows) <= set(LOSSES)
    if setting.source.endswith(".json"):
        runs = recorded(setting)
        for row, aps in setting.rows.items():
            assert runs[model_with(LOSSES[row])] == list(aps), row
        return
    if setting.source.startswith("arXiv"):
        rows = [row for name in ("1a", "1b") for row in TABLES[name].rows]
        known = [f"{row.paper['AP']:.1f}" for row in rows]
    else:
        known = re.findall(r"\d\d\.\d(?:, \d\d\.\d)*", (ROOT / setting.source).read_text())
    for row, aps in setting.rows.items():
        assert ", ".join(f"{ap:.1f}" for ap in aps) in known, row


def config_with(keys):
    return load_config(
        "configs/small_R18_FPN.yaml", [str(p) for pair in keys.items() for p in pair]
    )


def test_keys_of_a_row_make_its_loss():
    for row, keys in LOSSES.items():
        cfg = config_with(keys)
        node = cfg.MODEL.RETINANET
        loss, *values = describe_cls_loss(cfg).split(", ")
        assert row.startswith(("OHEM", loss.replace("cross_", "cross "))), row
        assert ("ohem" in values) == row.startswith("OHEM")
        assert row.endswith("weight auto") == (node.CLS_LOSS.WEIGHT == "auto")
        for name, value in re.findall(r"(gamma|beta|(?<!class )alpha) ([.\d]+)", row):
            assert f"{name} {float(value):g}" in values or node.CLS_LOSS.CLASS_ALPHA, row


def test_keys_of_a_row_undo_those_of_every_other():
    """They are pasted behind the options of a training, whatever its loss was."""
    defaults = config_with({})
    others = [pair for keys in LOSSES.values() for pair in keys.items()]
    others = {key: value for key, value in others if read_key(defaults, key) != value}
    for row, keys in LOSSES.items():
        pasted, alone = config_with({**others, **advised_keys(row, "selected")}), config_with(keys)
        left = [key for key in others if read_key(pasted, key) != read_key(alone, key)]
        unread = [line.split()[0] for line in ineffective_keys(pasted)]
        assert set(left) <= set(unread), row


def test_the_advice_leaves_the_normaliser_of_a_recipe():
    key = "MODEL.RETINANET.LOSS_NORMALIZER"
    assert key not in advised_keys(DEFAULT, "foreground")  # the paper's
    assert advised_keys(DEFAULT, "selected")[key] == "foreground_ema"
    assert advised_keys("OHEM, batch 128, nms .5", "foreground")[key] == "selected"


def test_the_nearest_setting_advises_and_the_default_stays_within_the_margin():
    near = make_setting("near", {DEFAULT: (30.0,), "other": (30.9,)}, imbalance=120)
    far = make_setting("far", {DEFAULT: (30.0,), "other": (50.0,)}, imbalance=400)
    assert recommend(HERE, [near, far]).row == DEFAULT
    near = replace(near, rows={DEFAULT: (30.0,), "other": (31.1, 31.3)})
    found = recommend(HERE, [near, far])
    assert found.row == "other" and found.setting is near and len(found.remarks) == 1
    assert "imbalance 1 : 100, and not 120 to 400" in found.remarks[0]
    unlearnt = make_setting("unlearnt", {DEFAULT: (0.0,), "third": (4.0,)})
    assert recommend(HERE, [near, far, unlearnt]).setting is near


def test_what_was_not_measured_is_said():
    settings = [make_setting("a", {DEFAULT: (30.0,)}), make_setting("b", {DEFAULT: (30.0,)})]
    for change, remark in (
        ({"optimizer": "AdamW"}, "No loss was compared with AdamW"),
        ({"weights": "pretrained"}, "No losses were compared with SGD from pretrained weights"),
        ({"images_seen": 14000}, "Beyond what was measured: 14000 images, and not 1400. "),
    ):
        (said,) = recommend(replace(HERE, **change), settings).remarks
        assert said.startswith(remark)
    assert recommend(replace(HERE, imbalance=105), settings).remarks == ()


def test_regret_is_against_the_best_row_of_the_setting_left_out():
    settings = [
        make_setting("a", {DEFAULT: (20.0,), "x": (30.0,), "y": (40.0,)}),
        make_setting("b", {DEFAULT: (20.0,), "x": (30.0,), "z": (50.0,)}, imbalance=200),
    ]
    a, b = leave_one_out(settings)
    assert (a.advice.row, a.best, a.ap, a.default) == ("x", "y", 10, 20)
    assert (b.advice.row, b.best, b.ap, b.default) == ("x", "z", 20, 30)
    regrets = leave_one_out(SETTINGS)
    assert 0 <= sum(r.ap for r in regrets) < sum(r.default for r in regrets)


def test_one_loss_everywhere_is_measured_on_the_settings_that_have_all():
    _, auto, ce = CANDIDATES
    settings = [
        make_setting("a", {DEFAULT: (20.0,), auto: (29.0,), ce: (30.0,)}),
        make_setting("b", {DEFAULT: (40.0,), auto: (38.0,), ce: (30.0,), "x": (41.0,)}),
        make_setting("without auto", {DEFAULT: (20.0,), ce: (50.0,)}),
        make_setting("nothing learnt", {DEFAULT: (1.0,), auto: (2.0,), ce: (0.0,)}),
    ]
    assert one_loss_everywhere(settings) == {
        DEFAULT: {"a": 10.0, "b": 1.0},
        auto: {"a": 1.0, "b": 3.0},
        ce: {"a": 0.0, "b": 11.0},
    }
    assert one_loss_everywhere(settings[2:]) == {}

    def describe_safest(row, settings):
        advised = Advice(row, settings[0], ())
        return advice._describe_safest(advised, HERE, settings)

    said = describe_safest(ce, settings)
    assert "The safest: focal, gamma 2, alpha .25, weight auto. On 2 of the 3" in said
    assert "2.0 AP behind the best loss in the mean and 3.0 at most; the default 5.5" in said
    assert said.endswith("In the nearest measurement it is 1.0 AP behind the advice.")
    assert describe_safest(auto, settings) == ""  # it is advised already
    assert describe_safest(ce, settings[1:]) == ""  # the default is as good


def test_a_lead_comes_with_what_the_seeds_say_of_it():
    rows = {DEFAULT: (20.0, 22.0), "x": (30.0, 31.0), "y": (24.0, 40.0), "z": (31.0,)}
    setting = make_setting("a", rows)
    for row, said in (
        ("x", "9.5 AP ahead of the default, focal, gamma 2, alpha .25, measured at imbalance 1 : "),
        ("x", "(95 % interval +2.6 to +16.4, which decides it)."),
        ("y", "which does not decide it)."),
        ("z", "(one seed, which decides nothing)."),
    ):
        assert said in advice._reason(row, setting)


def make_opts(tmp_path, *opts):
    return [*map(str, opts), "MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path)]


def test_anchors_are_those_that_the_model_labels(tmp_path):
    opts = make_opts(tmp_path, "INPUT.RANDOM_FLIP", "none", "INPUT.MIN_SIZE_TRAIN", "[96]")
    cfg = load_config("tests/engine/tiny.yaml", opts)
    facts, situation = advice.examine(cfg)
    assert facts.images == situation.train_images and situation.images_seen == 6
    prepare_datasets(cfg, eval_only=False)
    model = Trainer.build_model(cfg)
    loader = Trainer.build_train_loader(cfg)
    images = {}
    for batch, _ in zip(loader, range(9), strict=False):
        images |= {inputs["file_name"]: inputs for inputs in batch}
    assert len(images) == facts.images
    counts = torch.zeros(2)
    for inputs in images.values():
        features = model.backbone(model.preprocess_image([inputs]).tensor)
        anchors = model.anchor_generator([features[name] for name in model.head_in_features])
        labels, _ = label_anchors(
            model.anchor_matcher, type(anchors[0]).cat(anchors), [inputs["instances"]], 3
        )
        counts += torch.stack([((labels >= 0) & (labels < 3)).sum(), (labels == 3).sum()])
    assert facts.foreground == pytest.approx(counts[0].item() / len(images))
    assert facts.background == pytest.approx(counts[1].item() / len(images))


def test_the_command_says_what_it_rests_on(tmp_path, capsys):
    config = ["--config-file", "tests/engine/tiny.yaml"]
    assert main(["advise", *config, *make_opts(tmp_path, "SOLVER.OPTIMIZER", "AdamW")]) == 0
    said = capsys.readouterr().out
    assert "Data: 3 training images, " in said
    assert "Beyond what was measured: 6 images, and not 960 to 3600" in said
    assert f"Advice: {DEFAULT}" in said and "docs/results/recipe.md" in said
    assert "MODEL.RETINANET.FOCAL_LOSS_GAMMA 2.0 \\\n" in said
    assert "does not decide" in said  # class alpha
    assert main(["advise", "--regret"]) == 0
    assert "COCO 600, published" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["advise"])
    assert "give --config-file or --run, or --regret alone" in capsys.readouterr().err


def test_a_film_of_other_classes_is_refused(tmp_path, monkeypatch):
    film = type("Film", (), {"classes": {"cat": {}, "dog": {}}})
    monkeypatch.setattr(advice, "read_film", lambda run: film)
    cfg = load_config("tests/engine/tiny.yaml", make_opts(tmp_path))
    with pytest.raises(InputError, match=r"loss_film.json is the film of another run: .*cat, dog"):
        advice.advise(cfg, tmp_path)
