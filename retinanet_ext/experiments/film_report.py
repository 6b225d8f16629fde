"""The films of several runs side by side, and whether their beginning predicts the final AP."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from detectron2.config import CfgNode
from scipy.stats import spearmanr
from tabulate import tabulate

from retinanet_ext.analysis.film import EARLY, GROUPS, QUANTITIES, Film, early_shares
from retinanet_ext.engine import load_config
from retinanet_ext.engine.loss_film import read_film
from retinanet_ext.experiments.record import final_metrics
from retinanet_ext.page import number

MIN_RUNS = 4
"""Runs that a rank correlation needs: of three, any order is likely by chance."""


def read_films(folders: Sequence[str | Path]) -> list[Film]:
    """Return the films of runs, with the AP of each run's last evaluation.

    Raises:
        InputError: a run has no film, or that of another run
    """
    films = []
    for folder in map(Path, folders):
        ap = final_metrics(folder)[0].get("AP")
        films.append(read_film(folder, ap=ap))
    return films


def describe_films(folders: Sequence[str | Path], films: Sequence[Film]) -> str:
    """Return the shares of the first tenth of each training and, of four runs or more, the rank
    correlation of each share with the final AP.
    """
    rows = []
    for film in films:
        early = early_shares(film)
        shares = [number(100 * share) for quantity in QUANTITIES for share in early[quantity]]
        rows.append([film.name, film.cls_loss, *shares, number(film.ap)])
    columns = [f"{quantity}:\n{group}" for quantity in QUANTITIES for group in GROUPS]
    text = [
        f"Percent of loss and gradient, mean over the first {100 * EARLY:.0f} % of the iterations",
        tabulate(rows, ["run", "loss function", *columns, "final AP"], disable_numparse=True),
        _describe_correlation(folders, films),
    ]
    return "\n\n".join(text)


def _describe_correlation(folders: Sequence[str | Path], films: Sequence[Film]) -> str:
    measured = [
        film
        for film in films
        if film.ap is not None and not np.isnan(early_shares(film)["loss"]).any()
    ]
    if len(measured) < MIN_RUNS:
        return (
            f"Rank correlation with the final AP: it needs {MIN_RUNS} runs that were evaluated "
            f"and whose films have their first tenth, got {len(measured)}."
        )
    if len({_test_data(load_config(Path(folder, "config.yaml"))) for folder in folders}) > 1:
        return "Rank correlation with the final AP: none, because the runs have other test data."
    early, aps = zip(*((early_shares(film), film.ap) for film in measured), strict=True)
    correlations = rank_correlations(early, aps)
    rows = [
        [quantity, group, *(number(value, 2) for value in result)]
        for (quantity, group), result in correlations.items()
    ]
    table = tabulate(rows, ["share of", "on", "Spearman", "p"], disable_numparse=True)
    text = f"Rank correlation of these shares with the final AP, {len(measured)} runs\n\n{table}"
    lengths = sorted({film.num_iterations for film in measured})
    if len(lengths) > 1:
        text += (
            f"\n\nThe runs have {lengths[0]} to {lengths[-1]} iterations: the correlation mixes "
            "the effect of the losses with that of the budget."
        )
    return text


def _test_data(cfg: CfgNode) -> str:
    """Return what the test data of a run depend on, as text."""
    custom, sample = cfg.DATASETS.CUSTOM, cfg.DATASETS.SAMPLE
    return repr((cfg.DATASETS.TEST, custom.TEST_JSON, custom.CLASSES, dict(sample)))


def rank_correlations(
    early: Sequence[Mapping[str, Sequence[float]]], aps: Sequence[float]
) -> dict[tuple[str, str], tuple[float, float]]:
    """Return whether an early share predicts the order of the final APs.

    Args:
        early: of each run (or row, then means over seeds) quantity -> shares of the groups, as
            :func:`~retinanet_ext.analysis.film.early_shares` gives them
        aps: of each, on the same test data

    Returns:
        quantity and group -> Spearman's rank correlation and its two-sided p-value; NaN if all
        have the same share or AP. The p-value takes runs for independent, which seeds of one
        loss are not.
    """
    found = {}
    for quantity in QUANTITIES:
        for index, group in enumerate(GROUPS):
            shares = [float(numbers[quantity][index]) for numbers in early]
            constant = len(set(shares)) == 1 or len(set(aps)) == 1
            result = (math.nan,) * 2 if constant else spearmanr(shares, aps)
            found[quantity, group] = (float(result[0]), float(result[1]))
    return found
