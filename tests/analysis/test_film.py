"""The films of runs: what is read off them and drawn."""

import math

import numpy as np
import pytest
from matplotlib.figure import Figure

from retinanet_ext.analysis.film import GROUPS, Film, early_shares
from retinanet_ext.analysis.film_figure import film_figure
from retinanet_ext.experiments.film_report import describe_films, rank_correlations


def make_film(positives, ap, classes=2):
    """A film whose share of the gradient on positives is ``positives``, and .5 after the start."""
    iterations = np.arange(0, 100, 5)
    rest = np.where(iterations < 10, (1 - positives) / 2, 0.25)
    shares = np.stack([1 - 2 * rest, rest, rest], axis=1)
    whole = {"loss": np.tile([0.2, 0.3, 0.5], (20, 1)), "gradient": shares}
    part = {quantity: values / classes for quantity, values in whole.items()}
    names = [f"class {k}" for k in range(classes)]
    return Film(
        "run", "focal", iterations, 100, whole, {"p3": whole}, dict.fromkeys(names, part), ap
    )


def test_the_first_tenth_is_averaged_and_ranked():
    films = [make_film(p, ap) for p, ap in ((0.9, 40), (0.5, 20), (0.7, 35), (0.6, 30), (0.4, 25))]
    assert early_shares(films[0])["gradient"] == pytest.approx([0.9, 0.05, 0.05])
    found = rank_correlations([early_shares(film) for film in films], [film.ap for film in films])
    # Ranks 5, 2, 4, 3, 1 and 5, 1, 4, 3, 2: 1 - 6 (1 + 1) / (5 (25 - 1)).
    assert found["gradient", "positives"][0] == pytest.approx(0.9)
    assert found["gradient", "easy negatives"][0] == pytest.approx(-0.9)
    assert math.isnan(found["loss", "positives"][0])  # the same in all runs


def test_a_record_each_thousand_iterations_is_still_an_early_one():
    film = make_film(0.9, 40)
    assert early_shares(Film(**{**film.__dict__, "num_iterations": 5}))["gradient"][0] > 0.8


def test_a_film_that_begins_late_is_left_out():
    late = make_film(0.9, 40)
    late = Film(**{**late.__dict__, "iterations": late.iterations + 50})
    assert np.isnan(early_shares(late)["loss"]).all()
    text = describe_films([], [late, *[make_film(0.5, 20)] * 3])
    assert "got 3" in text and "nan" not in text


@pytest.mark.parametrize(("films", "columns"), [(1, 3), (2, 2)])
def test_figure_has_a_column_per_run_and_of_one_run_its_parts(films, columns):
    figure = film_figure([make_film(0.9, 40, classes=9)] * films)
    assert isinstance(figure, Figure) and len(figure.axes) == 2 * columns
    labels = [t.get_text() for t in figure.axes[columns].get_legend().get_texts()]
    assert labels == list(GROUPS)
    bands = figure.axes[0].collections
    tops = [band.get_paths()[0].vertices[:, 1].max() for band in bands]
    assert tops == pytest.approx([0.2, 0.5, 1])
    if films == 1:  # the smallest of nine classes are one band
        assert len(figure.axes[2].collections) == 7
