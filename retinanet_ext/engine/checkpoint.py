"""Loading weights: what does not fit is refused instead of skipped."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import convert_c2_detectron_names
from detectron2.utils.file_io import PathManager
from torch import nn

from retinanet_ext.engine.failures import first_line
from retinanet_ext.errors import InputError
from retinanet_ext.modeling import to_detectron2_state_dict

# Name, shape in the checkpoint, shape in the model.
Mismatch = tuple[str, tuple[int, ...], tuple[int, ...]]

logger = logging.getLogger(__name__)


class Checkpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, except that weights which do not fit are an :class:`InputError`.

    Detectron2 skips tensors of another shape with a warning and goes on with random ones.
    No file runs code: ``.pth`` is read with ``weights_only=True``, torch's default, and ``.pkl``
    for arrays alone.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        reinit_mismatched: bool = False,
        complete: bool = False,
        **checkpointables: Any,
    ) -> None:
        """
        Args:
            model: the model to load into and to save
            save_dir: folder of the run's checkpoints
            reinit_mismatched: leave layers of another shape as they are initialised; not when
                resuming, where the optimizer's state would not fit either
            complete: the weights must fill the whole model and all belong to it, as evaluation
                needs; training starts what is missing anew, as with a backbone alone
            checkpointables: as in Detectron2
        """
        super().__init__(model, save_dir, **checkpointables)
        self.reinit_mismatched = reinit_mismatched
        self.complete = complete

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load the weights and the named ``checkpointables``, all of them by default.

        Raises:
            InputError: the file is missing or unreadable, or does not fit the model
        """
        self._path = path
        self._resuming = checkpointables is None and bool(self.checkpointables)
        try:
            return super().load(path, checkpointables)
        except InputError:
            raise
        except OSError as error:
            raise InputError(f"weights {path} cannot be read: {first_line(error)}") from error
        except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
            hint = "; resuming needs the config the run was started with" if self._resuming else ""
            raise InputError(f"weights {path} do not load: {first_line(error)}{hint}") from error
        finally:
            self._parsed_url_during_load = None

    def _load_file(self, filename: str) -> dict[str, Any]:
        try:
            if filename.endswith(".pkl"):
                content = _read_pickle(filename)
            else:
                content = super()._load_file(filename)
        except OSError:
            raise
        except Exception as error:  # pickle's documentation: a damaged file may raise anything
            raise InputError(
                f"weights {self._path} are damaged, or hold Python objects other than tensors, "
                f"which are refused ({type(error).__name__})"
            ) from error
        if not isinstance(content.get("model"), dict):
            raise InputError(f"weights {self._path} are not a dict of tensors by name")
        return content

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        mismatches = self._skipped_by_heuristics(checkpoint)
        incompatible = super()._load_model(checkpoint)
        mismatches += incompatible.incorrect_shapes
        incompatible.incorrect_shapes.clear()
        missing = incompatible.missing_keys
        if mismatches:
            self._refuse_or_reinit(mismatches)
            missing[:] = sorted(set(missing) - {name for name, *_ in mismatches})
        skipped = {*missing, *(name for name, *_ in mismatches)}
        if skipped.issuperset(name for name, _ in self.model.named_parameters()):
            raise InputError(f"weights {self._path} hold no tensor of this model")
        if self.complete:
            self._check_complete(sorted(skipped), incompatible.unexpected_keys)
        return incompatible

    def _skipped_by_heuristics(self, checkpoint: dict[str, Any]) -> list[Mismatch]:
        """Return what Detectron2's matching by the end of names would skip for its shape."""
        if not checkpoint.get("matching_heuristics"):
            return []
        if checkpoint.get("__author__") == "Caffe2":
            self._convert_ndarray_to_tensor(checkpoint["model"])
            checkpoint["model"], _ = convert_c2_detectron_names(checkpoint["model"])
            checkpoint["__author__"] = "Caffe2, names converted"
        weights = checkpoint["model"]
        mismatches = []
        for name, tensor in self.model.state_dict().items():
            matches = [key for key in weights if f".{name}".endswith(f".{key}")]
            if matches:
                shape = tuple(weights[max(matches, key=len)].shape)
                if shape != tuple(tensor.shape):
                    mismatches.append((name, shape, tuple(tensor.shape)))
        return mismatches

    def _refuse_or_reinit(self, mismatches: list[Mismatch]) -> None:
        texts = [f"{name} is {given}, the model's {own}" for name, given, own in mismatches]
        if self.reinit_mismatched and not self._resuming:
            logger.warning(
                "Other shapes in %s, so these layers start anew: %s", self._path, "; ".join(texts)
            )
            return
        more = f" (and {len(texts) - 1} more)" if len(texts) > 1 else ""
        if self._resuming:
            remedy = "resume with the config the run was started with"
        elif self.complete:
            remedy = "evaluate with the config they were trained with"
        else:
            remedy = "MODEL.RETINANET.REINIT_MISMATCHED True starts such layers anew"
        raise InputError(f"weights {self._path} have other shapes: {texts[0]}{more}; {remedy}")

    def _check_complete(self, missing: list[str], unexpected: list[str]) -> None:
        if missing:
            raise InputError(
                f"weights {self._path} lack {len(missing)} tensors of this model, "
                f"such as {missing[0]}: nothing is evaluated with random layers"
            )
        # Buffers of old files (pixel_mean, pixel_std) are no sign of another architecture.
        layers = dict(self.model.named_children())
        foreign = sorted(name for name in unexpected if name.split(".")[0] in layers)
        if foreign:
            raise InputError(
                f"weights {self._path} hold {len(foreign)} tensors this model has no place for, "
                f"such as {foreign[0]}: they are another architecture's"
            )


class _ArrayUnpickler(pickle.Unpickler):
    """Reads arrays, numbers, text and their containers; a pickle that names more is refused."""

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


def _read_pickle(filename: str) -> dict[str, Any]:
    """Read Detectron2's and Detectron's ``.pkl`` weights as Detectron2 does, but run no code."""
    with PathManager.open(filename, "rb") as file:
        data = _ArrayUnpickler(file, encoding="latin1").load()
    if "model" in data and "__author__" in data:
        return data
    blobs = data.get("blobs", data)
    weights = {name: blob for name, blob in blobs.items() if not name.endswith("_momentum")}
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}


def export_weights(checkpoint: str | Path, output: str | Path) -> None:
    """Write the weights of a checkpoint under the names of Detectron2's ``RetinaNet``.

    The file holds them under "model", as Detectron2's checkpoints do, and nothing else.

    Raises:
        InputError: the checkpoint cannot be read, or the output exists
    """
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
        weights = to_detectron2_state_dict(content.get("model", content))
    except Exception as error:  # pickle's documentation: a damaged file may raise anything
        raise InputError(
            f"{checkpoint} is missing, damaged or no checkpoint ({type(error).__name__})"
        ) from error
    try:
        with open(output, "xb") as file:
            torch.save({"model": weights}, file)
    except FileExistsError:
        raise InputError(f"{output} exists; choose another name") from None
    except OSError as error:
        raise InputError(f"{output} cannot be written: {error.strerror}") from error
