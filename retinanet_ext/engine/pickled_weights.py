"""Weights in ``.pkl`` files, read without running code."""

from __future__ import annotations

import pickle
from typing import Any

from detectron2.utils.file_io import PathManager


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
    """Read ``.pkl`` weights as Detectron2 does, without running code."""
    with PathManager.open(filename, "rb") as file:
        data = _ArrayUnpickler(file, encoding="latin1").load()
    if "model" in data and "__author__" in data:
        return data
    blobs = data.get("blobs", data)
    weights = {name: blob for name, blob in blobs.items() if not name.endswith("_momentum")}
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}
