"""How well a grid of anchors covers boxes, without an anchors x boxes matrix, and better anchors.

The IoU of a box and an anchor of some size falls with the distance of their centres along x and
along y. So of all anchors of a size on a level, the one in the cell nearest to the box's centre
has the best IoU, and those above a threshold lie in a window around it.

Shapes: M boxes, L levels, A anchors a cell. Boxes: XYXY in input pixels, after the resize.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

REACHED = 0.5
"""IoU from which an anchor is foreground (section 4.1 of the paper)."""

MAX_SEARCHED = 4000
"""Boxes that the search looks at; what it finds is judged on all."""

_CHUNK = 2**22  # box-anchor pairs looked at together


@dataclass(frozen=True)
class AnchorGrid:
    """Anchors of any generator that puts the same sizes on every cell of a level.

    Attributes:
        sizes: (A, 2) a level, width and height in input pixels
        strides: input pixels a cell, a level
        offset: of the first cell's centre, in cells
    """

    sizes: Sequence[Tensor]
    strides: Sequence[int]
    offset: float = 0.5

    def num_anchors(self, padded: Tensor) -> Tensor:
        """Return the anchors on images of these padded sizes, (..., 2): (...)."""
        levels = zip(self.sizes, self.strides, strict=True)
        counts = [_cells(padded, stride).prod(-1) * len(sizes) for sizes, stride in levels]
        return torch.stack(counts).sum(0)


@dataclass(frozen=True)
class Octaves:
    """What the octave generator is made of; see ``MODEL.ANCHOR_GENERATOR``."""

    base_scale: float
    scales_per_octave: int
    aspect_ratios: tuple[float, ...]

    @property
    def num_anchors(self) -> int:
        """Anchors a cell."""
        return self.scales_per_octave * len(self.aspect_ratios)

    def grid(self, strides: Sequence[int], offset: float = 0.5) -> AnchorGrid:
        """Return their anchors: sides base_scale x stride x 2^(k/n), ratios height / width."""
        n = self.scales_per_octave
        sides = self.base_scale * 2 ** (torch.arange(n, dtype=torch.float64) / n)
        roots = torch.tensor(self.aspect_ratios, dtype=torch.float64).sqrt()
        shapes = (sides[:, None, None] * torch.stack((1 / roots, roots), dim=1)).reshape(-1, 2)
        return AnchorGrid([shapes * stride for stride in strides], strides, offset)


def best_ious(boxes: Tensor, padded: Tensor, grid: AnchorGrid) -> Tensor:
    """Return the IoU of each box with the anchor it overlaps most, (M,) float64.

    Args:
        boxes: (M, 4), inside their images
        padded: (M, 2), width and height of each box's image with its padding
        grid: the anchors
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
    """Count the anchors that reach a box and overlap no other box of its image more, (M,).

    These are its foreground anchors but for low-quality matches.

    Args:
        boxes, padded, grid: as for :func:`best_ious`
        images: (M,), which boxes are of one image
        threshold: least IoU of foreground
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
            # No farther than this may the centres be: half the sides less the least overlap.
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
    # The best box of each anchor, of equals the first: sorted last by anchor, then IoU, then box.
    order = index.argsort(stable=True)
    order = order[ious[order].argsort(stable=True, descending=True)]
    order = order[anchors[order].argsort(stable=True)]
    is_first = torch.ones(len(order), dtype=torch.bool)
    is_first[1:] = anchors[order][1:] != anchors[order][:-1]
    return torch.bincount(index[order][is_first], minlength=len(boxes))


@dataclass(frozen=True)
class Suggestion:
    """Anchors that the search found, and the share of boxes reached and mean best IoU of both."""

    octaves: Octaves
    reached: float
    mean_iou: float
    reached_before: float
    mean_iou_before: float

    @property
    def is_better(self) -> bool:
        """Whether they reach half a percent more of the boxes at least."""
        return self.reached - self.reached_before >= 0.005


def search_octaves(
    boxes: Tensor, padded: Tensor, current: AnchorGrid, *, max_anchors: int, seed: int = 0
) -> Suggestion:
    """Search the base scale, scales per octave and aspect ratios that reach most boxes.

    Candidates have no more than ``max_anchors`` anchors a cell. Of those that reach as many boxes,
    to a thousandth, the one with the higher mean best IoU is taken.

    Args:
        boxes, padded: as for :func:`best_ious`; one box at least
        current: the anchors to compare with; strides and offset are kept
        max_anchors: a cell
        seed: of the sample of boxes that the search looks at
    """
    chosen = torch.arange(len(boxes))
    if len(boxes) > MAX_SEARCHED:
        rng = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(boxes), generator=rng)[:MAX_SEARCHED]
    some = boxes[chosen].double()
    distances = [
        _nearest_cell(some, padded[chosen], stride, current.offset)[1] for stride in current.strides
    ]
    # One row a level: sides and distances in strides, so that all levels have the same anchors.
    strides = torch.tensor(current.strides, dtype=torch.float64)[:, None, None]
    sides = (_sides(some) / strides).float()
    distance = (torch.stack(distances) / strides).float()

    def score(octaves: Octaves) -> tuple[float, float]:
        shapes = octaves.grid([1]).sizes[0].float()
        iou = _iou(sides[:, :, None], shapes, distance[:, :, None]).amax((0, 2))
        return round(float((iou >= REACHED).float().mean()), 3), float(iou.mean())

    log_ratios = (_sides(some)[:, 1] / _sides(some)[:, 0]).log()
    middle = round(float(log_ratios.median().exp()), 2)
    candidates = [
        (n, ratios)
        for ratios in _ratio_sets(middle)
        for n in range(1, 5)
        if n * len(ratios) <= max_anchors
    ]
    coarse = [2 ** (k / 3) for k in range(-3, 10)]  # 0.5 to 8 strides
    ranked = sorted(
        (Octaves(base, n, ratios) for n, ratios in candidates for base in coarse),
        key=score,
        reverse=True,
    )
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


def _ratio_sets(middle: float) -> list[tuple[float, ...]]:
    """Return sets of 1 to 5 ratios, evenly spread around 1 and around the boxes' own middle."""
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
    """Return the columns and rows of a level on images of these sizes."""
    return (padded + stride - 1).div(stride, rounding_mode="floor").long()


def _nearest_cell(
    boxes: Tensor, padded: Tensor, stride: int, offset: float
) -> tuple[Tensor, Tensor]:
    """Return the column and row nearest to each centre and its distance in pixels, (M, 2) each."""
    centers = _centers(boxes)
    cell = (centers / stride - offset).round().long().clamp(min=0)
    cell = torch.minimum(cell, _cells(padded, stride) - 1)
    return cell, (centers - (cell + offset) * stride).abs()


def _window(radius_x: int, radius_y: int) -> Tensor:
    """Return the steps from a cell to those around it, (cells, 2)."""
    x = torch.arange(-radius_x, radius_x + 1)
    y = torch.arange(-radius_y, radius_y + 1)
    return torch.cartesian_prod(x, y)


def _iou(sides: Tensor, others: Tensor, distance: Tensor) -> Tensor:
    """Return the IoU of boxes with these sides and distances of centres, each (..., 2): (...)."""
    common = torch.minimum(torch.minimum(sides, others), (sides + others) / 2 - distance)
    common = common.clamp(min=0).prod(-1)
    return common / (sides.prod(-1) + others.prod(-1) - common)
