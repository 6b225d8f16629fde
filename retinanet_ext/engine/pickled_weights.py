"""Weights in ``.pkl`` files, read without running code."""

from __future__ import annotations

import pickle
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.utils.file_io import PathManager

from retinanet_ext.engine.class_matching import CLASSIFIER


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickle arrays, numbers, text and their containers, and refuse everything else."""

    ALLOWED = frozenset(
        {
            ("collections", "OrderedDict"),
            ("_codecs", "encode"),  # how Python 2's bytes are written
            ("numpy", "dtype"),
            ("numpy", "ndarray"),
            *(
                (f"numpy.{core}.{module}", name)
                for core in ("core", "_core")  # before and since numpy 2
                for module, name in (
                    ("multiarray", "_reconstruct"),
                    ("multiarray", "scalar"),
                    ("numeric", "_frombuffer"),
                )
            ),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


def read_pickled_weights(filename: str) -> dict[str, Any]:
    """Read ``.pkl`` weights as Detectron2 does, without running code.

    The RetinaNets of Detectron2's model zoo get the names of COCO's classes, which their files do
    not hold.
    """
    with PathManager.open(filename, "rb") as file:
        data = _ArrayUnpickler(file, encoding="latin1").load()
    if "model" in data and "__author__" in data:
        if data["__author__"] == "Detectron2 Model Zoo" and CLASSIFIER[0] in data["model"]:
            return {**data, "class_names": MetadataCatalog.get("coco_2017_val").thing_classes}
        return data
    blobs = data.get("blobs", data)
    weights = {name: blob for name, blob in blobs.items() if not name.endswith("_momentum")}
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}
