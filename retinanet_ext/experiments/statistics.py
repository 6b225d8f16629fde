"""Means over seeds, confidence intervals of differences, and verdicts on the paper's claims."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, stdev

from retinanet_ext.data.coco_json import count
from retinanet_ext.evaluation.bootstrap import welch_interval
from retinanet_ext.experiments.record import DIVERGED, FAILED, FINISHED, Record
from retinanet_ext.experiments.tables import Claim, Row, Table

HOLDS, FAILS, NOISE = "holds", "does not hold", "within the noise"
ONE_SEED, UNMEASURED = "one seed", "not measured"
WORDS = (HOLDS, FAILS, NOISE, ONE_SEED, UNMEASURED)

RULE = (
    "A claim says that one row of a table has a higher AP than another. The interval is Welch's "
    "95 % t interval of the difference between the two means over seeds. The claim holds if the "
    "whole interval lies above 0, does not hold if it lies below 0, and is within the noise "
    "otherwise. If either row has a single seed, there is no interval and no conclusion. A row "
    "that diverged with every seed loses to one that finished. Means are over the runs that "
    "finished; ± is the standard deviation over seeds."
)

SAID_BY_VALUE = ("loss", "method", "backbone", "background : foreground")
"""Columns whose values need no column name beside them."""

OTHER_DATA = ("imbalance",)
"""Tables whose rows have different test sets. Their APs cannot be compared."""

SHOWN = ("AP", "AP50", "AP75")
"""Metrics of every table, shown with their spread."""

SHOWN_WHERE_PRINTED = ("APs", "APm", "APl", "ms")
"""Metrics of the tables for which the paper prints them."""


@dataclass(frozen=True, eq=False)
class RowResult:
    """A row of a table with its runs, in the order of their seeds."""

    table: Table
    row: Row
    runs: tuple[Record, ...]

    @property
    def label(self) -> str:
        """Return the row's settings on one line."""
        return ", ".join(
            value if name in SAID_BY_VALUE else f"{name} {value}"
            for name, value in self.row.settings.items()
            if value not in ("–", "n/a")
        )

    @property
    def finished(self) -> list[Record]:
        return [run for run in self.runs if run.status == FINISHED]

    @property
    def has_diverged(self) -> bool:
        """Return whether every run that did not fail diverged; False if all failed."""
        return {run.status for run in self.runs} - {FAILED} == {DIVERGED}

    def values(self, metric: str) -> list[float]:
        """Return a metric, or "ms" per image, of the finished runs for which it is defined."""
        values = [
            run.inference_ms if metric == "ms" else run.metrics.get(metric) for run in self.finished
        ]
        return [value for value in values if value is not None and math.isfinite(value)]

    def cells(self, metrics: Sequence[str]) -> list[str]:
        """Return the mean of each metric as text; AP, AP50 and AP75 with their spread."""
        cells = []
        for metric, values in zip(metrics, map(self.values, metrics), strict=True):
            mean = number(fmean(values) if values else None)
            cells.append(with_spread(values) if metric in SHOWN else mean)
        return cells

    @property
    def notes(self) -> list[str]:
        """Return a line per distinct message of the runs that did not finish, with their seeds."""
        seeds: dict[str, list[str]] = {}
        for run in self.runs:
            if run.status != FINISHED:
                message = run.message or run.status
                if not message.startswith(run.status):
                    message = f"{run.status}: {message}"
                seeds.setdefault(message, []).append(str(run.seed))
        return [
            f"seed{'s' if len(numbers) > 1 else ''} {', '.join(numbers)}: {message}"
            for message, numbers in seeds.items()
        ]

    @property
    def status(self) -> str:
        """Return the number of runs, and the notes on those that did not finish."""
        if not self.runs or not self.notes:
            return count(len(self.runs), "seed") if self.runs else "not run"
        return f"{len(self.finished)} of {len(self.runs)} finished; {'; '.join(self.notes)}"


@dataclass(frozen=True)
class Verdict:
    """The verdict on a claim of the paper.

    Attributes:
        word: one of :data:`WORDS`.
        difference: mean AP of the better row minus that of the worse one; None if one has no AP.
        interval: Welch's interval of the difference; None with a single seed on either side.
        paper_difference: the same difference between the printed APs.
        remarks: runs that did not finish, and which row the better one was compared with.
    """

    claim: Claim
    word: str
    difference: float | None
    interval: tuple[float, float] | None
    paper_difference: float | None
    remarks: tuple[str, ...]

    @property
    def text(self) -> str:
        """Return the claim, followed by the remarks in brackets."""
        return self.claim.text + (f" ({'; '.join(self.remarks)})" if self.remarks else "")

    @property
    def measured(self) -> str:
        """Return the difference, followed by its interval in brackets."""
        if self.interval is None:
            return signed(self.difference)
        low, high = map(signed, self.interval)
        return f"{signed(self.difference)} ({low} to {high})"


def highest(rows: Sequence[RowResult]) -> RowResult | None:
    """Return the row with the highest mean AP, or None if no row has an AP."""
    rows = [row for row in rows if row.values("AP")]
    return max(rows, key=lambda row: fmean(row.values("AP")), default=None)


def judge(claim: Claim, better: RowResult, others: Sequence[RowResult]) -> Verdict:
    """Compare ``better`` with the row of ``others`` that has the highest AP; see :data:`RULE`."""
    worse = highest(others) or others[0]
    a, b = better.values("AP"), worse.values("AP")
    difference = fmean(a) - fmean(b) if a and b else None
    interval = welch_interval(a, b)
    remarks = [
        f"{row.label}: {note}"
        for row in (better, worse)
        for note in (row.notes if row.runs else ["not run"])
    ]
    if len(others) > 1 and b:
        remarks.append(f"the highest of them: {worse.label}")
    papers = [row.row.paper.get("AP") for row in (better, *others)]
    if (a and worse.has_diverged) or (b and better.has_diverged):
        seeds = min(sum(run.status != FAILED for run in row.runs) for row in (better, worse))
        word = ONE_SEED if seeds < 2 else HOLDS if a else FAILS
    elif difference is None:
        word = UNMEASURED
    elif interval is None:
        word = ONE_SEED
    else:
        word = HOLDS if interval[0] > 0 else FAILS if interval[1] < 0 else NOISE
    paper = None if None in papers else papers[0] - max(papers[1:])
    return Verdict(claim, word, difference, interval, paper, tuple(remarks))


@dataclass(frozen=True, eq=False)
class TableResult:
    """A table of the paper with the runs of its rows."""

    table: Table
    rows: tuple[RowResult, ...]

    @property
    def measured(self) -> list[RowResult]:
        """Return the rows with at least one run, whatever its status."""
        return [row for row in self.rows if row.runs]

    @property
    def metrics(self) -> list[str]:
        """Return the metrics shown for this table."""
        printed = {metric for row in self.rows for metric in row.row.paper}
        return [*SHOWN, *(metric for metric in SHOWN_WHERE_PRINTED if metric in printed)]

    @property
    def heading(self) -> str:
        name, title = self.table.name, self.table.title
        return f"Table {name}: {title}" if name[0].isdigit() else title

    @property
    def best(self) -> RowResult | None:
        """Return the row with the highest mean AP; None if the rows' APs cannot be compared."""
        return None if self.table.name in OTHER_DATA else highest(self.rows)

    @cached_property
    def verdicts(self) -> list[Verdict]:
        rows = {row.row.name: row for row in self.rows}
        return [
            judge(claim, rows[claim.better], [rows[name] for name in claim.worse])
            for claim in self.table.claims
        ]


def number(value: float | None) -> str:
    """Return a number with one decimal, as the paper prints it; a dash for None."""
    return "–" if value is None else f"{value:.1f}"


def signed(value: float | None) -> str:
    """Return a difference with its sign, the minus typographic; a dash for None."""
    return "–" if value is None else f"{round(value, 1) + 0.0:+.1f}".replace("-", "−")


def with_spread(values: Sequence[float]) -> str:
    """Return mean ± sample standard deviation; a single value alone; a dash for no value."""
    if len(values) < 2:
        return number(values[0] if values else None)
    return f"{fmean(values):.1f} ± {stdev(values):.1f}"


def duration(seconds: float) -> str:
    """Return "3 h 05 min", "12 min" or "41 s"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"
