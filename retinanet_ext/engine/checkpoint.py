"""Checkpoints: written whole or not at all, and loaded whole or not at all."""

from __future__ import annotations

import logging
import math
import pickle
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import convert_c2_detectron_names
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager
from torch import nn

from retinanet_ext.engine.class_matching import match_checkpoint, saved_class_names
from retinanet_ext.errors import InputError, first_line
from retinanet_ext.files import atomic_write, write_file
from retinanet_ext.modeling import to_detectron2_state_dict

TAG = "last_checkpoint"
"""The file of a run that names its newest checkpoint."""

CHECKPOINT = re.compile(r"model_(\d+|final)\.pth$")

# Name, shape in the checkpoint, shape in the model.
Mismatch = tuple[str, tuple[int, ...], tuple[int, ...]]

logger = logging.getLogger(__name__)


class Checkpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, except for the following.

    - Weights that do not fit are an :class:`InputError`. Detectron2 skips tensors of another shape
      with a warning and goes on with random ones.
    - Class names are saved. Outputs of the classifier are matched to the data's classes by name;
      weights of other classes are an :class:`InputError`.
    - No file runs code: ``.pth`` is read with ``weights_only=True`` and ``.pkl`` for arrays alone.
    - A checkpoint takes its name once it is whole, so none is lost to a kill or a full disk, and
      one that was damaged later is passed over for the one before.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        reinit_mismatched: bool = False,
        complete: bool = False,
        class_names: Sequence[str] = (),
        **checkpointables: Any,
    ) -> None:
        """
        Args:
            model: the model to load into and to save
            save_dir: folder of the run's checkpoints
            reinit_mismatched: leave layers of another shape, and the classifier's outputs of
                classes that the weights do not name, as they are initialised; not when resuming,
                where the optimizer's state would not fit either
            complete: the weights must fill the whole model and all belong to it, as evaluation
                needs; training starts what is missing anew, as with a backbone alone
            class_names: of the data's classes 0..K-1; empty: not known, so nothing is compared
            checkpointables: as in Detectron2
        """
        super().__init__(model, save_dir, **checkpointables)
        self.reinit_mismatched = reinit_mismatched
        self.complete = complete
        self.class_names = [str(name) for name in class_names]

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``<name>.pth`` whole or not at all, and then its name into ``last_checkpoint``.

        Raises:
            InputError: a full disk, a folder that cannot be written; earlier checkpoints are intact
        """
        if not self.save_dir or not self.save_to_disk:
            return
        states = {key: saved.state_dict() for key, saved in self.checkpointables.items()}
        content = {"model": self.model.state_dict(), **states, **kwargs}
        if self.class_names:
            content["class_names"] = self.class_names
        file = Path(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", file)
        # One name for all: what a killed process left there does not fill the disk.
        with atomic_write(file, part=file.with_name(".unfinished_checkpoint")) as part:
            torch.save(content, part)
        self.tag_last_checkpoint(file.name)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        write_file(Path(self.save_dir, TAG), last_filename_basename)

    def has_checkpoint(self) -> bool:
        return bool(self.get_checkpoint_file())

    def get_checkpoint_file(self) -> str:
        """Return what :func:`last_checkpoint` finds in the run's folder, empty if there is none."""
        return last_checkpoint(self.save_dir)[0]

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
                if zipfile.is_zipfile(filename) and (damage := _find_damage(filename)):
                    raise ValueError(damage)
                if filename.endswith(".pyth"):  # pycls's, whose names are matched by their ends
                    state = self._torch_load(filename)["model_state"].items()
                    weights = {k: v for k, v in state if not k.endswith("num_batches_tracked")}
                    return {"model": weights, "__author__": "pycls", "matching_heuristics": True}
                content = super()._load_file(filename)
        except OSError:
            raise
        except Exception as error:  # pickle's documentation: a damaged file may raise anything
            raise InputError(
                f"weights {self._path} are damaged, or hold Python objects other than tensors, "
                f"which are refused ({type(error).__name__})"
            ) from error
        if not isinstance(content.get("model"), dict) or not content["model"]:
            raise InputError(f"weights {self._path} are not a dict of tensors by name")
        if self._resuming and not self.checkpointables.keys() <= content.keys():
            raise InputError(
                f"weights {self._path} hold no state of a training to resume; name them in "
                "MODEL.WEIGHTS, without --resume, to start from them"
            )
        return content

    def _torch_load(self, f: str) -> dict[str, Any]:
        # Said, since an environment variable changes torch's default.
        return torch.load(f, map_location="cpu", weights_only=True)

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        self._match_classes(checkpoint)
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

    def _match_classes(self, checkpoint: dict[str, Any]) -> None:
        if self._resuming:
            remedy = "resume with the data the run was started with"
        elif self.complete:
            remedy = (
                "name the data's classes as those that the weights were trained on, or choose "
                "these with DATASETS.CUSTOM.CLASSES"
            )
        else:
            remedy = (
                "MODEL.RETINANET.REINIT_MISMATCHED True keeps the classifier's outputs of classes "
                "of the same name and starts the others anew"
            )
        reinit = self.reinit_mismatched and not (self._resuming or self.complete)
        source = f"weights {self._path}"
        match_checkpoint(
            checkpoint, self.class_names, self.model, source, reinit=reinit, remedy=remedy
        )

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


def find_weights(cfg: CfgNode, *, resume: bool, eval_only: bool) -> tuple[str, bool]:
    """Return what will be loaded, and whether that is the last checkpoint, as with ``resume``.

    Where there is none to resume from, and without ``resume``, it is MODEL.WEIGHTS.

    Raises:
        InputError: there are no weights to evaluate, no such file, or no checkpoint that is whole
    """
    weights, passed_over = last_checkpoint(cfg.OUTPUT_DIR) if resume else ("", [])
    if weights:
        if passed_over:
            logger.warning("%s; %s is used", "; ".join(passed_over), weights)
        return weights, True
    if resume and eval_only:
        raise InputError(
            f"--eval-only --resume evaluates the last checkpoint of OUTPUT_DIR {cfg.OUTPUT_DIR}, "
            "which holds none; leave --resume out to evaluate MODEL.WEIGHTS"
        )
    if resume:
        logger.warning(
            "Nothing to resume: %s holds no checkpoint. Training starts at iteration 0.",
            cfg.OUTPUT_DIR,
        )
    weights = cfg.MODEL.WEIGHTS
    if eval_only and not weights:
        raise InputError("--eval-only needs weights: MODEL.WEIGHTS FILE, or --resume for the last")
    # URLs are Detectron2's to resolve; "?matching_heuristics=True" may follow a name.
    if weights and "://" not in weights and not Path(weights.partition("?")[0]).is_file():
        raise InputError(f"MODEL.WEIGHTS is {weights}, which is not a file")
    return weights, False


def last_checkpoint(folder: str | Path) -> tuple[str, list[str]]:
    """Return the newest whole checkpoint of a run, empty if it has none at all.

    ``last_checkpoint`` names it. Where that one is damaged, it is the newest of those before.

    Returns:
        the file, and what was passed over and why

    Raises:
        InputError: there are checkpoints, and all of them are damaged
    """
    tag = Path(folder, TAG)
    files = [path for path in Path(folder).glob("model_*.pth") if CHECKPOINT.match(path.name)]
    files.sort(key=lambda path: (_iteration(path), path.name))
    passed_over = []
    named = None
    name = tag.read_text(errors="replace").strip() if tag.is_file() else None
    if name is not None and name.isprintable():
        named = Path(folder, name)
        last = _iteration(named)
        files = [p for p in files if p != named and _iteration(p) <= last] + [named]
    elif name is not None:
        passed_over.append(f"{tag} is damaged")
    elif files:
        passed_over.append(f"{tag} is missing")
    for path in reversed(files):
        damage = _find_damage(path)
        if not damage:
            return str(path), passed_over
        prefix = f"{tag} names {path}, which" if path == named else path
        passed_over.append(f"{prefix} is {damage}")
    if passed_over:
        raise InputError(
            f"{'; '.join(passed_over)}: no checkpoint is left to go on from; start anew in another "
            "OUTPUT_DIR"
        )
    return "", []


def _iteration(checkpoint: Path) -> float:
    """Return the last iteration in a checkpoint, of ``model_final.pth`` as the file says.

    After all others comes one that does not say.
    """
    name = CHECKPOINT.match(checkpoint.name)
    if name and name[1] != "final":
        return int(name[1])
    try:
        content = torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)
        return int(content["iteration"])
    except Exception:  # a damaged file may raise anything
        return math.inf


def _find_damage(path: str | Path) -> str:
    """Return what is wrong with a file in torch's format, a zip archive; empty if it is whole."""
    try:
        with zipfile.ZipFile(path) as archive:
            spoilt = archive.testzip()  # which torch does not look for
        torch.load(path, map_location="cpu", mmap=True, weights_only=True)  # all but the tensors
    except (FileNotFoundError, IsADirectoryError):
        return "missing"
    except Exception as error:  # a damaged file may raise anything
        return f"damaged ({first_line(error)})"
    return f"damaged (the checksum of {spoilt})" if spoilt else ""


def export_weights(checkpoint: str | Path, output: str | Path) -> None:
    """Write the weights of a checkpoint under the names of Detectron2's ``RetinaNet``.

    The file holds them under "model", as Detectron2's checkpoints do, and the class names where
    the checkpoint has them, and nothing else.

    Raises:
        InputError: the checkpoint cannot be read, or the output exists
    """
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
        weights = to_detectron2_state_dict(content.get("model", content))
        names = saved_class_names(content)
        classes = {"class_names": names} if names else {}
    except Exception as error:  # pickle's documentation: a damaged file may raise anything
        raise InputError(
            f"{checkpoint} is missing, damaged or no checkpoint ({type(error).__name__})"
        ) from error
    try:
        with open(output, "xb") as file:
            torch.save({"model": weights} | classes, file)
    except FileExistsError:
        raise InputError(f"{output} exists; choose another name") from None
    except OSError as error:
        raise InputError(f"{output} cannot be written: {error.strerror}") from error
