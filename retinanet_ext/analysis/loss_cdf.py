"""How the loss concentrates on hard windows (figure 4, section 5.1).

Windows are sampled from a stream, their losses at several gamma normalised to sum 1 and sorted
from low to high; the cumulative sum over the fraction of windows is the curve of figure 4. The
paper does not say what a window is, so both readings are taken:

- ``pair``: an anchor and a class. Positive is a foreground anchor with its own class, negative
  every other pair.
- ``anchor``: an anchor, whose loss is the sum over its K entries, as in training. Positive is a
  foreground anchor, negative a background anchor.

Ignored anchors never count. All losses are without alpha. It cancels where all windows of a side
carry the same weight; the one place where it would not is a foreground anchor read as a whole,
whose K - 1 entries of other classes training weighs by 1 - alpha instead of alpha.

Shapes: R anchors, K classes. Labels: -1 ignore, 0..K-1 class, K background.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from retinanet_ext.errors import InputError
from retinanet_ext.losses import LOSSES

GAMMAS = (0.0, 0.5, 1.0, 2.0)
READINGS = {"anchor": "an anchor, its classes summed", "pair": "an anchor and a class"}
SIDES = ("positive", "negative")
NUM_POSITIVES = 10**5
NUM_NEGATIVES = 10**7
HARDEST = (0.2, 0.01)

FRACTIONS = np.unique(np.r_[np.linspace(0, 1, 101), 1 - np.logspace(-2, -6, 41)].round(9))
"""Where the CDF is read off: each percent, and closer together towards the hardest windows."""

CHUNK = 2**18  # entries (anchors times classes) per step, so that temporaries stay small


PAPER_FRACTIONS = (0.2, 0.5, 0.8, 0.9, 0.95, 0.99)
PAPER: Mapping[str, Mapping[float, tuple[float, ...]]] = {
    "positive": {
        0.0: (0.034, 0.185, 0.524, 0.714, 0.836, 0.960),
        0.5: (0.018, 0.140, 0.477, 0.683, 0.816, 0.955),
        1.0: (0.010, 0.106, 0.436, 0.654, 0.799, 0.951),
        2.0: (0.003, 0.062, 0.369, 0.605, 0.768, 0.943),
    },
    "negative": {
        0.0: (0.083, 0.308, 0.633, 0.773, 0.855, 0.940),
        0.5: (0.047, 0.213, 0.500, 0.641, 0.730, 0.836),
        1.0: (0.019, 0.106, 0.286, 0.385, 0.454, 0.548),
        2.0: (0.0003, 0.003, 0.010, 0.015, 0.018, 0.026),
    },
}
"""Share of the loss that the easiest windows carry, at each of :data:`PAPER_FRACTIONS`.

By side and gamma, measured in the vector graphics of figure 4: RetinaNet-101-600 trained with gamma
2. The paper does not say which reading it is.
"""


def paper_share(side: str, gamma: float, hardest: float) -> float:
    """Return the share of the loss that the hardest 20 % (0.2) or 1 % (0.01) carry in the paper."""
    index = PAPER_FRACTIONS.index(round(1 - hardest, 9))
    return round(1 - PAPER[side][gamma][index], 4)


class Reservoir:
    """A uniform sample of a stream: all of it until full, then Vitter's algorithm R.

    Each item takes one random number, so the sample does not depend on how the stream is split.

    Args:
        num_values: float32 numbers kept per item
        capacity: items kept
        rng: the source of randomness, not shared

    Attributes:
        seen: items so far
    """

    def __init__(self, num_values: int, capacity: int, rng: np.random.Generator) -> None:
        self.seen = 0
        self._values = np.empty((num_values, capacity), np.float32)
        self._rng = rng

    @property
    def values(self) -> np.ndarray:
        """The sample, (num_values, min(seen, capacity)), not a copy."""
        return self._values[:, : self.seen]

    def add(self, items: Tensor, values: Callable[[Tensor], Tensor]) -> None:
        """Add the next items of the stream.

        Args:
            items: (n, ...)
            values: what to keep, (m, ...) -> (num_values, m); called only on the chosen items
        """
        chosen, slots = self._draw(len(items))
        kept = values(items[torch.from_numpy(chosen).to(items.device)])
        self._values[:, slots] = kept.float().cpu().numpy()

    def _draw(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return which of the next ``count`` items to keep, and the slot of each."""
        capacity = self._values.shape[1]
        slots = np.arange(self.seen, self.seen + count)
        later = slots >= capacity
        slots[later] = self._rng.random(later.sum()) * (slots[later] + 1)
        self.seen += count
        chosen = np.flatnonzero(slots < capacity)
        slots = slots[chosen]
        if later.any():  # the last of several items for one slot stays
            slots, last = np.unique(slots[::-1], return_index=True)
            chosen = chosen[::-1][last]
        return chosen, slots


@dataclass(frozen=True)
class LossCurve:
    """A measured curve of figure 4.

    Attributes:
        reading: ``anchor`` or ``pair``
        side: ``positive`` or ``negative``
        gamma: of the focal loss
        seen: windows of this side in the stream
        sampled: how many of them the curve is of
        mean_loss: of a sampled window
        hardest: fraction (0.2, 0.01) -> share of the loss that the hardest windows carry
        cdf: share of the loss that the easiest windows carry, at each of :data:`FRACTIONS`
    """

    reading: str
    side: str
    gamma: float
    seen: int
    sampled: int
    mean_loss: float
    hardest: Mapping[float, float]
    cdf: tuple[float, ...]


class CumulativeLoss:
    """The cumulative distribution of float32 losses, linear between windows and summed in float64.

    Args:
        losses: one dimension, not negative; sorted in place

    Raises:
        InputError: the losses sum to 0
    """

    def __init__(self, losses: np.ndarray) -> None:
        losses.sort()
        self._sums = np.zeros(len(losses) + 1)
        self._sums[1:] = losses
        np.cumsum(self._sums, out=self._sums)
        self.total = float(self._sums[-1])
        if not self.total > 0:
            raise InputError(f"the losses of {len(losses)} windows sum to {self.total:g}")

    def share_of_easiest(self, fraction: float) -> float:
        """Return the share of the loss that a fraction of the windows, easiest first, carries."""
        position = fraction * (len(self._sums) - 1)
        index = min(int(position), len(self._sums) - 2)
        below, above = self._sums[index : index + 2]
        return float(below + (position - index) * (above - below)) / self.total


class WindowSample:
    """Uniform samples of positive and negative windows in both readings, from a stream.

    Holds 4 bytes per pair and 16 bytes per anchor: 0.2 GB for the paper's 10^7 negatives.

    Args:
        num_positives, num_negatives: windows kept of each side, in each reading
        seed: the same seed and stream give the same sample
    """

    def __init__(
        self,
        *,
        num_positives: int = NUM_POSITIVES,
        num_negatives: int = NUM_NEGATIVES,
        seed: int = 0,
    ) -> None:
        self._focal = [LOSSES["focal"].bind(gamma=gamma) for gamma in GAMMAS]
        capacity = {"positive": num_positives, "negative": num_negatives}
        num_values = {"anchor": len(GAMMAS), "pair": 1}
        self._reservoirs = {
            (reading, side): Reservoir(
                num_values[reading], capacity[side], np.random.default_rng([seed, i, j])
            )
            for i, reading in enumerate(READINGS)
            for j, side in enumerate(SIDES)
        }

    @torch.no_grad()
    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Add the anchors of an image, or some of them.

        Args:
            logits: (R, K), any float type
            labels: (R,)
        """
        num_anchors = max(1, CHUNK // logits.shape[1])
        chunks = zip(logits.split(num_anchors), labels.split(num_anchors), strict=True)
        for chunk, chunk_labels in chunks:
            kept = chunk_labels >= 0
            self._add_chunk(chunk[kept].float(), chunk_labels[kept])

    def _add_chunk(self, logits: Tensor, labels: Tensor) -> None:
        foreground = labels < logits.shape[1]
        x_t = -logits
        own = torch.zeros_like(x_t, dtype=torch.bool)
        own[foreground, labels[foreground]] = True
        x_t[own] *= -1
        for side, anchors, pairs in zip(SIDES, (foreground, ~foreground), (own, ~own), strict=True):
            self._reservoirs["anchor", side].add(x_t[anchors], self._anchor_losses)
            self._reservoirs["pair", side].add(x_t[pairs], lambda chosen: chosen[None])

    def _anchor_losses(self, x_t: Tensor) -> Tensor:
        """Return the loss of each anchor at each gamma, (G, R)."""
        return torch.stack([focal(x_t).sum(1) for focal in self._focal])

    def curves(self) -> list[LossCurve]:
        """Return all curves of figure 4. Sorts the sample in place, so call it last.

        Raises:
            InputError: there is no positive or no negative window
        """
        curves = []
        for (reading, side), reservoir in self._reservoirs.items():
            if not reservoir.seen:
                raise InputError(f"there is no {side} window among the anchors")
            for index, gamma in enumerate(GAMMAS):
                if reading == "anchor":
                    losses = reservoir.values[index]
                else:
                    losses = self._pair_losses(reservoir.values[0], index)
                curves.append(_measure(reading, side, gamma, reservoir.seen, losses))
        return curves

    def _pair_losses(self, x_t: np.ndarray, index: int) -> np.ndarray:
        """Return the losses of pairs at one gamma, in a new array."""
        losses = np.empty_like(x_t)
        for start in range(0, len(x_t), CHUNK):
            chunk = slice(start, start + CHUNK)
            losses[chunk] = self._focal[index](torch.from_numpy(x_t[chunk])).numpy()
        return losses


def _measure(reading: str, side: str, gamma: float, seen: int, losses: np.ndarray) -> LossCurve:
    try:
        cumulative = CumulativeLoss(losses)
    except InputError as error:
        raise InputError(f"{side} windows, reading {reading!r}, gamma {gamma:g}: {error}") from None
    return LossCurve(
        reading=reading,
        side=side,
        gamma=gamma,
        seen=seen,
        sampled=len(losses),
        mean_loss=cumulative.total / len(losses),
        hardest={part: 1 - cumulative.share_of_easiest(1 - part) for part in HARDEST},
        cdf=tuple(cumulative.share_of_easiest(fraction) for fraction in FRACTIONS),
    )


CONCENTRATED = 0.2  # the easiest 80 % carry at most this share of the loss
NO_BURDEN = 0.1  # their loss is at most this part of the loss of the positives


def conclude(curves: Sequence[LossCurve]) -> str:
    """Return one sentence on what the curves mean for the choice of gamma.

    A gamma above 0 removes the loss of easy windows. That matters if, at gamma 0, the easiest 80 %
    of the negative anchors carry much of the negatives' loss (above :data:`CONCENTRATED`) and
    their loss is not small beside that of all foreground anchors (above :data:`NO_BURDEN`). The
    reading is ``anchor``, as in training, without alpha.
    """
    by_gamma = {(c.side, c.gamma): c for c in curves if c.reading == "anchor"}
    easy = {gamma: 1 - by_gamma["negative", gamma].hardest[0.2] for gamma in GAMMAS}
    positive, negative = by_gamma["positive", 0.0], by_gamma["negative", 0.0]
    easy_loss = easy[0.0] * negative.mean_loss * negative.seen
    ratio = easy_loss / (positive.mean_loss * positive.seen)
    found = (
        f"At gamma 0 the easiest 80 % of the negative anchors carry {100 * easy[0.0]:.1f} % of the "
        f"negatives' loss, {ratio:{'.2f' if ratio < 10 else '.0f'}} times the loss of all "
        "positives: with this model and data"
    )
    if easy[0.0] <= CONCENTRATED:
        return (
            f"{found} the loss is on hard negatives already, and a gamma above 0 has little to "
            "take away."
        )
    if ratio <= NO_BURDEN:
        return f"{found} easy negatives are no burden, and a gamma above 0 has little to gain."
    enough = [gamma for gamma in GAMMAS if easy[gamma] <= CONCENTRATED]
    if not enough:
        return (
            f"{found} gamma matters, and as {GAMMAS[-1]:g} still leaves their share at "
            f"{100 * easy[GAMMAS[-1]]:.1f} %, a larger one is worth a trial."
        )
    tried = ", ".join(f"{gamma:g}" for gamma in GAMMAS)
    return (
        f"{found} gamma matters; of {tried} the smallest that brings their share to "
        f"{100 * CONCENTRATED:.0f} % or less is {enough[0]:g} ({100 * easy[enough[0]]:.1f} %)."
    )
