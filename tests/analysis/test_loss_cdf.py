"""The cumulative loss against direct sorts, and the samples it is measured on."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot

from retinanet_ext.analysis.loss_cdf import (
    FRACTIONS,
    GAMMAS,
    CumulativeLoss,
    LossCurve,
    Reservoir,
    WindowSample,
    conclude,
    paper_share,
)
from retinanet_ext.errors import InputError
from retinanet_ext.losses import sigmoid_focal_loss

K = 3


def make_anchors(num_anchors, seed=0, dtype=torch.float32):
    """Logits and labels as of a trained detector: few positives, a long tail of easy negatives."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.full((num_anchors,), K)
    chance = torch.rand(num_anchors, generator=rng)
    labels[chance < 0.05] = -1
    foreground = chance > 0.97
    labels[foreground] = torch.randint(0, K, (int(foreground.sum()),), generator=rng)
    logits = torch.randn(num_anchors, K, generator=rng) * 1.5 - 4.5
    logits[foreground] += 4 * one_hot(labels[foreground], K)
    return logits.to(dtype), labels


def direct_losses(logits, labels, gamma):
    """Reading and side -> losses in float64, from one-hot targets."""
    logits, labels = logits[labels >= 0].double(), labels[labels >= 0]
    targets = one_hot(labels, K + 1)[:, :K]
    losses = sigmoid_focal_loss(logits, targets, alpha=-1, gamma=gamma)
    foreground = labels < K
    return {
        ("anchor", "positive"): losses[foreground].sum(1),
        ("anchor", "negative"): losses[~foreground].sum(1),
        ("pair", "positive"): losses[targets == 1],
        ("pair", "negative"): losses[targets == 0],
    }


def direct_cdf(losses, fractions):
    """Sort and sum; linear between windows."""
    upto = np.cumsum([0, *sorted(losses.tolist())])
    return np.interp(fractions, np.linspace(0, 1, len(upto)), upto / upto[-1])


def curves_of(*anchors, **kwargs):
    sample = WindowSample(**kwargs)
    for logits, labels in anchors:
        sample.add(logits, labels)
    return sample.curves()


def sides_of(curves):
    return {(curve.reading, curve.side, curve.gamma): curve for curve in curves}


def test_shares_equal_a_direct_sort():
    logits, labels = make_anchors(5000)
    curves = sides_of(curves_of((logits, labels)))
    assert len(curves) == 2 * 2 * len(GAMMAS)
    for gamma in GAMMAS:
        for (reading, side), losses in direct_losses(logits, labels, gamma).items():
            curve = curves[reading, side, gamma]
            assert curve.seen == curve.sampled == len(losses)
            assert curve.mean_loss == pytest.approx(losses.mean().item(), rel=1e-6)
            for fraction, share in curve.hardest.items():
                assert share == pytest.approx(1 - direct_cdf(losses, 1 - fraction), rel=1e-6)
            assert curve.cdf == pytest.approx(direct_cdf(losses, FRACTIONS), abs=1e-7)


def test_sums_are_taken_in_float64():
    losses = np.random.default_rng(0).random(10**6, dtype=np.float32) ** 8
    losses[:100] = 0
    exact = np.sort(losses.astype(np.float64))
    cumulative = CumulativeLoss(losses)
    assert cumulative.total == pytest.approx(exact.sum(), rel=1e-13)
    for count in (1, 1000, 10**6 - 1, 10**6):
        share = exact[:count].sum() / exact.sum()
        fraction = count / len(exact)
        assert cumulative.share_of_easiest(fraction) == pytest.approx(share, rel=1e-9, abs=1e-15)


def test_equal_losses_lie_on_the_diagonal():
    cumulative = CumulativeLoss(np.full(7, 0.25, np.float32))
    for fraction in (0, 0.01, 0.5, 0.99, 1):
        assert cumulative.share_of_easiest(fraction) == pytest.approx(fraction, abs=1e-15)


def test_losses_that_are_all_zero():
    with pytest.raises(InputError, match="3 windows sum to 0"):
        CumulativeLoss(np.zeros(3, np.float32))
    logits, labels = torch.tensor([[-200.0], [3.0]]), torch.tensor([1, 0])
    with pytest.raises(InputError, match="negative windows, reading 'anchor', gamma 0"):
        curves_of((logits, labels))


def fill(reservoir, stream, *cuts):
    for part in np.split(stream, cuts):
        reservoir.add(torch.from_numpy(part), lambda chosen: chosen[None])
    return reservoir.values[0]


def test_reservoir_holds_a_short_stream_in_its_order():
    stream = np.arange(20.0)
    assert np.array_equal(fill(Reservoir(1, 20, np.random.default_rng(0)), stream, 7), stream)
    assert np.array_equal(fill(Reservoir(1, 30, np.random.default_rng(0)), stream), stream)


def test_reservoir_does_not_depend_on_how_the_stream_is_cut():
    stream = np.arange(1000.0)
    for cuts in ((), (40, 50, 60, 61), range(1, 1000)):
        values = fill(Reservoir(1, 50, np.random.default_rng(3)), stream, *cuts)
        if not cuts:
            first = values.copy()
            assert len(set(first)) == 50 and first.max() > 500
        assert np.array_equal(values, first)
    assert not np.array_equal(fill(Reservoir(1, 50, np.random.default_rng(4)), stream), first)


def test_reservoir_is_uniform():
    """Each of 100 items is kept in a tenth of 4000 runs, and pairs of them in their share."""
    kept = np.zeros((4000, 100))
    for seed, row in enumerate(kept):
        values = fill(Reservoir(1, 10, np.random.default_rng(seed)), np.arange(100.0), 5, 30)
        row[values.astype(int)] = 1
    deviation = (kept.sum(0) - 400) / np.sqrt(4000 * 0.1 * 0.9)
    assert abs(deviation).max() < 4
    assert (deviation**2).mean() == pytest.approx(0.9 / 0.9, abs=0.4)
    together = (kept.T @ kept)[np.triu_indices(100, 1)] / 4000
    expected = 10 * 9 / (100 * 99)
    assert abs(together - expected).max() < 5 * np.sqrt(expected / 4000)


def test_sample_of_a_long_stream_comes_close_to_all_of_it():
    anchors = [make_anchors(20000, seed=seed) for seed in range(3)]
    full = sides_of(curves_of(*anchors))
    some = curves_of(*anchors, num_positives=1000, num_negatives=20000, seed=1)
    for curve in some:
        whole = full[curve.reading, curve.side, curve.gamma]
        assert curve.seen == whole.seen
        assert curve.sampled == (1000 if curve.side == "positive" else 20000)
        assert curve.hardest[0.2] == pytest.approx(whole.hardest[0.2], abs=0.04)
        assert curve.hardest[0.2] != whole.hardest[0.2]
    again = curves_of(*anchors, num_positives=1000, num_negatives=20000, seed=1)
    other = curves_of(*anchors, num_positives=1000, num_negatives=20000, seed=2)
    assert again == some
    assert other != some


def test_an_image_may_come_in_parts_and_in_half_precision():
    logits, labels = make_anchors(3000, dtype=torch.float16)
    parts = list(zip(logits.split(700), labels.split(700), strict=True))
    limits = {"num_positives": 40, "num_negatives": 1000}
    whole = curves_of((logits, labels), **limits)
    assert curves_of(*parts, **limits) == whole
    assert curves_of((logits.float(), labels), **limits) == whole


def test_ignored_anchors_never_count():
    logits, labels = make_anchors(2000)
    others = logits.clone()
    others[labels == -1] = 50
    assert curves_of((others, labels)) == curves_of((logits, labels))


def test_larger_gamma_concentrates_negatives_more_than_positives():
    curves = sides_of(curves_of(make_anchors(50000)))
    for reading in ("anchor", "pair"):
        for fraction in (0.2, 0.01):
            negative = [curves[reading, "negative", g].hardest[fraction] for g in GAMMAS]
            positive = [curves[reading, "positive", g].hardest[fraction] for g in GAMMAS]
            assert negative == sorted(negative) and positive == sorted(positive)
        # The hardest 1 %.
        assert negative[-1] > 3 * negative[0]
        assert negative[-1] / negative[0] > positive[-1] / positive[0]


@pytest.mark.parametrize(("labels", "side"), [([K, -1], "positive"), ([0, -1], "negative")])
def test_a_side_without_windows(labels, side):
    with pytest.raises(InputError, match=f"there is no {side} window"):
        curves_of((torch.zeros(2, K), torch.tensor(labels)))


def test_paper_s_shares():
    assert paper_share("negative", 2.0, 0.2) == 0.99
    assert paper_share("negative", 0.0, 0.01) == 0.06
    assert paper_share("positive", 1.0, 0.2) == 0.564


def make_curves(easy_shares, negatives_loss=100.0):
    """Anchors whose easiest 80 % of negatives carry these shares; the positives' loss is 10."""

    def curve(side, gamma, mean_loss, share):
        return LossCurve("anchor", side, gamma, 10, 10, mean_loss, {0.2: 1 - share}, ())

    negatives = zip(GAMMAS, easy_shares, strict=True)
    return [curve("positive", gamma, 1.0, 0.5) for gamma in GAMMAS] + [
        curve("negative", gamma, negatives_loss / 10, share) for gamma, share in negatives
    ]


@pytest.mark.parametrize(
    ("easy_shares", "negatives_loss", "expected"),
    [
        ((0.63, 0.5, 0.29, 0.01), 100, ["63.0 %", "6.30 times", "20 % or less is 2 (1.0 %)"]),
        ((0.63, 0.2, 0.1, 0.01), 5000, ["315 times", "20 % or less is 0.5 (20.0 %)"]),
        ((0.7, 0.6, 0.5, 0.4), 100, ["as 2 still leaves their share at 40.0 %", "larger"]),
        ((0.15, 0.1, 0.05, 0), 100, ["15.0 %", "on hard negatives already", "little"]),
        ((0.63, 0.5, 0.29, 0.01), 1, ["0.06 times", "easy negatives are no burden"]),
    ],
)
def test_conclusion(easy_shares, negatives_loss, expected):
    sentence = conclude(make_curves(easy_shares, negatives_loss))
    assert all(text in sentence for text in expected), sentence
    assert sentence.endswith(".") and "\n" not in sentence


MEASURE_MEMORY = """
import json, re
from pathlib import Path
import torch
from retinanet_ext.analysis.loss_cdf import WindowSample

def peak():  # getrusage's would be that of the process that started this one, if it is larger
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

logits = torch.randn(525_000, 1, generator=torch.Generator().manual_seed(0)) - 4
labels = torch.ones(525_000, dtype=torch.long)
labels[:6_000] = 0
before = peak()
sample = WindowSample()
for _ in range(20):
    sample.add(logits, labels)
curves = sample.curves()
print(json.dumps({
    "mib": peak() - before,
    "sampled": sorted({curve.sampled for curve in curves}),
    "seen": sorted({curve.seen for curve in curves}),
}))
"""


def test_memory_for_ten_million_negatives():
    run = subprocess.run([sys.executable, "-c", MEASURE_MEMORY], capture_output=True, text=True)
    result = json.loads(run.stdout)
    assert result["seen"] == [120_000, 10_380_000]
    assert result["sampled"] == [100_000, 10_000_000]
    # Both readings: 4 + 1 float32 numbers a negative, and one more while pairs are sorted.
    assert 200 < result["mib"] < 400
