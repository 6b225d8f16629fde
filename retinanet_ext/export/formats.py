"""The file formats: how a program is written, and how the file is run in its own runtime."""

from __future__ import annotations

import io
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from retinanet_ext.errors import InputError
from retinanet_ext.export.forms import FORMS, THRESHOLDS, Program
from retinanet_ext.export.metadata import KEY, ExportMetadata
from retinanet_ext.export.onnx_predictor import open_session

Run = Callable[[np.ndarray], list[np.ndarray]]
"""Images, uint8 (N, C, H, W) -> outputs of the form."""

MIN_EXPORTED_SIDE = 129
"""``torch.export`` tells one cell from several: above 128 pixels, P7 has more than one cell."""


@dataclass(frozen=True)
class Format:
    """A file format.

    Attributes:
        suffix: of the file's name
        packages: that writing and running it need
        min_side: smallest height and width of images, in pixels
        write: writes a program and its metadata into a file
        load: file -> the program in its own runtime; with a score, that replaces all thresholds
    """

    suffix: str
    packages: tuple[str, ...]
    min_side: int
    write: Callable[[Program, ExportMetadata, IO[bytes]], None]
    load: Callable[..., Run]


def get_format(name: str) -> Format:
    """Return a format whose packages are installed.

    Raises:
        InputError: the format is unknown, or a package is missing
    """
    if name not in FORMATS:
        raise InputError(f"the format {name!r} is unknown; known: {', '.join(FORMATS)}")
    missing = [package for package in FORMATS[name].packages if find_spec(package) is None]
    if missing:
        raise InputError(
            f"--format {name} needs {' and '.join(missing)}, not installed: "
            "pip install 'retinanet-ext[export]'"
        )
    return FORMATS[name]


def export_program(program: Program) -> torch.export.ExportedProgram:
    """Return the program of ``torch.export``, for any number of images of any size above 128."""
    with _recording():
        return torch.export.export(
            program, (_example(program),), dynamic_shapes=(_dynamic_sizes(),)
        )


def _dynamic_sizes() -> dict[int, Any]:
    height, width = (torch.export.Dim(name, min=MIN_EXPORTED_SIDE) for name in ("height", "width"))
    return {0: torch.export.Dim("batch"), 2: height, 3: width}


def _example(program: Program) -> Tensor:
    return torch.zeros(2, len(program.model.pixel_mean), 160, 192, dtype=torch.uint8)


@contextmanager
def _recording() -> Iterator[None]:
    """Switch off gradients, and the warnings of torch's own exporters."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _write_onnx(program: Program, metadata: ExportMetadata, file: IO[bytes]) -> None:
    from retinanet_ext.export.onnx_nms import TRANSLATIONS, onnx_suppress_by_class

    program.suppress = onnx_suppress_by_class
    with _recording():
        exported = torch.onnx.export(
            program,
            (_example(program),),
            dynamo=True,
            dynamic_shapes=(_dynamic_sizes(),),
            input_names=["images"],
            output_names=list(FORMS[program.form]),
            custom_translation_table=TRANSLATIONS,
            verbose=False,
        )
    model = exported.model_proto
    model.metadata_props.add(key=KEY, value=metadata.to_json())
    file.write(model.SerializeToString())


def _load_onnx(path: Path, score: float | None = None) -> Run:
    with tempfile.TemporaryDirectory() as scratch:
        if score is not None:
            path = write_with_threshold(path, Path(scratch, "file.onnx"), score)
        session = open_session(path)
    return lambda images: session.run(None, {"images": images})


def write_with_threshold(source: Path, target: Path, score: float) -> Path:
    """Write an ONNX file again with another score in place of all its thresholds."""
    import onnx

    model = onnx.load(source)
    for tensor in model.graph.initializer:
        if tensor.name in THRESHOLDS:
            values = np.full(tensor.dims, score, np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(model, target)
    return target


def _write_pt2(program: Program, metadata: ExportMetadata, file: IO[bytes]) -> None:
    buffer = io.BytesIO()
    torch.export.save(export_program(program), buffer, extra_files={KEY: metadata.to_json()})
    file.write(buffer.getvalue())


def _load_pt2(path: Path, score: float | None = None) -> Run:
    return _run_torch(torch.export.load(path).module(), score)


def _write_torchscript(program: Program, metadata: ExportMetadata, file: IO[bytes]) -> None:
    with _recording():
        # Traced a second time for the check, NMS would be compared by rank.
        traced = torch.jit.trace(program, (_example(program),), check_trace=False)
    torch.jit.save(traced, file, _extra_files={KEY: metadata.to_json()})


def _load_torchscript(path: Path, score: float | None = None) -> Run:
    return _run_torch(torch.jit.load(path), score)


def _run_torch(module: Any, score: float | None) -> Run:
    for name, buffer in module.named_buffers():
        if score is not None and name in THRESHOLDS:
            buffer.fill_(score)

    def run(images: np.ndarray) -> list[np.ndarray]:
        with torch.no_grad():
            return [output.numpy() for output in module(torch.from_numpy(images))]

    return run


FORMATS = {
    "onnx": Format(".onnx", ("onnx", "onnxscript", "onnxruntime"), 1, _write_onnx, _load_onnx),
    "pt2": Format(".pt2", (), MIN_EXPORTED_SIDE, _write_pt2, _load_pt2),
    "torchscript": Format(".torchscript", (), 1, _write_torchscript, _load_torchscript),
}
