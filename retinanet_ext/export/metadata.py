"""What an exported file says of itself: how its input is made, and what its outputs are."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from retinanet_ext.errors import InputError
from retinanet_ext.open_image import MAX_PIXELS

KEY = "retinanet_ext"
"""Key of the JSON text in ONNX's ``metadata_props``, and name of the extra file in PT2 and
TorchScript."""

FORMAT_VERSION = 1
"""Version of the metadata and of the programs' inputs and outputs."""


@dataclass(frozen=True)
class ExportMetadata:
    """How to use an exported program.

    Attributes:
        form: ``raw``, ``boxes`` or ``detections``
        class_names: names of classes 0..K-1; "0".."K-1" where the checkpoint has none
        thresholds: lowest score of a detection of each class, (K,); applied in ``detections``
        nms_threshold: IoU above which the lower score of a class is suppressed in ``detections``
        max_detections: D, the rows per image of ``detections``
        input_format: channels of the images, such as RGB or BGR
        pixel_mean, pixel_std: normalisation of each channel, in 0..255, which the program does
        resize_shortest, resize_longest: an image is resized with Pillow's bilinear filter so that
            its shorter side has the first number of pixels, or its longer side the second if it
            would be longer. ``resize_shortest`` 0: not resized
        size_divisibility: multiple that the program pads height and width to
        strides: input pixels per cell of each level
        min_side: smallest height and width that the program takes, in pixels
        precision: float32 or int8
        weights_sha256: checksum of the checkpoint
        package_version: of retinanet_ext
        format_version: :data:`FORMAT_VERSION`
        max_pixels: most pixels of an image file; larger ones are refused
    """

    form: str
    class_names: list[str]
    thresholds: list[float]
    nms_threshold: float
    max_detections: int
    input_format: str
    pixel_mean: list[float]
    pixel_std: list[float]
    resize_shortest: int
    resize_longest: int
    size_divisibility: int
    strides: list[int]
    min_side: int
    precision: str
    weights_sha256: str
    package_version: str
    format_version: int = FORMAT_VERSION
    max_pixels: int = MAX_PIXELS

    def to_json(self) -> str:
        """Return the metadata as JSON."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str | None, file: str) -> ExportMetadata:
        """Return the metadata of a file.

        Args:
            text: what :meth:`to_json` returned; None or empty if the file has none
            file: name of the file, for messages

        Raises:
            InputError: there are none, or they are of another version
        """
        again = "export the run again by `retinanet-ext export RUN`"
        try:
            content = json.loads(text or "{}")
            found = content.get("format_version")
        except (ValueError, AttributeError):
            found = None
        if found is None:
            raise InputError(
                f"{file} was not written by `retinanet-ext export`: it lacks the metadata; {again}"
            )
        if found != FORMAT_VERSION:
            maker = content.get("package_version")
            raise InputError(
                f"{file} was exported by retinanet_ext {maker} in version {found} of its format, "
                f"and this version reads {FORMAT_VERSION}; {again}"
            )
        return cls(**content)

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Return the (height, width) that an image is resized to, as Detectron2 rounds it."""
        if not self.resize_shortest:
            return height, width
        scale = self.resize_shortest / min(height, width)
        if height < width:
            new = (float(self.resize_shortest), scale * width)
        else:
            new = (scale * height, float(self.resize_shortest))
        if max(new) > self.resize_longest:
            scale = self.resize_longest / max(new)
            new = (new[0] * scale, new[1] * scale)
        return int(new[0] + 0.5), int(new[1] + 0.5)
