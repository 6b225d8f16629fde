"""Figures: what is in them, and how they are written."""

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from retinanet_ext.analysis.loss_cdf import GAMMAS, PAPER, PAPER_FRACTIONS, WindowSample
from retinanet_ext.analysis.plots import draw_losses, figure_4, save_figure
from retinanet_ext.cli import main
from retinanet_ext.errors import InputError


def make_curves():
    sample = WindowSample()
    logits = torch.randn(5000, 2, generator=torch.Generator().manual_seed(0)) - 4
    labels = torch.full((5000,), 2)
    labels[:50] = 1
    sample.add(logits, labels)
    return sample.curves()


def test_figure_1_is_drawn_against_p_t():
    name, figure = draw_losses(["1"])
    (axes,) = figure.axes
    assert name == "figure_1" and axes.get_ylim() == (0, 5)
    for line, gamma in zip(axes.lines, (0, 0.5, 1, 2, 5), strict=True):
        p_t, loss = line.get_data()
        assert p_t[0] == pytest.approx(0.001) and p_t[-1] > 0.999
        np.testing.assert_allclose(loss, -((1 - p_t) ** gamma) * np.log(p_t), atol=1e-12)


@pytest.mark.parametrize(("number", "limit", "at_zero"), [("5", 5, np.log(2)), ("6", 10, -0.5)])
def test_figures_5_and_6(number, limit, at_zero):
    _, figure = draw_losses([number])
    (axes,) = figure.axes
    assert axes.get_xlim() == (-limit, limit)
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["CE", "FL, γ = 2", "FL*, γ = 2, β = 1", "FL*, γ = 4, β = 0"]
    x_t, values = axes.lines[0].get_data()
    assert values[x_t == 0] == pytest.approx(at_zero)


def test_losses_of_one_s_choice():
    name, figure = draw_losses(["hinge:margin=0.7", "focal"])
    loss, gradient = figure.axes
    assert name == "losses" and len(loss.lines) == len(gradient.lines) == 2
    for message in (["1", "focal"], ["5", "6"]):
        with pytest.raises(InputError, match="is drawn alone"):
            draw_losses(message)


def test_figure_4_has_the_curves_and_the_paper_s_points():
    curves = make_curves()
    figure = figure_4(curves)
    assert len(figure.axes) == 4
    for axes, side in zip(figure.axes, ("positive", "negative") * 2, strict=True):
        assert {text.get_text() for text in axes.texts} == {f"γ = {gamma:g}" for gamma in GAMMAS}
        assert len(axes.lines) == len(GAMMAS)
        for line, points, gamma in zip(axes.lines, axes.collections, GAMMAS, strict=False):
            assert line.get_ydata()[-1] == pytest.approx(1)
            assert dict(points.get_offsets().tolist()) == dict(
                zip(PAPER_FRACTIONS, PAPER[side][gamma], strict=True)
            )
    assert len(figure_4([curve for curve in curves if curve.reading == "pair"]).axes) == 2


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_the_same_figure_is_the_same_file(suffix, tmp_path):
    for name in ("a", "b"):
        save_figure(draw_losses(["5"])[1], tmp_path / "new" / f"{name}{suffix}")
    first, second = sorted((tmp_path / "new").iterdir())
    assert first.read_bytes() == second.read_bytes()
    if suffix == ".png":
        with Image.open(first) as picture:
            assert picture.width > 600 and len(picture.getcolors(1 << 16)) > 20


def test_files_are_not_overwritten(tmp_path):
    path = tmp_path / "figure.svg"
    path.write_text("earlier")
    with pytest.raises(InputError, match=r"figure\.svg exists"):
        save_figure(Figure(), path)
    assert path.read_text() == "earlier"


def test_files_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file cannot be made"):
        save_figure(Figure(), tmp_path / "file" / "figure.png")
    with pytest.raises(InputError, match="cannot be written: File name too long"):
        save_figure(Figure(), tmp_path / f"{'a' * 300}.png")
    with pytest.raises(InputError, match=r"figure\.pdf: figures are written as \.svg or \.png"):
        save_figure(Figure(), tmp_path / "figure.pdf")


def plot_losses(*argv):
    return main(["plot-losses", *map(str, argv)])


def test_command_line(tmp_path, capsys):
    assert plot_losses("6", "--output", tmp_path) == 0
    assert plot_losses("focal:gamma=3", "hinge", "--output", tmp_path / "own.svg") == 0
    names = {"figure_6.svg", "figure_6.png", "own.svg"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["4"], "figure 4 is drawn from measurements by retinanet-ext analyze-loss"),
        (["softmax"], "unknown loss 'softmax'; known losses: asymmetric, cross_entropy"),
        (["focal:gamma=-1"], "gamma must be a number in [0, inf), got '-1'"),
        (["1", "--output", "figure.jpg"], "figure.jpg: figures are written as .svg or .png"),
    ],
)
def test_command_line_refuses(argv, expected, capsys):
    assert plot_losses(*argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("retinanet-ext plot-losses: error: ") and expected in line
