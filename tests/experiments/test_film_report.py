"""Films of several runs: the table, the correlation and the figure of one command."""

import json

import pytest

from retinanet_ext.cli import main
from retinanet_ext.engine import load_config
from retinanet_ext.experiments.film_report import describe_films, read_films

pytestmark = pytest.mark.usefixtures("restore_logging")


def make_run(folder, gamma, ap, *opts):
    """The folder of a run of 40 iterations; the higher its AP, the more gradient on positives."""
    folder.mkdir()
    values = ["MODEL.RETINANET.FOCAL_LOSS_GAMMA", gamma, "SOLVER.MAX_ITER", 40, *opts]
    cfg = load_config("tests/engine/tiny.yaml", list(map(str, values)))
    cfg.MODEL.RETINANET.NUM_CLASSES = 1
    (folder / "config.yaml").write_text(cfg.dump())
    shares = {"loss": [0.5, 0.25, 0.25], "gradient": [ap / 100, 0.1, 0.9 - ap / 100]}
    run = {"seed": 1, "cls_loss": f"focal, gamma {gamma:g}, alpha 0.25"}
    lines = [
        {"iteration": i, **run, **shares, "levels": {"p3": shares}, "classes": {"cell": shares}}
        for i in (0, 20)
    ]
    (folder / "loss_film.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    metrics = [{"iteration": 39, "total_loss": 1.0}, {"iteration": 40, "bbox/AP": ap}]
    (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    return str(folder)


def test_films_are_drawn_and_ranked(tmp_path, capsys):
    aps = {0.0: 30.0, 1.0: 20.0, 2.0: 40.0, 5.0: 10.0}
    runs = [make_run(tmp_path / f"gamma{gamma:g}", gamma, ap) for gamma, ap in aps.items()]
    assert main(["plot-losses", "--film", *runs, "--output", str(tmp_path / "film.png")]) == 0
    said = capsys.readouterr().out
    assert "gamma5  focal, gamma 5, alpha 0.25  50.0" in said
    assert "Rank correlation of these shares with the final AP, 4 runs" in said
    lines = {" ".join(line.split()[:-2]): line.split()[-2] for line in said.splitlines() if line}
    assert lines["gradient positives"] == "1.00" and lines["gradient easy negatives"] == "-1.00"
    assert lines["loss positives"] == "–"  # the same in all
    assert (tmp_path / "film.png").stat().st_size > 1000

    assert (
        "needs 4 runs that were evaluated and whose films have their first tenth, got 3"
        in describe(runs[:3])
    )
    longer = make_run(tmp_path / "longer", 3.0, 50.0, "SOLVER.MAX_ITER", 80)
    assert "budget" not in describe(runs)
    assert "have 40 to 80 iterations: the correlation mixes" in describe([*runs, longer])
    other = make_run(tmp_path / "other", 3.0, 50.0, "DATASETS.CUSTOM.TEST_JSON", "other.json")
    assert "none, because the runs have other test data" in describe([*runs, other])


def describe(runs):
    return describe_films(runs, read_films(runs))


def test_what_is_no_film_is_one_line(tmp_path, capsys):
    run = make_run(tmp_path / "run", 2.0, 30.0)
    film = tmp_path / "run/loss_film.json"
    film.write_text(film.read_text().replace('"seed": 1', '"seed": 7'))
    assert main(["plot-losses", "--film", run]) == 2
    line = "loss_film.json, line 1: is the film of another run: seed is 7, and 1 in this run; "
    assert line in capsys.readouterr().err
    for argv in ([], ["focal", "--film", run]):
        with pytest.raises(SystemExit):
            main(["plot-losses", *argv])
        assert "give a figure or losses, or the runs of --film" in capsys.readouterr().err
