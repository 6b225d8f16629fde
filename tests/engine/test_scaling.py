"""One key scales a schedule to another batch, once."""

from itertools import pairwise

import pytest
from detectron2.config import get_cfg
from hypothesis import given
from hypothesis import strategies as st

from retinanet_ext import add_retinanet_ext_config
from retinanet_ext.engine.scaling import scale_schedule
from retinanet_ext.errors import InputError


def make_cfg(**solver):
    cfg = get_cfg()
    add_retinanet_ext_config(cfg)
    for key, value in solver.items():
        cfg.SOLVER[key] = value
    return cfg


def test_the_papers_schedule_on_one_gpu():
    """16 images to 2: an eighth of the rate, eight times as long."""
    cfg = make_cfg(
        REFERENCE_BATCH=16,
        IMS_PER_BATCH=2,
        BASE_LR=0.01,
        WARMUP_ITERS=500,
        STEPS=(60000, 80000),
        MAX_ITER=90000,
        CHECKPOINT_PERIOD=5000,
    )
    assert scale_schedule(cfg) == [
        "SOLVER.BASE_LR: 0.01 -> 0.00125",
        "SOLVER.WARMUP_ITERS: 500 -> 4000",
        "SOLVER.STEPS: (60000, 80000) -> (480000, 640000)",
        "SOLVER.MAX_ITER: 90000 -> 720000",
        "SOLVER.CHECKPOINT_PERIOD: 5000 -> 40000",
        "SOLVER.REFERENCE_BATCH: 16 -> 2",
    ]
    assert cfg.SOLVER.MAX_ITER == 720000
    assert cfg.TEST.EVAL_PERIOD == 0, "off stays off"


def test_adamws_rate_scales_with_the_square_root():
    cfg = make_cfg(OPTIMIZER="AdamW", REFERENCE_BATCH=16, IMS_PER_BATCH=4, BASE_LR=0.001)
    scale_schedule(cfg)
    assert pytest.approx(0.0005) == cfg.SOLVER.BASE_LR
    assert cfg.SOLVER.MAX_ITER == 160000


def test_a_saved_config_is_not_scaled_again(tmp_path):
    cfg = make_cfg(REFERENCE_BATCH=16, IMS_PER_BATCH=6)
    assert scale_schedule(cfg)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    saved = make_cfg()
    saved.merge_from_file(str(tmp_path / "config.yaml"))
    assert saved.SOLVER == cfg.SOLVER
    assert scale_schedule(saved) == []
    assert saved.SOLVER == cfg.SOLVER
    assert scale_schedule(make_cfg(IMS_PER_BATCH=2)) == [], "off by default"


def test_two_ways_of_scaling_are_refused():
    with pytest.raises(InputError, match=r"REFERENCE_BATCH 16 and SOLVER\.REFERENCE_WORLD_SIZE 8"):
        scale_schedule(make_cfg(REFERENCE_BATCH=16, REFERENCE_WORLD_SIZE=8))


@given(
    reference=st.integers(1, 65536),
    batch=st.integers(1, 65536),
    steps=st.sets(st.integers(1, 10**9), max_size=8),
    max_iter=st.integers(1, 10**9),
)
def test_any_schedule_stays_one(reference, batch, steps, max_iter):
    cfg = make_cfg(
        REFERENCE_BATCH=reference,
        IMS_PER_BATCH=batch,
        STEPS=tuple(sorted(steps)),
        MAX_ITER=max_iter,
        CHECKPOINT_PERIOD=1,
    )
    rate = cfg.SOLVER.BASE_LR
    scale_schedule(cfg)
    solver = cfg.SOLVER
    assert solver.BASE_LR / batch == pytest.approx(rate / reference)
    # As many images are seen, to half a batch; and at least one batch.
    seen = solver.MAX_ITER * batch - max_iter * reference
    assert abs(seen) <= batch / 2 or solver.MAX_ITER == 1
    assert min(solver.MAX_ITER, solver.CHECKPOINT_PERIOD, *solver.STEPS, 1) == 1
    assert all(first < second for first, second in pairwise(solver.STEPS))
    assert len(solver.STEPS) == len(steps)
    assert {type(n) for n in (*solver.STEPS, solver.MAX_ITER, solver.WARMUP_ITERS)} == {int}
