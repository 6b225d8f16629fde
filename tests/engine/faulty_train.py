"""train_net.py, in which process 1 meets faults: ``faulty_train.py ITERATION:FAULT,... ARGUMENTS``.

Started processes import this file too, and so are given the faults.
"""

import itertools
import math
import sys

from detectron2.utils import comm

from retinanet_ext.engine import non_finite
from retinanet_ext.engine.train_step import AccumulatingTrainer
from training import run_train_net

PASS = non_finite.InstrumentedPass
FAULTS = dict(fault.split(":") for fault in sys.argv[1].split(","))
run_step = AccumulatingTrainer.run_step


def run_faulty_step(self: AccumulatingTrainer) -> None:
    """Plant the iteration's fault in this process's weights or in its next batch."""
    fault = FAULTS.get(str(self.iter)) if comm.get_rank() == 1 else None
    non_finite.InstrumentedPass = _NoRoom if fault == "unexplained" else PASS
    if fault == "weight":
        self.model.module.head.bbox_pred.weight.data[0, 0, 0, 0] = math.nan
    elif fault:
        batch = next(self._data_loader_iter)
        plant(fault, batch[1])
        self._data_loader_iter_obj = itertools.chain([batch], self._data_loader_iter)
    run_step(self)


class _NoRoom:
    def __init__(self, *args: object, **kwargs: object) -> None:
        raise MemoryError("no room")


def plant(fault: str, inputs: dict) -> None:
    """Put a fault into an image, as a mapper that checks nothing may."""
    if fault == "box":
        boxes = inputs["instances"].gt_boxes.tensor
        boxes[0, 2] = boxes[0, 0]
    else:
        inputs["image"] = inputs["image"] * math.nan


AccumulatingTrainer.run_step = run_faulty_step

if __name__ == "__main__":
    sys.exit(run_train_net(*sys.argv[2:]))
