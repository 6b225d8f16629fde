"""Steps of two processes that share batches: ``two_processes.py FOLDER`` leaves their weights."""

import sys
from itertools import product
from pathlib import Path

import torch
from detectron2.engine import create_ddp_model, launch
from detectron2.utils import comm
from test_train_step import EMPTY_SHARE, make_trainer, normalized_by, run, weights

from retinanet_ext.modeling.criterion import NORMALIZERS


def train(folder: Path) -> None:
    """Train with this process's half of each batch, whole and as two micro-batches."""
    torch.set_num_threads(1)
    half = slice(2) if comm.get_rank() == 0 else slice(2, 4)
    batches = [batch[half] for batch in EMPTY_SHARE]
    for normalizer, count in [*product(NORMALIZERS, [1]), (NORMALIZERS[0], 2)]:
        opts = (*normalized_by(normalizer), "SOLVER.GRAD_ACCUM_STEPS", count)
        trainer = make_trainer(*opts, batches=batches)
        trainer.model = create_ddp_model(
            trainer.model, device_ids=None, gradient_as_bucket_view=True
        )
        run(trainer)
        torch.save(weights(trainer), folder / f"{normalizer}-{count}-{comm.get_rank()}.pth")


if __name__ == "__main__":
    launch(train, 2, dist_url="auto", args=(Path(sys.argv[1]),))
