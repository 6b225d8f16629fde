"""Means over seeds, confidence intervals of differences, and verdicts on the paper's claims."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean, stdev

from retinanet_ext.data.coco_json import count
from retinanet_ext.evaluation.bootstrap import LEVEL, contrast, welch_interval
from retinanet_ext.experiments.record import DIVERGED, FAILED, FINISHED, Record
from retinanet_ext.experiments.tables import Claim, Row, Table
from retinanet_ext.page import number, with_interval

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "is not decided"
ONE_SEED, UNMEASURED = "is not decided (one seed)", "not measured"
WORDS = (HOLDS, FAILS, UNDECIDED, ONE_SEED, UNMEASURED)

RULE = (
    "A claim says that one row of a table has a higher AP than another, or a larger lead over a "
    "third. The interval is Welch's 95 % t interval of the difference between the means over "
    "seeds. Its p is corrected by Holm's method over the claims of the table. A claim with p below "
    ".05 holds if the difference is above 0, and does not hold if it is below; any other claim is "
    "not decided. If a row has a single seed, there is no interval and nothing is decided. A row "
    "that diverged with every seed loses to one that finished. Means are over the runs that "
    "finished; ± is the standard deviation over seeds."
)

SAID_BY_VALUE = ("loss", "method", "backbone", "background : foreground")
"""Columns whose values need no column name beside them."""

OTHER_DATA = "dial"
"""The table whose rows have different test sets. Their APs cannot be compared."""

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
    """The verdict on a claim.

    Attributes:
        word: one of :data:`WORDS`.
        difference: mean AP of the better row minus that of the worse one; of a claim about leads,
            the first lead minus the second. None if a row has no AP.
        interval: Welch's interval of the difference; None if a row has a single seed.
        p: Holm's corrected p of the difference; None where there is no interval.
        paper_difference: the same difference between the printed APs.
        remarks: runs that did not finish, and which rows of several were compared.
    """

    claim: Claim
    word: str
    difference: float | None
    interval: tuple[float, float] | None
    p: float | None
    paper_difference: float | None
    remarks: tuple[str, ...]

    @property
    def text(self) -> str:
        """Return the claim, followed by the remarks in brackets."""
        return self.claim.text + (f" ({'; '.join(self.remarks)})" if self.remarks else "")

    @property
    def measured(self) -> str:
        """Return the difference, followed by its interval in brackets."""
        return with_interval(self.difference, self.interval)


def highest(rows: Sequence[RowResult]) -> RowResult | None:
    """Return the row with the highest mean AP, or None if no row has an AP."""
    rows = [row for row in rows if row.values("AP")]
    return max(rows, key=lambda row: fmean(row.values("AP")), default=None)


def holm(values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number, in the same order.

    Source: S. Holm, A Simple Sequentially Rejective Multiple Test Procedure, Scandinavian Journal
    of Statistics 6 (1979).
    """
    corrected, largest = [0.0] * len(values), 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        largest = max(largest, min(1.0, (len(values) - rank) * values[index]))
        corrected[index] = largest
    return corrected


def judge(claims: Sequence[Claim], rows: Mapping[str, RowResult]) -> list[Verdict]:
    """Return the verdicts on the claims of a table; see :data:`RULE`."""
    verdicts = [_compare(claim, rows) for claim in claims]
    tested = [index for index, verdict in enumerate(verdicts) if verdict.p is not None]
    corrected = holm([verdicts[index].p or 0.0 for index in tested])
    for index, p in zip(tested, corrected, strict=True):
        found = verdicts[index]
        sign = HOLDS if (found.difference or 0.0) > 0 else FAILS
        verdicts[index] = replace(found, word=sign if p < 1 - LEVEL else UNDECIDED, p=p)
    return verdicts


def _compare(claim: Claim, rows: Mapping[str, RowResult]) -> Verdict:
    """Return a verdict whose p is not corrected; where there is a p, its word is not final."""
    sides = [[rows[name] for name in names] for names in (claim.better, claim.worse)]
    better, worse = compared = [highest(side) or side[0] for side in sides]
    compared = [*compared, *(rows[name] for name in claim.than)]
    values = [row.values("AP") for row in compared]
    terms = list(zip((1.0, -1.0, -1.0, 1.0), values, strict=False))
    found = contrast(terms)
    difference = sum(factor * fmean(v) for factor, v in terms) if all(values) else None
    remarks = [
        f"{row.label}: {note}"
        for row in compared
        for note in (row.notes if row.runs else ["not run"])
    ]
    chosen = [
        row.label
        for side, row in zip(sides, (better, worse), strict=True)
        if len(side) > 1 and row.values("AP")
    ]
    if chosen:
        of = "each" if len(chosen) > 1 else "them"
        remarks.append(f"the highest of {of}: {' and '.join(chosen)}")
        others = (row for side in sides for row in side if row is not better and row is not worse)
        if missing := [row.label for row in others if not row.runs]:
            remarks.append(f"not run: {' and '.join(missing)}")
    word = UNMEASURED if difference is None else UNDECIDED if found else ONE_SEED
    if not claim.than and ({better.has_diverged, worse.has_diverged} == {True, False}):
        survivor, lost = (worse, better) if better.has_diverged else (better, worse)
        if survivor.values("AP"):
            seeds = min(sum(run.status != FAILED for run in row.runs) for row in (survivor, lost))
            word = ONE_SEED if seeds < 2 else HOLDS if survivor is better else FAILS
    papers = [[row.row.paper.get("AP") for row in side] for side in sides]
    if better.row.baseline is not None:
        papers[1] = [better.row.baseline]
    has_papers = not claim.than and None not in papers[0] + papers[1]
    return Verdict(
        claim,
        word,
        difference,
        found.interval if found else None,
        found.p if found else None,
        max(papers[0]) - max(papers[1]) if has_papers else None,
        tuple(remarks),
    )


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
        return None if self.table.name == OTHER_DATA else highest(self.rows)

    @cached_property
    def verdicts(self) -> list[Verdict]:
        return judge(self.table.claims, {row.row.name: row for row in self.rows})

    @property
    def summary(self) -> list[str]:
        """Return a sentence per verdict, with the claims that it was given to."""
        sentences = []
        for word in WORDS:
            claims = [verdict.claim.text for verdict in self.verdicts if verdict.word == word]
            if claims:
                sentences.append(f"{word[0].upper()}{word[1:]}: {'; '.join(claims)}.")
        return sentences


def probability(value: float | None) -> str:
    """Return a p with three decimals, without the zero before them; a dash for None."""
    if value is None:
        return "–"
    return "< .001" if value < 0.0005 else f"{value:.3f}".removeprefix("0")


def lead(a: Sequence[float], b: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """Return mean(a) - mean(b), and its interval unless one of them has a single seed."""
    return fmean(a) - fmean(b), welch_interval(a, b)


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return Student's 95 % interval of a mean over seeds; None for a single value."""
    found = contrast([(1.0, values)])
    return found.interval if found else None


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
