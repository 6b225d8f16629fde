"""Coverage of boxes by a grid of anchors, without an anchors x boxes matrix, and a search.

The IoU of a box and an anchor of a given size falls with the distance of their centres along x and
y. So among the anchors of one size on a level, the anchor of the cell nearest to the box's centre
has the best IoU, and the anchors above a threshold lie in a window around that cell.

Shapes: M boxes, L levels, A anchors per cell. Boxes are XYXY in input pixels, after the resize.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

REACHED = 0.5
"""Least IoU of a foreground anchor (section 4.1)."""

MAX_SEARCHED = 4000
"""Most boxes that the search uses; its result is evaluated on all."""

_CHUNK = 2**22  # (box, anchor) pairs per block


@dataclass(frozen=True)
class AnchorGrid:
    """Anchors of any generator that gives every cell of a level the same sizes.

    Attributes:
        sizes: (A, 2) per level: width and height in input pixels.
        strides: input pixels per cell, per level.
        offset: offset of the first cell's centre, in cells.
    """

    sizes: Sequence[Tensor]
    strides: Sequence[int]
    offset: float = 0.5

    def num_anchors(self, padded: Tensor) -> Tensor:
        """Return the number of anchors on images of padded sizes (..., 2): (...)."""
        levels = zip(self.sizes, self.strides, strict=True)
        counts = [_cells(padded, stride).prod(-1) * len(sizes) for sizes, stride in levels]
        return torch.stack(counts).sum(0)


@dataclass(frozen=True)
class Octaves:
    """Parameters of ``OctaveAnchorGenerator``; see ``MODEL.ANCHOR_GENERATOR``."""

    base_scale: float
    scales_per_octave: int
    aspect_ratios: tuple[float, ...]

    @property
    def num_anchors(self) -> int:
        """Anchors per cell."""
        return self.scales_per_octave * len(self.aspect_ratios)

    def grid(self, strides: Sequence[int], offset: float = 0.5) -> AnchorGrid:
        """Return the anchors: sides base_scale x stride x 2^(k/n), ratios height / width."""
        n = self.scales_per_octave
        sides = self.base_scale * 2 ** (torch.arange(n, dtype=torch.float64) / n)
        roots = torch.tensor(self.aspect_ratios, dtype=torch.float64).sqrt()
        shapes = (sides[:, None, None] * torch.stack((1 / roots, roots), dim=1)).reshape(-1, 2)
        return AnchorGrid([shapes * stride for stride in strides], strides, offset)


def best_ious(boxes: Tensor, padded: Tensor, grid: AnchorGrid) -> Tensor:
    """Return the best IoU of each box with any anchor: (M,) float64.

    Args:
        boxes: (M, 4) boxes inside their images.
        padded: (M, 2) width and height of each box's image with its padding.
        grid: the anchors.
    """
    boxes = boxes.double()
    best = boxes.new_zeros(len(boxes))
    for sizes, stride in zip(grid.sizes, grid.strides, strict=True):
        distance = _nearest_cell(boxes, padded, stride, grid.offset)[1]
        iou = _iou(_sides(boxes)[:, None], sizes.double(), distance[:, None])
        best = torch.maximum(best, iou.amax(1))
    return best


def count_positives(
    boxes: Tensor, images: Tensor, padded: Tensor, grid: AnchorGrid, threshold: float = REACHED
) -> Tensor:
    """Count the foreground anchors of each box, without low-quality matches: (M,).

    An anchor belongs to the box of its image that it overlaps most.

    Args:
        boxes, padded, grid: as for :func:`best_ious`.
        images: (M,) index of each box's image.
        threshold: least IoU of a foreground anchor.
    """
    boxes, sides = boxes.double(), _sides(boxes.double())
    pairs: list[tuple[Tensor, Tensor, Tensor]] = []  # anchor, box, IoU
    num_before = 0  # anchors of earlier levels and sizes on the largest image
    for sizes, stride in zip(grid.sizes, grid.strides, strict=True):
        cell, _ = _nearest_cell(boxes, padded, stride, grid.offset)
        num_cells = _cells(padded, stride)
        width = int(num_cells[:, 0].max()) if len(boxes) else 0
        for size in sizes.double():
            concentric = _iou(sides, size, torch.zeros_like(sides))
            (near,) = (concentric >= threshold).nonzero(as_tuple=True)
            # Largest distance of the centres: half the sides minus the least overlap.
            least = threshold / (1 + threshold) * (sides.prod(1) + size.prod())
            reach = (sides + size) / 2 - least[:, None] / torch.minimum(sides, size).flip(1)
            radius = (reach[near] / stride).ceil().long().clamp(min=0) + 1
            extent = radius.amax(0).tolist() if len(near) else [0, 0]
            window = _window(*extent)
            for index in near.split(max(1, _CHUNK // len(window))):
                cells = cell[index, None] + window
                inside = ((cells >= 0) & (cells < num_cells[index, None])).all(-1)
                centers = (cells + grid.offset) * stride
                distance = (centers - _centers(boxes[index])[:, None]).abs()
                iou = _iou(sides[index, None], size, distance)
                rows, columns = (inside & (iou >= threshold)).nonzero(as_tuple=True)
                x, y = cells[rows, columns].unbind(-1)
                pairs.append((num_before + y * width + x, index[rows], iou[rows, columns]))
            num_before += width * (int(num_cells[:, 1].max()) if len(boxes) else 0)
    anchors, index, ious = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    anchors = anchors + images[index] * num_before
    # The best box of each anchor, the first of equals: sort by anchor, then IoU, then box.
    order = index.argsort(stable=True)
    order = order[ious[order].argsort(stable=True, descending=True)]
    order = order[anchors[order].argsort(stable=True)]
    is_first = torch.ones(len(order), dtype=torch.bool)
    is_first[1:] = anchors[order][1:] != anchors[order][:-1]
    return torch.bincount(index[order][is_first], minlength=len(boxes))


@dataclass(frozen=True)
class Suggestion:
    """Anchors that the search found; share of boxes reached and mean best IoU, and before."""

    octaves: Octaves
    reached: float
    mean_iou: float
    reached_before: float
    mean_iou_before: float

    @property
    def is_better(self) -> bool:
        """Whether they reach at least half a percent more of the boxes."""
        return self.reached - self.reached_before >= 0.005


def search_octaves(
    boxes: Tensor, padded: Tensor, current: AnchorGrid, *, max_anchors: int, seed: int = 0
) -> Suggestion:
    """Search for the base scale, scales per octave and aspect ratios that reach most boxes.

    Among candidates that reach the same share of boxes, to a thousandth, the one with the higher
    mean best IoU wins.

    Args:
        boxes, padded: as for :func:`best_ious`; at least one box.
        current: the anchors to compare with; their strides and offset are kept.
        max_anchors: most anchors per cell.
        seed: seed of the sample of boxes that the search uses.
    """
    chosen = torch.arange(len(boxes))
    if len(boxes) > MAX_SEARCHED:
        rng = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(boxes), generator=rng)[:MAX_SEARCHED]
    some = boxes[chosen].double()
    distances = [
        _nearest_cell(some, padded[chosen], stride, current.offset)[1] for stride in current.strides
    ]
    # One row per level, in units of the stride, so that all levels have the same anchors.
    strides = torch.tensor(current.strides, dtype=torch.float64)[:, None, None]
    sides = (_sides(some) / strides).float()
    distance = (torch.stack(distances) / strides).float()

    def score(octaves: Octaves) -> tuple[float, float]:
        shapes = octaves.grid([1]).sizes[0].float()
        iou = _iou(sides[:, :, None], shapes, distance[:, :, None]).amax((0, 2))
        return round(float((iou >= REACHED).float().mean()), 3), float(iou.mean())

    log_ratios = (_sides(some)[:, 1] / _sides(some)[:, 0]).log()
    middle = round(float(log_ratios.median().exp()), 2)
    ranked = sorted(_coarse_candidates(middle, max_anchors), key=score, reverse=True)
    fine = [
        Octaves(round(octaves.base_scale * 2 ** (k / 12), 2), *shape)
        for octaves in ranked[:10]
        for shape in [(octaves.scales_per_octave, octaves.aspect_ratios)]
        for k in range(-3, 4)
    ]
    found = max(fine, key=score)
    after = best_ious(boxes, padded, found.grid(current.strides, current.offset))
    before = best_ious(boxes, padded, current)
    return Suggestion(
        found,
        float((after >= REACHED).double().mean()),
        float(after.mean()),
        float((before >= REACHED).double().mean()),
        float(before.mean()),
    )


def _coarse_candidates(middle: float, max_anchors: int) -> list[Octaves]:
    """Return candidates with base scales from 0.5 to 8 strides and 1 to 4 scales per octave."""
    return [
        Octaves(2 ** (k / 3), n, ratios)
        for ratios in _ratio_sets(middle)
        for n in range(1, 5)
        if n * len(ratios) <= max_anchors
        for k in range(-3, 10)
    ]


def _ratio_sets(middle: float) -> list[tuple[float, ...]]:
    """Return sets of 1 to 5 aspect ratios, spread evenly around 1 and around the boxes' median."""
    sets: dict[tuple[float, ...], None] = {}
    for center in (1.0, middle):
        for count in range(1, 6):
            for step in (1.25, 1.4, 1.6, 2.0, 2.5, 3.0) if count > 1 else (1.0,):
                powers = [k - (count - 1) / 2 for k in range(count)]
                ratios = tuple(round(center * step**power, 2) for power in powers)
                if math.prod(ratios) > 0:
                    sets[ratios] = None
    return list(sets)


def _sides(boxes: Tensor) -> Tensor:
    return boxes[:, 2:] - boxes[:, :2]


def _centers(boxes: Tensor) -> Tensor:
    return (boxes[:, :2] + boxes[:, 2:]) / 2


def _cells(padded: Tensor, stride: int) -> Tensor:
    """Return the number of columns and rows of a level on images of padded sizes."""
    return (padded + stride - 1).div(stride, rounding_mode="floor").long()


def _nearest_cell(
    boxes: Tensor, padded: Tensor, stride: int, offset: float
) -> tuple[Tensor, Tensor]:
    """Return the cell (column, row) nearest to each centre, and its distance in pixels: (M, 2)."""
    centers = _centers(boxes)
    cell = (centers / stride - offset).round().long().clamp(min=0)
    cell = torch.minimum(cell, _cells(padded, stride) - 1)
    return cell, (centers - (cell + offset) * stride).abs()


def _window(radius_x: int, radius_y: int) -> Tensor:
    """Return the offsets of the cells around a cell: (cells, 2)."""
    x = torch.arange(-radius_x, radius_x + 1)
    y = torch.arange(-radius_y, radius_y + 1)
    return torch.cartesian_prod(x, y)


def _iou(sides: Tensor, others: Tensor, distance: Tensor) -> Tensor:
    """Return the IoU for sides and distances of centres, (..., 2) each: (...)."""
    common = torch.minimum(torch.minimum(sides, others), (sides + others) / 2 - distance)
    common = common.clamp(min=0).prod(-1)
    return common / (sides.prod(-1) + others.prod(-1) - common)
