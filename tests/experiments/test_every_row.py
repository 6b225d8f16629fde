"""Every kind of row of the small preset trains and evaluates for a step, on the sample set."""

import math
from pathlib import Path

import pytest
import torch
from detectron2.utils.events import EventStorage

from retinanet_ext.data import prepare_datasets
from retinanet_ext.engine import Trainer
from retinanet_ext.experiments.presets import PRESETS, find_rows, row_config
from retinanet_ext.experiments.tables import TABLES

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = PRESETS["small"]


def kind(row):
    """Return what a row changes, without its values but for names."""
    changed = {**row.overrides, **row.preset_overrides.get("small", {})}
    return str({key: value if isinstance(value, str) else "" for key, value in changed.items()})


# Of rows of a kind the last is trained.
ROWS = {
    kind(row): (f"{table.name}/{row.name}", row)
    for table, row in find_rows((), (), SMALL)
    if not row.factors
}
for table, name in (
    ("1c", "scales1-aspects1"),
    ("budget", "matched-1x"),
    ("init", "focal.25-random"),
    ("dial", "ce-foreground-1:100"),
):
    ROWS[f"{table}/{name}"] = (f"{table}/{name}", TABLES[table][name])
# Small enough for a test; everything that makes a row what it is stays.
OPTS = [
    *("MODEL.DEVICE", "cpu", "SOLVER.IMS_PER_BATCH", "1", "MODEL.FPN.OUT_CHANNELS", "64"),
    *("INPUT.MIN_SIZE_TRAIN", "(96,)", "INPUT.MIN_SIZE_TEST", "96"),
    *("DATASETS.SAMPLE.NUM_TRAIN", "4", "DATASETS.SAMPLE.NUM_VAL", "1"),
]
# What each loss starts at is far from equal; none may be infinite, rows that may diverge included:
# those diverge later if they do.


@pytest.fixture(scope="module", autouse=True)
def datasets(tmp_path_factory):
    """A folder for the sample sets, drawn once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(tmp_path_factory.mktemp("datasets")))
        yield


@pytest.mark.parametrize(("name", "row"), ROWS.values(), ids=[name for name, _ in ROWS.values()])
def test_one_training_and_one_evaluation_step(name, row, tmp_path):
    opts = [*OPTS, "OUTPUT_DIR", str(tmp_path)]
    cfg = row_config(SMALL, row, 1, opts, CONFIGS)
    if name.startswith("dial"):
        cfg.DATASETS.SAMPLE.NUM_TRAIN, cfg.DATASETS.SAMPLE.NUM_VAL = 4, 1
        cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (96,), 96  # the dial's own are larger
    prepare_datasets(cfg, eval_only=False)
    cfg.SOLVER.BASE_LR = 1e-3  # the first step is taken at a warm-up's rate
    torch.manual_seed(1)
    trainer = Trainer(cfg)
    before = {k: v.clone() for k, v in trainer.model.head.named_parameters()}
    with EventStorage() as storage:
        trainer.iter = 0
        trainer.run_step()
        loss = storage.latest()["total_loss"][0]
    assert math.isfinite(loss) and loss > 0
    after = dict(trainer.model.head.named_parameters())
    assert all(value.isfinite().all() for value in after.values())
    assert any(not torch.equal(before[k], after[k]) for k in before)

    # An untrained detector gives nothing above .05; without the threshold it gives boxes.
    model = trainer.model.eval()
    model.test_score_thresh = 0.0
    batch = next(iter(Trainer.build_test_loader(cfg, cfg.DATASETS.TEST[0])))
    with torch.no_grad():
        (output,) = model(batch)
    instances = output["instances"]
    assert 0 < len(instances) <= cfg.TEST.DETECTIONS_PER_IMAGE
    assert instances.pred_boxes.tensor.isfinite().all() and instances.scores.isfinite().all()
