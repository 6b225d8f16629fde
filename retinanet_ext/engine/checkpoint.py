"""Checkpoints that are written atomically, verified when read, and refused if they do not fit."""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import convert_c2_detectron_names
from detectron2.utils import comm
from torch import nn

from retinanet_ext.engine.class_matching import match_checkpoint, saved_class_names
from retinanet_ext.engine.find_checkpoint import (
    TAG,
    last_checkpoint,
    no_checkpoint_left,
    run_checkpoints,
)
from retinanet_ext.engine.pickled_weights import read_pickled_weights
from retinanet_ext.errors import InputError, first_line
from retinanet_ext.files import atomic_write, write_file
from retinanet_ext.modeling import convert_weights, to_detectron2_state_dict
from retinanet_ext.modeling.weights import KNOWN, check_fits, rename_detectrons_retinanet

# Name, shape in the checkpoint, shape in the model.
Mismatch = tuple[str, tuple[int, ...], tuple[int, ...]]

logger = logging.getLogger(__name__)


class _DamagedError(InputError):
    """A file that is not whole, or holds objects that are refused."""


class Checkpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, with these differences.

    - Weights that do not fit raise an :class:`InputError`. Detectron2 skips tensors of another
      shape with a warning and leaves those layers random.
    - Checkpoints hold class names. The classifier's outputs are matched to the data's classes by
      name; weights of other classes raise an :class:`InputError`.
    - No file runs code: ``.pth`` is read with ``weights_only=True``, and ``.pkl`` for arrays only.
    - Saving is atomic, so that a kill or a full disk loses no checkpoint. A last checkpoint that
      was damaged later is passed over for the one before.
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
            model: model to load into and to save
            save_dir: folder of the run's checkpoints
            reinit_mismatched: keep the initial values of layers of another shape, and of the
                classifier's outputs for classes that the weights do not name. Has no effect when
                resuming, because the optimizer's state would not fit either
            complete: refuse weights that do not fill the whole model, or that belong to another.
                Evaluation needs this; training may start from a backbone alone
            class_names: names of the data's classes 0..K-1; empty if unknown, which skips the
                comparison
            checkpointables: as in Detectron2
        """
        super().__init__(model, save_dir, **checkpointables)
        self.reinit_mismatched = reinit_mismatched
        self.complete = complete
        self.class_names = [str(name) for name in class_names]

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``<name>.pth`` atomically, then its name into ``last_checkpoint``.

        Raises:
            InputError: the disk is full or the folder not writable; earlier checkpoints are intact
        """
        if not self.save_dir or not self.save_to_disk:
            return
        states = {key: saved.state_dict() for key, saved in self.checkpointables.items()}
        content = {"model": self.model.state_dict(), **states, **kwargs}
        if self.class_names:
            content["class_names"] = self.class_names
        file = Path(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", file)
        # Always the same name, so that what killed processes left does not fill the disk.
        with atomic_write(file, part=file.with_name(".unfinished_checkpoint")) as part:
            torch.save(content, part)
        self.tag_last_checkpoint(file.name)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        write_file(Path(self.save_dir, TAG), last_filename_basename)

    def has_checkpoint(self) -> bool:
        return bool(self.get_checkpoint_file())

    def get_checkpoint_file(self) -> str:
        """Return :func:`last_checkpoint` of ``save_dir``."""
        return last_checkpoint(self.save_dir) if self.save_dir else ""

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load the weights and the named ``checkpointables``, by default all of them.

        Every process calls this, because the first process of each machine checks the file for
        all of its processes. If ``path`` is the last checkpoint in ``save_dir`` and is damaged,
        the newest whole checkpoint before it is loaded instead, and a warning says so.

        Returns:
            what else the file holds, such as ``iteration`` and ``class_names``

        Raises:
            InputError: the file is missing or unreadable, or does not fit the model
        """
        may_fall_back = bool(self.save_dir) and checkpointables is None
        candidates, passed_over = run_checkpoints(self.save_dir) if may_fall_back else ([], [])
        if not candidates or path != str(candidates[0]):
            return self._load_one(path, checkpointables)
        for candidate in map(str, candidates):
            try:
                content = self._load_one(candidate, None)
            except _DamagedError as error:
                passed_over.append(str(error))
                continue
            if passed_over:
                logger.warning("%s; %s is used", "; ".join(passed_over), candidate)
            return content
        raise no_checkpoint_left(passed_over)

    def _load_one(self, path: str, checkpointables: list[str] | None) -> dict[str, Any]:
        self.loaded_path = path
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
        content, failure = {}, None
        try:
            content = self._read(filename)
        except Exception as error:  # unpickling a damaged file may raise anything
            failure = error
        # Together, because a process that raised alone would leave the others waiting.
        reason = type(failure).__name__ if failure else ""
        if isinstance(failure, ValueError | RuntimeError):  # others advise to switch off the check
            reason += f": {first_line(failure).partition('. ')[0][:100]}"
        damages = [damage for damage in comm.all_gather(reason) if damage]
        if isinstance(failure, OSError):
            raise failure
        if damages:
            raise _DamagedError(
                f"weights {self.loaded_path} are damaged, or hold Python objects other than "
                f"tensors, which are refused ({damages[0]})"
            )
        if not isinstance(content.get("model"), dict) or not content["model"]:
            raise InputError(f"weights {self.loaded_path} are not a dict of tensors by name")
        if self._resuming and not self.checkpointables.keys() <= content.keys():
            raise InputError(
                f"weights {self.loaded_path} hold no state of a training to resume; name them in "
                "MODEL.WEIGHTS, without --resume, to start from them"
            )
        return content

    def _read(self, filename: str) -> dict[str, Any]:
        if filename.endswith(".pkl"):
            return read_pickled_weights(filename)
        if filename.endswith(".pyth"):  # pycls's, whose names are matched by their ends
            state = self._torch_load(filename)["model_state"].items()
            weights = {k: v for k, v in state if not k.endswith("num_batches_tracked")}
            return {"model": weights, "__author__": "pycls", "matching_heuristics": True}
        content = super()._load_file(filename)
        saved = content["model"]
        if isinstance(saved, dict) and "state_dict" in saved:  # MMDetection's files and timm's
            content["model"], meta = saved["state_dict"], saved.get("meta", {})
            names = meta.get("CLASSES") or meta.get("dataset_meta", {}).get("classes")
            if names:
                content["class_names"] = list(names)
        return content

    def _torch_load(self, f: str) -> dict[str, Any]:
        is_zip = zipfile.is_zipfile(f)
        if is_zip and comm.get_local_rank() == 0:
            with zipfile.ZipFile(f) as archive:
                spoilt = archive.testzip()  # torch does not compare checksums
            if spoilt:
                raise ValueError(f"the checksum of {spoilt} differs")
        # Stated, because an environment variable changes the default of weights_only.
        return torch.load(f, map_location="cpu", mmap=is_zip, weights_only=True)

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        example = next(iter(checkpoint["model"]))
        if not (self._resuming or checkpoint.get("matching_heuristics")):
            self._convert(checkpoint)
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
            raise InputError(
                f"weights {self.loaded_path} hold no tensor of this model: their names, such as "
                f"{example}, are of no architecture that is known; known: {KNOWN}"
            )
        if self.complete:
            self._check_complete(sorted(skipped), incompatible.unexpected_keys)
        return incompatible

    def _convert(self, checkpoint: dict[str, Any]) -> None:
        """Convert weights of other libraries to Detectron2's names."""
        source = f"weights {self.loaded_path}"
        converted = convert_weights(checkpoint["model"], source)
        if converted is None:
            return
        check_fits(converted, self.model, source, reinit=self.reinit_mismatched)
        logger.info("%s are %s; they are converted to Detectron2's names", source, converted.origin)
        # BatchNorm counts batches and FrozenBN does not; the counters have no effect.
        counters = {
            name: tensor
            for name, tensor in self.model.state_dict().items()
            if name.endswith("num_batches_tracked") and name.startswith(converted.prefixes)
        }
        weights = {
            name: tensor
            for name, tensor in converted.weights.items()
            if not name.endswith("num_batches_tracked")
        }
        checkpoint["model"] = weights | counters
        if converted.class_names:
            checkpoint["class_names"] = converted.class_names

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
        source = f"weights {self.loaded_path}"
        match_checkpoint(
            checkpoint, self.class_names, self.model, source, reinit=reinit, remedy=remedy
        )

    def _skipped_by_heuristics(self, checkpoint: dict[str, Any]) -> list[Mismatch]:
        """Return the tensors that Detectron2's matching by name suffix skips for their shape."""
        if not checkpoint.get("matching_heuristics"):
            return []
        if checkpoint.get("__author__") == "Caffe2":
            self._convert_ndarray_to_tensor(checkpoint["model"])
            weights, _ = convert_c2_detectron_names(checkpoint["model"])
            checkpoint["model"] = rename_detectrons_retinanet(weights)
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
                "Other shapes in %s, so these layers start anew: %s",
                self.loaded_path,
                "; ".join(texts),
            )
            return
        more = f" (and {len(texts) - 1} more)" if len(texts) > 1 else ""
        if self._resuming:
            remedy = "resume with the config the run was started with"
        elif self.complete:
            remedy = "evaluate with the config they were trained with"
        else:
            remedy = "MODEL.RETINANET.REINIT_MISMATCHED True starts such layers anew"
        raise InputError(
            f"weights {self.loaded_path} have other shapes: {texts[0]}{more}; {remedy}"
        )

    def _check_complete(self, missing: list[str], unexpected: list[str]) -> None:
        if missing:
            raise InputError(
                f"weights {self.loaded_path} lack {len(missing)} tensors of this model, "
                f"such as {missing[0]}: nothing is evaluated with random layers"
            )
        # Buffers of old files (pixel_mean, pixel_std) are no sign of another architecture.
        layers = dict(self.model.named_children())
        foreign = sorted(name for name in unexpected if name.split(".")[0] in layers)
        if foreign:
            raise InputError(
                f"weights {self.loaded_path} hold {len(foreign)} tensors this model has no place "
                f"for, such as {foreign[0]}: they are another architecture's"
            )


def export_weights(checkpoint: str | Path, output: str | Path) -> None:
    """Write the weights of a checkpoint under the names of Detectron2's ``RetinaNet``.

    The file holds "model" as Detectron2's checkpoints do, and "class_names" if the checkpoint has
    them.

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
