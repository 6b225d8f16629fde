"""Sentences and tables of the tables beyond the paper, in GitHub's Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from statistics import fmean

from retinanet_ext.experiments.grid_figures import Points, budget_points, dial_points
from retinanet_ext.experiments.grids import LOSSES, REFERENCE, REFERENCE_LABEL
from retinanet_ext.experiments.statistics import (
    RowResult,
    TableResult,
    lead,
    with_spread,
)
from retinanet_ext.page import escape, markdown_table, number, with_interval


def grid_blocks(table: TableResult) -> Iterator[str]:
    """Yield the blocks of Markdown that answer the question of a table beyond the paper."""
    if table.table.name == "budget":
        sentences = crossings(budget_points(table))
    elif table.table.name == "init":
        sentences = _starts(table)
    elif table.table.name == "dial":
        sentences = _leads(table)
    else:
        sentences = []
    if sentences:
        yield "\n".join(f"- {escape(sentence)}" for sentence in sentences)
    if table.table.name == "fair-steps" and (rows := best_rates(table)):
        numbers = ("AP at the common rate", "best rate", "AP at it", "AP, rate by other seeds")
        yield markdown_table(("loss", *numbers), rows, numbers=(1, 3, 4))
        yield (
            "The best rate has the highest mean of those with the most seeds, which favours every "
            "loss by some chance. In the last column each seed is scored at the rate that is best "
            "for the other seeds, which does not."
        )


def crossings(points: Points) -> list[str]:
    """Return a sentence per loss: where its line crosses that of the reference, if it does.

    Args:
        points: AP of each seed by loss and iterations
    """
    return [
        _crossing(label, line, points[REFERENCE_LABEL])
        for label, line in points.items()
        if label != REFERENCE_LABEL and len(line.keys() & points.get(REFERENCE_LABEL, {})) > 1
    ]


def _crossing(
    label: str, line: Mapping[float, Sequence[float]], reference: Mapping[float, Sequence[float]]
) -> str:
    leads = {x: lead(line[x], reference[x]) for x in sorted(line.keys() & reference.keys())}
    said = "; ".join(f"{with_interval(*found)} at {x:g}" for x, found in leads.items())
    crossed = [(x, y) for x, y in pairwise(leads) if (leads[x][0] > 0) != (leads[y][0] > 0)]
    if not crossed:
        side = "ahead of" if next(iter(leads.values()))[0] > 0 else "behind"
        return (
            f"{label} does not cross {REFERENCE_LABEL}: by the means it is {side} it at every "
            f"number of iterations ({said})."
        )
    places = []
    for x, y in crossed:
        before, after = leads[x][0], leads[y][0]
        place = math.exp(math.log(x) + math.log(y / x) * before / (before - after))
        places.append(f"{float(f'{place:.2g}'):g}")
    open_ends = [x for pair in crossed for x in pair if not _leaves_out_zero(leads[x][1])]
    doubt = ""
    if open_ends:
        at = " and ".join(f"{x:g}" for x in dict.fromkeys(open_ends))
        doubt = f" The crossing is not decided, because the interval at {at} does not leave out 0."
    return (
        f"{label} crosses {REFERENCE_LABEL} near {' and '.join(places)} iterations, by the means "
        f"({said}).{doubt}"
    )


def _leaves_out_zero(interval: tuple[float, float] | None) -> bool:
    return interval is not None and (interval[0] > 0 or interval[1] < 0)


def _starts(table: TableResult) -> list[str]:
    """Return a sentence per loss: its lead over the reference from either start."""
    rows = {row.row.name: row.values("AP") for row in table.rows}
    sentences = []
    for name, (label, _) in LOSSES.items():
        parts = [
            f"{with_interval(*lead(mine, other))} from {words} weights"
            for start, words in (("imagenet", "ImageNet"), ("random", "random"))
            if name != REFERENCE
            and (mine := rows[f"{name}-{start}"])
            and (other := rows[f"{REFERENCE}-{start}"])
        ]
        if parts:
            sentences.append(f"{label}, minus {REFERENCE_LABEL}: {', '.join(parts)}.")
    return sentences


def _leads(table: TableResult) -> list[str]:
    """Return a sentence per normaliser: the lead of the focal loss at each imbalance."""
    sentences = []
    for normalizer in ("moving average", "foreground"):
        points = dial_points(table, normalizer)
        focal = points.get("focal", {})
        for loss in ("CE", "α-CE"):
            other = points.get(loss, {})
            parts = [
                f"{with_interval(*lead(focal[x], other[x]))} at 1:{x:g}"
                for x in sorted(focal.keys() & other.keys())
            ]
            if parts:
                sentences.append(
                    f"The lead of the focal loss over {loss}, normaliser {normalizer}: "
                    f"{', '.join(parts)}."
                )
    return sentences


def best_rates(table: TableResult) -> list[tuple[str, ...]]:
    """Return a row of cells per loss: AP at the common rate, and at its own."""
    losses: dict[str, dict[float, RowResult]] = {}
    for row in table.rows:
        if row.values("AP"):
            rates = losses.setdefault(row.row.settings["loss"], {})
            rates[row.row.factors["SOLVER.BASE_LR"]] = row
    cells = []
    for loss, rates in losses.items():
        most = max(len(row.values("AP")) for row in rates.values())
        full = {factor: row for factor, row in rates.items() if len(row.values("AP")) == most}
        best = max(full, key=lambda factor: fmean(full[factor].values("AP")))
        common = rates[1.0].values("AP") if 1.0 in rates else []
        held_out = rate_by_other_seeds(
            [
                {run.seed: ap for run in row.finished if (ap := run.metrics.get("AP")) is not None}
                for row in full.values()
            ]
        )
        own = with_spread(full[best].values("AP"))
        cells.append((escape(loss), with_spread(common), f"x {best:g}", own, number(held_out)))
    return cells


def rate_by_other_seeds(rates: Sequence[Mapping[int, float]]) -> float | None:
    """Return the mean over seeds of AP at the rate that is best for the other seeds.

    Args:
        rates: AP by seed, for each rate

    Returns:
        None if fewer than two seeds have all the rates
    """
    seeds = set.intersection(*(set(rate) for rate in rates))
    if len(seeds) < 2:
        return None
    scores = []
    for seed in seeds:
        others = seeds - {seed}
        best = max(rates, key=lambda rate: fmean(rate[other] for other in others))
        scores.append(best[seed])
    return fmean(scores)
