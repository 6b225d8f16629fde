"""Anchors by octave (section 4), and as torchvision's. Boxes: XYXY in input pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import ANCHOR_GENERATOR_REGISTRY, DefaultAnchorGenerator
from detectron2.structures import Boxes
from torch import Tensor

from retinanet_ext.errors import InputError
from retinanet_ext.losses import Interval


@ANCHOR_GENERATOR_REGISTRY.register()
class OctaveAnchorGenerator(DefaultAnchorGenerator):
    """Anchors with ``scales_per_octave`` sizes per level, each in every aspect ratio (section 4).

    The side (square root of the area) is ``base_scale * stride * 2^(k / scales_per_octave)`` input
    pixels. With the paper's values, 4, 3 and {1/2, 1, 2}, each cell has 9 anchors, with sides from
    32 to 813 pixels on P3 to P7.

    Example:
        >>> anchors = OctaveAnchorGenerator(aspect_ratios=[0.5, 1.0, 2.0], strides=[8, 16])
        >>> [len(level) for level in anchors([torch.zeros(1, 1, 4, 6), torch.zeros(1, 1, 2, 3)])]
        [216, 54]
    """

    @configurable
    def __init__(
        self,
        *,
        scales_per_octave: int = 3,
        base_scale: float = 4.0,
        aspect_ratios: list[list[float]] | list[float],
        strides: list[int],
        offset: float = 0.5,
    ) -> None:
        """
        Args:
            scales_per_octave: number of sizes from one level to the next, 1 to 64
            base_scale: side of the smallest anchor of a level, in strides
            aspect_ratios: height / width; one list for all levels, or one list per level
            strides: input pixels per cell of each level
            offset: position of the anchors' centre in its cell, in strides; 0.5 is the middle

        Raises:
            InputError: if a value is out of range; the message names its config key
        """
        Interval("[1, 64]").check("MODEL.ANCHOR_GENERATOR.SCALES_PER_OCTAVE", scales_per_octave)
        Interval("(0, inf)").check("MODEL.ANCHOR_GENERATOR.BASE_SCALE", base_scale)
        for level in aspect_ratios:
            for ratio in level if isinstance(level, Sequence) else [level]:
                Interval("(0, inf)").check("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", ratio)
        sizes = [
            [base_scale * stride * 2 ** (k / scales_per_octave) for k in range(scales_per_octave)]
            for stride in strides
        ]
        super().__init__(sizes=sizes, aspect_ratios=aspect_ratios, strides=strides, offset=offset)

    def forward(self, features: list[Tensor]) -> list[Boxes]:
        """Return the anchors of each level, ordered by row, column and anchor of the cell.

        Detectron2 computes them on the host, and each level's copy waits for a GPU.
        """
        # Written for torch.jit.script.
        cells: list[Tensor] = [named[1] for named in self.cell_anchors.named_buffers()]
        anchors: list[Tensor] = []
        for level, stride, cell in zip(features, self.strides, cells):  # noqa: B905
            start, device = self.offset * stride, cell.device
            x = torch.arange(level.shape[-1], device=device) * stride + start
            y = torch.arange(level.shape[-2], device=device) * stride + start
            y, x = torch.meshgrid(y, x, indexing="ij")
            shifts = torch.stack([x, y, x, y], dim=2).view(-1, 1, 4)
            anchors.append((shifts + cell).view(-1, 4))
        return [Boxes(level) for level in anchors]

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict[str, Any]:
        node = cfg.MODEL.ANCHOR_GENERATOR
        if node.SIZES != get_cfg().MODEL.ANCHOR_GENERATOR.SIZES:
            raise InputError(
                "MODEL.ANCHOR_GENERATOR.SIZES is set, which OctaveAnchorGenerator does not read; "
                "set BASE_SCALE and SCALES_PER_OCTAVE, or NAME DefaultAnchorGenerator"
            )
        return {
            "scales_per_octave": node.SCALES_PER_OCTAVE,
            "base_scale": node.BASE_SCALE,
            "aspect_ratios": node.ASPECT_RATIOS,
            "strides": [shape.stride for shape in input_shape],
            "offset": node.OFFSET,
        }


@ANCHOR_GENERATOR_REGISTRY.register()
class TorchvisionAnchorGenerator(DefaultAnchorGenerator):
    """Anchors of torchvision's RetinaNet, by row, column, size and aspect ratio.

    They differ from Detectron2's in two ways. The corners of a cell's anchors are rounded to whole
    pixels. The distance of two cells is the padded side divided by the number of cells, rounded
    down, because torchvision knows no strides: on P7 of 800 pixels, 114 in place of 128.

    Example:
        >>> generator = TorchvisionAnchorGenerator(
        ...     sizes=[[32, 40, 50]], aspect_ratios=[0.5, 1.0, 2.0], strides=[8], offset=0.0
        ... )
        >>> generator([torch.zeros(1, 1, 4, 6)])[0].tensor[0]
        tensor([-23., -11.,  23.,  11.])
    """

    def generate_cell_anchors(
        self, sizes: Sequence[float], aspect_ratios: Sequence[float]
    ) -> Tensor:
        return super().generate_cell_anchors(sizes, aspect_ratios).round()

    def forward(self, features: list[Tensor]) -> list[Boxes]:
        height, width = (side * self.strides[0] for side in features[0].shape[-2:])
        anchors = []
        for level, cell in zip(features, self.cell_anchors, strict=True):
            rows, columns = level.shape[-2:]
            y = (torch.arange(rows, device=cell.device) + self.offset) * (height // rows)
            x = (torch.arange(columns, device=cell.device) + self.offset) * (width // columns)
            y, x = torch.meshgrid(y, x, indexing="ij")
            shifts = torch.stack([x, y, x, y], dim=2).view(-1, 1, 4)
            anchors.append(Boxes((shifts + cell).view(-1, 4)))
        return anchors
