"""Steps of two processes that share batches: ``two_processes.py FOLDER DEVICE`` saves weights.

They communicate by gloo and share the device, where NCCL needs a GPU for each.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from detectron2.engine import create_ddp_model
from detectron2.utils import comm
from test_train_step import CASES, EMPTY_SHARE, make_trainer, normalized_by, run, weights


def train(rank: int, folder: Path, device: str) -> None:
    """Train with this process's half of each batch, whole and as two micro-batches."""
    torch.set_num_threads(1)
    meeting = f"file://{folder.resolve()}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    comm.create_local_process_group(2)
    half = slice(2) if rank == 0 else slice(2, 4)
    batches = [batch[half] for batch in EMPTY_SHARE]
    for normalizer, count, loss in CASES:
        opts = (*normalized_by(normalizer), "SOLVER.GRAD_ACCUM_STEPS", count)
        opts += ("MODEL.DEVICE", device, "MODEL.RETINANET.CLS_LOSS.NAME", loss)
        trainer = make_trainer(*opts, batches=batches)
        trainer.model = create_ddp_model(
            trainer.model, device_ids=None, gradient_as_bucket_view=True
        )
        run(trainer)
        torch.save(weights(trainer), folder / f"{normalizer}-{rank}.pth")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(train, (Path(sys.argv[1]), sys.argv[2]), nprocs=2)
