"""What the runs of a campaign say: means and spreads over seeds, and the paper's claims."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev, variance
from typing import Any

import yaml

from retinanet_ext.errors import InputError
from retinanet_ext.experiments.record import (
    DIVERGED,
    FAILED,
    FINISHED,
    Record,
    read_json,
    read_records,
)
from retinanet_ext.experiments.tables import TABLES, Claim, Row, Table

HOLDS = "holds"
FAILS = "does not hold"
NOISE = "within the noise"
ONE_SEED = "one seed"
UNMEASURED = "not measured"

RULE = (
    "A claim says that one row of a table has a higher AP than another. With two or more seeds "
    "in both rows it holds, or does not hold, where the difference of the two means is larger "
    "than twice its standard error, the variance pooled over the two rows; else it is within "
    "the noise. A claim that nothing is gained holds there too. With two seeds a row, chance "
    "alone goes beyond that in 18 % of cases (9 % to each side), with three in 12 %, with five "
    "in 8 %. With one seed the difference is shown and nothing is concluded. A row that "
    "diverged with every seed loses to one that finished. Means are over the runs that "
    "finished; ± is the standard deviation over seeds, and beside a difference twice its "
    "standard error."
)

# Its rows differ in their data, so their APs are not those of one test set.
OTHER_DATA = ("imbalance",)

SAID_BY_VALUE = ("loss", "method", "backbone", "background : foreground")
"""Settings whose values need no name."""

MAX_CLOSE = 5  # rows named as not told apart from the best

SHOWN = ("AP", "AP50", "AP75")
SHOWN_WHERE_PRINTED = ("APs", "APm", "APl", "ms")


def mean(values: Sequence[float]) -> float | None:
    """Return the mean, or None where there is no value."""
    return fmean(values) if values else None


def spread(values: Sequence[float]) -> float | None:
    """Return the standard deviation (n - 1), or None below two values."""
    return stdev(values) if len(values) > 1 else None


def standard_error(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the standard error of mean(a) - mean(b), the variance pooled; two values or more."""
    degrees = len(a) + len(b) - 2
    pooled = ((len(a) - 1) * variance(a) + (len(b) - 1) * variance(b)) / degrees
    return math.sqrt(pooled * (1 / len(a) + 1 / len(b)))


@dataclass(frozen=True, eq=False)
class RowResult:
    """A row of a table with its runs, by seed."""

    table: Table
    row: Row
    runs: tuple[Record, ...]

    @property
    def label(self) -> str:
        """What the paper prints left of the numbers, in one line."""
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
        """Whether it diverged with every seed that did not fail."""
        return {run.status for run in self.runs} - {FAILED} == {DIVERGED}

    def values(self, metric: str) -> list[float]:
        """Return a metric (percent; "ms" an image) of the finished runs where it is defined."""
        values = [
            run.inference_ms if metric == "ms" else run.metrics.get(metric) for run in self.finished
        ]
        return [value for value in values if value is not None and math.isfinite(value)]

    def cells(self, metrics: Sequence[str]) -> list[str]:
        """Return the mean of each metric, with the spread of the three shown for every table."""
        return [
            with_spread(values) if metric in SHOWN else number(mean(values))
            for metric in metrics
            for values in [self.values(metric)]
        ]

    @property
    def status(self) -> str:
        """How many runs there are, and what became of those that did not finish."""
        if not self.runs:
            return "not run"
        if not self.notes:
            return _count(len(self.runs), "seed")
        return f"{len(self.finished)} of {len(self.runs)} finished; {'; '.join(self.notes)}"

    @property
    def notes(self) -> list[str]:
        """What became of the runs that did not finish, one line each kind."""
        seeds: dict[str, list[int]] = {}
        for run in self.runs:
            if run.status != FINISHED:
                message = run.message or run.status
                if not message.startswith(run.status):
                    message = f"{run.status}: {message}"
                seeds.setdefault(message, []).append(run.seed)
        return [f"{_seeds(numbers)}: {message}" for message, numbers in seeds.items()]


@dataclass(frozen=True)
class Verdict:
    """A claim of the paper beside what was measured; differences in points of AP."""

    claim: Claim
    word: str
    difference: float | None = None
    error: float | None = None
    paper_difference: float | None = None
    remarks: tuple[str, ...] = ()

    @property
    def measured(self) -> str:
        """The difference, with twice its standard error."""
        if self.error is None:
            return signed(self.difference)
        return f"{signed(self.difference)} ± {2 * self.error:.1f}"


@dataclass(frozen=True, eq=False)
class TableResult:
    """A table of the paper with the runs of its rows."""

    table: Table
    rows: tuple[RowResult, ...]

    @property
    def measured(self) -> list[RowResult]:
        """The rows that were run, whatever became of them."""
        return [row for row in self.rows if row.runs]

    @property
    def metrics(self) -> list[str]:
        """The metrics shown: the paper's three, and others that it prints for this table."""
        printed = {metric for row in self.rows for metric in row.row.paper}
        return [*SHOWN, *(metric for metric in SHOWN_WHERE_PRINTED if metric in printed)]

    @property
    def paper_columns(self) -> list[str]:
        """The paper's columns: its metrics, or its words alone, or nothing."""
        if any(row.row.paper for row in self.rows):
            return self.metrics
        return ["outcome"] if any(row.row.outcome for row in self.rows) else []

    @property
    def best(self) -> RowResult | None:
        """The row of the highest mean AP, the first of equals; none if their data differ."""
        if self.table.name in OTHER_DATA:
            return None
        return max(_with_ap(self.rows), key=_mean_ap, default=None)

    @property
    def paper_best(self) -> RowResult | None:
        """The row of the paper's highest AP, the first of equals."""
        rows = [row for row in self.rows if "AP" in row.row.paper]
        return max(rows, key=lambda row: row.row.paper["AP"], default=None)

    @property
    def heading(self) -> str:
        name, title = self.table.name, self.table.title
        return f"Table {name}: {title}" if name[0].isdigit() else title

    @property
    def introduction(self) -> str:
        """Where it stands in the paper, and the note to it."""
        source = self.table.source
        return f"{source[0].upper()}{source[1:]}. {self.table.note}".strip()

    @property
    def settings(self) -> list[str]:
        """The columns left of the numbers."""
        return list(dict.fromkeys(name for row in self.rows for name in row.row.settings))

    @cached_property
    def verdicts(self) -> list[Verdict]:
        rows = {row.row.name: row for row in self.rows}
        return [
            judge(claim, rows[claim.better], [rows[name] for name in claim.others])
            for claim in self.table.claims
        ]


def _highest(rows: Sequence[RowResult]) -> RowResult:
    """Return the row of the highest mean AP; the first where none has one."""
    return max(_with_ap(rows), key=_mean_ap, default=rows[0])


def judge(claim: Claim, better: RowResult, others: Sequence[RowResult]) -> Verdict:
    """Hold a claim against the runs of its rows, by :data:`RULE`; of ``others`` the best counts."""
    worse = _highest(others)
    remarks = [
        f"{row.label}: {note}" if row.runs else f"{row.label}: not run"
        for row in (better, worse)
        for note in row.notes or [""]
        if note or not row.runs
    ]
    if len(others) > 1 and worse.values("AP"):
        remarks.append(f"the highest of them: {worse.label}")
    papers = [row.row.paper.get("AP") for row in (better, *others)]
    paper = None if None in papers else papers[0] - max(papers[1:])

    def verdict(word: str, *numbers: float) -> Verdict:
        return Verdict(claim, word, *numbers, paper_difference=paper, remarks=tuple(remarks))

    a, b = better.values("AP"), worse.values("AP")
    if (a and worse.has_diverged) or (b and better.has_diverged):
        runs_of_both = [
            [run for run in row.runs if run.status != FAILED] for row in (better, worse)
        ]
        if min(map(len, runs_of_both)) < 2:
            return verdict(ONE_SEED)
        return verdict(HOLDS if a else FAILS)
    if not a or not b:
        return verdict(UNMEASURED)
    difference = fmean(a) - fmean(b)
    if min(len(a), len(b)) < 2:
        return verdict(ONE_SEED, difference)
    error = standard_error(a, b)
    if abs(difference) <= 2 * error:
        return verdict(NOISE if claim.strict else HOLDS, difference, error)
    return verdict(HOLDS if difference > 0 else FAILS, difference, error)


@dataclass(frozen=True)
class LossCdf:
    """An analysis of the loss of a run's checkpoint, as the loss analysis left it (figure 4)."""

    run: Record
    name: str
    svg: bytes
    conclusion: str
    text: str


@dataclass(frozen=True)
class Results:
    """A campaign: its runs, and the tables of which at least one row was run."""

    folder: Path
    info: Mapping[str, Any]
    runs: tuple[Record, ...]
    tables: tuple[TableResult, ...]
    configs: Mapping[Path, Mapping[str, Any]]
    loss_cdfs: tuple[LossCdf, ...]
    superseded: tuple[Record, ...] = ()

    @property
    def full_tables(self) -> list[TableResult]:
        """The tables in which rows can be compared; all where there is none.

        A row stands in several tables, so that one table that was run leaves others with a
        single row.
        """
        several = [table for table in self.tables if len(table.measured) > 1]
        return several or list(self.tables)

    @property
    def sparse_tables(self) -> list[TableResult]:
        """The others."""
        full = self.full_tables
        return [table for table in self.tables if table not in full]

    @property
    def verdicts(self) -> list[tuple[TableResult, Verdict]]:
        return [(table, verdict) for table in self.full_tables for verdict in table.verdicts]

    @cached_property
    def ranking(self) -> list[RowResult]:
        """The rows that can be compared by mean AP, highest first.

        They share data, model, image size and budget: of several such groups, the one of most
        rows. A row that stands in several tables is there once.
        """
        groups: dict[str, dict[tuple[Path, ...], RowResult]] = {}
        for table in self.full_tables:
            for row in _with_ap(table.rows) if table.table.name not in OTHER_DATA else ():
                setting = self._setting(row.finished[0])
                groups.setdefault(setting, {}).setdefault(tuple(r.folder for r in row.runs), row)
        largest = max(groups.values(), key=len, default={})
        return sorted(largest.values(), key=_mean_ap, reverse=True)

    def _setting(self, run: Record) -> str:
        config = self.configs[run.folder]
        return "; ".join(_try(describe, config) for describe in (_model, _short_side, _budget))

    @property
    def close_to_best(self) -> list[RowResult]:
        """The rows whose difference from the best is within the noise, if seeds tell."""
        best, *others = self.ranking
        a = best.values("AP")
        return [
            row
            for row in others
            if min(len(a), len(b := row.values("AP"))) > 1
            and fmean(a) - fmean(b) <= 2 * standard_error(a, b)
        ]

    @property
    def headline(self) -> str:
        """How many claims came out how, in one sentence."""
        counts = Counter(verdict.word for _, verdict in self.verdicts)
        if not counts:
            return "The tables that were run make no claim."
        phrases = {
            HOLDS: ("holds", "hold"),
            FAILS: ("does not hold", "do not hold"),
            NOISE: ("is within the noise", "are within the noise"),
            ONE_SEED: ("rests on one seed", "rest on one seed"),
            UNMEASURED: ("is not measured", "are not measured"),
        }
        parts = [
            f"{counts[word]} {phrase[counts[word] > 1]}"
            for word, phrase in phrases.items()
            if counts[word]
        ]
        total = sum(counts.values())
        claims = "claim" if total == 1 else "claims"
        return f"Of {total} {claims} of the tables that were run, {_join(parts)}."

    @property
    def best_sentence(self) -> str:
        """Which row is best, and which are not told apart from it."""
        if not self.ranking:
            # Rows whose data differ are not ranked.
            return "" if any(_with_ap(t.rows) for t in self.tables) else "No row has an AP yet."
        best = self.ranking[0]
        values = best.values("AP")
        ap = f"AP {with_spread(values)}".replace(" ", "\u00a0")  # in one line
        sentences = [
            f"Best of {_count(len(self.ranking), 'row')} of equal model, image size and budget: "
            f"{best.label} (table {best.table.name}), "
            f"{ap} with {_count(len(values), 'seed')}."
        ]
        if len(values) < 2 and len(self.ranking) > 1:
            sentences.append("One seed does not tell it from its neighbours.")
        close = [f"{row.label} (table {row.table.name})" for row in self.close_to_best]
        if len(close) > MAX_CLOSE:
            close[MAX_CLOSE:] = [f"{len(close) - MAX_CLOSE} more"]
        if close:
            sentences.append(f"Within the noise of it: {_join(close, '; ')}.")
        if len(self.ranking) > 1:
            sentences.append("Chosen as the highest of several means, its own is likely too high.")
        return " ".join(sentences)

    @property
    def pictures(self) -> list[tuple[str, Path]]:
        """Captions and files of the detections of the best and of the worst row.

        Of each row the run of its first seed that finished.
        """
        ends = {"Best": self.ranking[:1], "Worst": self.ranking[1:][-1:]}
        return [
            (f"{which} row: {row.label}, seed {run.seed}, AP {number(run.metrics.get('AP'))}", path)
            for which, rows in ends.items()
            for row in rows
            for run in row.finished[:1]
            if (path := run.folder / "detections.png").is_file()
        ]

    @property
    def warnings(self) -> list[str]:
        """What a reader must know before comparing rows."""
        commits = _distinct(run.commit for run in self.runs)
        warnings = []
        if len(commits) > 1:
            warnings.append(
                f"Runs of more than one commit are mixed: {', '.join(commits)}. Differences "
                "between rows may come from the code."
            )
        if self.superseded:
            names = ", ".join(run.folder.name for run in self.superseded)
            warnings.append(f"Left out, as their rows have changed since: {names}.")
        jobs = max((run.hardware.get("jobs", 1) for run in self.runs), default=1)
        if jobs > 1:
            warnings.append(
                f"Up to {jobs} runs went on at a time, which lengthens inference times; for those, "
                "run tables 1e and 2 one at a time."
            )
        for table in self.tables:
            budgets = _distinct(run.iterations for row in table.rows for run in row.finished)
            if len(budgets) > 1:
                warnings.append(
                    f"Rows of table {table.table.name} did not have the same number of "
                    f"iterations: {', '.join(budgets)}."
                )
        return warnings

    @property
    def facts(self) -> list[tuple[str, str]]:
        """What was run, with what and on what: a name and a value each."""
        facts = [
            ("Preset", str(self.info.get("preset", ""))),
            ("Data", _data(self.info)),
            ("Model", self._from_configs(_model)),
            ("Short side", self._from_configs(_short_side)),
            ("Budget", self._from_configs(_budget)),
            ("Options", _options(self.info)),
            ("Rows", self._progress()),
            ("Runs", self._run_counts()),
            ("Seeds", ", ".join(_distinct(run.seed for run in self.runs))),
            ("Wall time", duration(sum(run.wall_seconds or 0 for run in self.runs)) + " in all"),
            ("Dates", _dates(self.runs)),
            ("Hardware", "; ".join(_distinct(_hardware(run.hardware) for run in self.runs))),
            ("Versions", _versions(self.runs)),
            ("Commit", ", ".join(_distinct(run.commit for run in self.runs))),
        ]
        return [(name, value) for name, value in facts if value]

    def _progress(self) -> str:
        tables = self.full_tables
        rows = [row for table in tables for row in table.rows]
        names = ", ".join(table.table.name for table in tables)
        done = sum(bool(row.finished) or row.has_diverged for row in rows)
        return f"{done} of {len(rows)} rows done in {_count(len(tables), 'table')} ({names})"

    def _run_counts(self) -> str:
        counts = Counter(run.status for run in self.runs)
        parts = [f"{counts[s]} {s}" for s in (FINISHED, DIVERGED, FAILED) if counts[s]]
        return ", ".join(parts)

    def _from_configs(self, describe: Callable[[Mapping[str, Any]], str]) -> str:
        return "; ".join(_distinct(_try(describe, config) for config in self.configs.values()))


def read_results(campaign: Path) -> Results:
    """Read the records of a campaign's folder.

    Raises:
        InputError: no campaign, or none of its runs has ended
    """
    if not campaign.is_dir():
        raise InputError(f"{campaign}: there is no such folder; name one that the runner wrote")
    runs = tuple(sorted(read_records(campaign), key=lambda run: (run.seed, run.folder.name)))
    if not runs:
        raise InputError(f"{campaign}: no run has ended here yet, so there is nothing to report")
    runs, superseded = _newest(runs)
    tables = []
    for table in TABLES.values():
        rows = tuple(
            RowResult(
                table, row, tuple(run for run in runs if f"{table.name}/{row.name}" in run.rows)
            )
            for row in table.rows
        )
        if any(row.runs for row in rows):
            tables.append(TableResult(table, rows))
    configs = {run.folder: _read_config(run.folder / "config.yaml") for run in runs}
    info = read_json(campaign / "campaign.json")
    cdfs = tuple(_read_loss_cdfs(runs))
    return Results(campaign, info, runs, tuple(tables), configs, cdfs, superseded)


def _newest(runs: Sequence[Record]) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
    """Return the runs to show, and those of a row that has another config since."""
    key_of_row: dict[str, str] = {}
    for run in sorted(runs, key=lambda run: run.ended):
        key_of_row.update(dict.fromkeys(run.rows, run.key))
    shown = tuple(run for run in runs if any(key_of_row[row] == run.key for row in run.rows))
    return shown, tuple(run for run in runs if run not in shown)


def duration(seconds: float) -> str:
    """Return "3 h 05 min", "12 min" or "41 s"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"


def number(value: float | None) -> str:
    """Return a number as the paper prints it; a dash where there is none."""
    return "–" if value is None else f"{value:.1f}"


def signed(value: float | None) -> str:
    """Return a difference with its sign, a typographic minus; a dash where there is none."""
    return "–" if value is None else f"{round(value, 1) + 0.0:+.1f}".replace("-", "−")


def with_spread(values: Sequence[float]) -> str:
    """Return mean ± standard deviation; without the latter below two values."""
    sd = spread(values)
    return number(mean(values)) if sd is None else f"{fmean(values):.1f} ± {sd:.1f}"


def _with_ap(rows: Iterable[RowResult]) -> list[RowResult]:
    return [row for row in rows if row.values("AP")]


def _mean_ap(row: RowResult) -> float:
    return fmean(row.values("AP"))


def _read_config(path: Path) -> Mapping[str, Any]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=loader) or {}
    except (OSError, ValueError, yaml.YAMLError):  # a run that failed may have left none
        return {}


def _read_loss_cdfs(runs: Sequence[Record]) -> Iterator[LossCdf]:
    for run in runs:
        for path in sorted(run.folder.glob("loss_cdf*/loss_cdf.json")):
            content = read_json(path)
            try:
                svg = path.with_suffix(".svg").read_bytes()
            except FileNotFoundError:
                continue
            text, conclusion = (str(content.get(key, "")) for key in ("text", "conclusion"))
            yield LossCdf(run, f"{path.parent.name}_{run.folder.name}", svg, conclusion, text)


def _distinct(values: Iterable[Any]) -> list[str]:
    """Return each non-empty value once, as text: numbers by size, others as they come."""
    values = list(dict.fromkeys(value for value in values if value not in ("", None)))
    if all(isinstance(value, (int, float)) for value in values):
        values.sort()
    return [str(value) for value in values]


def _data(info: Mapping[str, Any]) -> str:
    """Return what was trained and tested on, from ``campaign.json``."""
    return "; ".join(f"{side}: {data['name']}" for side, data in info.get("data", {}).items())


def _options(info: Mapping[str, Any]) -> str:
    """Return the command line's config values, except for the data."""
    opts = info.get("opts", [])
    return ", ".join(
        f"{key} {value}"
        for key, value in zip(opts[::2], opts[1::2], strict=True)
        if not key.startswith(("DATASETS.CUSTOM.TRAIN_", "DATASETS.CUSTOM.TEST_"))
    )


def _try(describe: Callable[[Mapping[str, Any]], str], config: Mapping[str, Any]) -> str:
    try:
        return describe(config)
    except (KeyError, TypeError, IndexError):  # a config of another kind of model, or none
        return ""


def _model(config: Mapping[str, Any]) -> str:
    resnet = config["MODEL"]["RESNETS"]
    if resnet["NUM_GROUPS"] > 1:
        return f"ResNeXt-{resnet['DEPTH']}-{resnet['NUM_GROUPS']}x{resnet['WIDTH_PER_GROUP']}d-FPN"
    return f"ResNet-{resnet['DEPTH']}-FPN"


def _short_side(config: Mapping[str, Any]) -> str:
    sizes = config["INPUT"]["MIN_SIZE_TRAIN"]
    sizes = [sizes] if isinstance(sizes, int) else list(sizes)
    train = str(sizes[0]) if len(sizes) == 1 else f"{min(sizes)} to {max(sizes)}"
    test = str(config["INPUT"]["MIN_SIZE_TEST"])
    return f"{train} px" if train == test else f"{train} px, test {test} px"


def _budget(config: Mapping[str, Any]) -> str:
    solver = config["SOLVER"]
    iterations, images = solver["MAX_ITER"], solver["IMS_PER_BATCH"]
    return f"{iterations} iterations of {images} images, learning rate {solver['BASE_LR']:g}"


def _dates(runs: Sequence[Record]) -> str:
    first = min((run.started[:10] for run in runs if run.started), default="")
    last = max((run.ended[:10] for run in runs if run.ended), default="")
    return first if first == last else f"{first} to {last}"


def _hardware(hardware: Mapping[str, Any]) -> str:
    gpus = Counter(map(str, hardware.get("gpus") or []))
    if gpus:
        parts = [f"{number} × {name}" if number > 1 else name for name, number in gpus.items()]
    else:
        parts = [
            f"{hardware.get('cpu', 'CPU')}, {_count(hardware.get('threads', 0), 'thread')}, no GPU"
        ]
    if hardware.get("num_processes", 1) > 1:
        parts.append(f"{hardware['num_processes']} processes")
    return ", ".join(parts)


def _versions(runs: Sequence[Record]) -> str:
    packages = dict.fromkeys(package for run in runs for package in run.versions)
    return ", ".join(
        f"{package} {' / '.join(_distinct(run.versions.get(package) for run in runs))}"
        for package in packages
    )


def _seeds(numbers: Sequence[int]) -> str:
    return f"seed{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _join(parts: Sequence[str], comma: str = ", ") -> str:
    return " and ".join([comma.join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]
