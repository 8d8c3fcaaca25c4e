"""Reading metrics, drawing the loss curve, and the table beside the baselines."""

from __future__ import annotations

import builtins
import io
import json
import math
import re
from itertools import pairwise

import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.image import imread
from rich.console import Console

from crocuta.errors import InputError, MissingExtraError
from crocuta.training.baselines import Baseline
from crocuta.training.report import comparison_table, plot_loss, read_curves, smoothed, spread

LN2 = math.log(2)
BASELINES = [
    Baseline("n-gram order 0", 4.5),
    Baseline("n-gram order 5", 2.05),
    Baseline("lzma -9e after train", 2.1),
]


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def a_run(path, steps=200):
    records = [{"step": s, "loss": (2 + 6 * math.exp(-s / 20)) * LN2, "event": "train"} for s in range(1, steps + 1)]
    records += [{"step": s, "event": "eval", "held_out_bits": 2.1 + 1 / s} for s in range(50, steps + 1, 50)]
    return write(path, *records)


def test_curves_are_in_bits_and_sorted(tmp_path):
    path = write(
        tmp_path / "metrics.jsonl",
        {"step": 2, "loss": 2 * LN2, "event": "train", "tokens_per_second": 10},
        {"step": 1, "loss": 3 * LN2},
        {"step": 2, "event": "eval", "held_out_bits": 2.5, "bits_per_byte": 9, "loss": 9},
        {"step": 3, "event": "eval", "bits_per_byte": 2.25, "loss": 9},
        {"step": 4, "event": "eval", "loss": 2 * LN2},
    )
    curves = read_curves(path)
    np.testing.assert_allclose(curves.train, [[1, 3], [2, 2]])
    np.testing.assert_allclose(curves.held_out, [[2, 2.5], [3, 2.25], [4, 2]])


def test_lines_that_are_no_points_are_passed_over(tmp_path):
    path = write(
        tmp_path / "metrics.jsonl",
        {"event": "start", "step": 0, "loss": 7.0},
        {"step": 1, "loss": LN2},
        {"loss": 5.0},
        {"step": 2},
        {"step": 3, "loss": math.nan},
        {"step": 4, "loss": "high"},
        {"step": 5, "event": "eval", "held_out_bits": None},
        {"step": 1, "loss": 2 * LN2},
    )
    path.write_text(path.read_text() + '\n{"step": 9, "lo')
    curves = read_curves(path)
    np.testing.assert_allclose(curves.train, [[1, 2]])  # the later of two lines, as a resumed run writes
    assert curves.held_out.shape == (0, 2)
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 2.0}')
    assert len(read_curves(path).train) == 2  # complete, though without a newline


def test_broken_metrics_are_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(InputError, match=re.escape(f"(No such file or directory): got {path}; expected the metrics")):
        read_curves(path)
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo\n{"step": 3, "loss": 1.0}\n')
    with pytest.raises(InputError, match=re.escape(f'{path}, line 2 is no JSON: got \'{{"step": 2, "lo\'')):
        read_curves(path)
    path.write_text("[1]\n")
    with pytest.raises(InputError, match="line 1 is no JSON object"):
        read_curves(path)
    write(path, {"step": 1, "event": "eval", "held_out_bits": 2.0})
    with pytest.raises(InputError, match="has no training loss: expected lines such as"):
        plot_loss(path, tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_plot_shows_curves_points_and_named_baselines(tmp_path, monkeypatch):
    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k))[1])
    monkeypatch.setitem(matplotlib.rcParams, "backend", "svg")
    plot_loss(
        a_run(tmp_path / "metrics.jsonl"),
        tmp_path / "loss.png",
        BASELINES,
        title="A run",
        unit="bits per byte",
    )
    assert dict.__getitem__(matplotlib.rcParams, "backend") == "svg"
    (axes,) = drawn[0].axes
    by_name = {line.get_label(): line for line in axes.lines}
    raw, held_out = by_name["training, each step"], by_name["held-out"]
    assert raw.get_xydata()[[0, -1]] == pytest.approx(
        np.array([[1, 2 + 6 * math.exp(-0.05)], [200, 2 + 6 * math.exp(-10)]])
    )
    assert held_out.get_xydata()[-1] == pytest.approx([200, 2.105])
    level = [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "--"]
    assert sorted(level) == [2.05, 2.1, 4.5]
    texts = {text.get_text() for text in axes.texts}
    assert texts == {*(f"{b.name}  {b.bits_per_token:.3f}" for b in BASELINES), "held-out  2.105"}
    heights = sorted(text.get_position()[1] for text in axes.texts)
    assert all(above - below > 0.08 for below, above in pairwise(heights))  # 2.05, 2.1 and 2.105 moved apart
    assert axes.get_ylabel() == "bits per byte"
    assert axes.get_title(loc="left") == "A run"
    low, high = axes.get_ylim()
    assert 1.5 < low < 2
    assert 4.5 < high < 5.5  # the fall from 8 bits is cut, no baseline is


def test_plot_is_a_picture_even_of_one_step(tmp_path):
    path = write(tmp_path / "metrics.jsonl", {"step": 1, "loss": 2.0})
    plot_loss(path, tmp_path / "one.png")
    plot_loss(a_run(path), tmp_path / "many.png", BASELINES)
    one, many = imread(tmp_path / "one.png"), imread(tmp_path / "many.png")
    assert one.shape == many.shape == (720, 1200, 4)
    middle = one[250:450, 200:]  # neither axes nor legend: only the point is here
    assert (middle[..., 2] > middle[..., 0] + 0.1).any()
    assert (many[..., :3] < 0.99).any(axis=-1).mean() > 1.5 * (one[..., :3] < 0.99).any(axis=-1).mean()


def test_missing_matplotlib_names_the_extra(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=re.escape("plots need matplotlib; run: pip install crocuta[train]")):
        plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png")


@given(st.lists(st.floats(0, 10), max_size=12).map(sorted), st.floats(0.01, 0.8))
def test_labels_keep_their_order_and_their_distance(values, gap):
    places = spread(values, gap, low=0, high=10)
    assert all(after - before >= gap - 1e-9 for before, after in pairwise(places))
    assert all(-1e-9 <= place <= 10 + 1e-9 for place in places)
    roomy = all(after - before >= gap for before, after in pairwise(values))
    if roomy:
        assert places == pytest.approx(values)


def test_a_crowd_stays_centred_unless_the_edge_is_near():
    assert spread([5, 5, 5], 1, 0, 10) == pytest.approx([4, 5, 6])
    assert spread([0, 0.1], 1, 0, 10) == pytest.approx([0, 1])
    assert spread([10, 10, 10], 1, 0, 10) == pytest.approx([8, 9, 10])


def test_smoothing_keeps_a_line_and_removes_noise():
    steps = np.arange(1000.0)
    assert smoothed(3 - steps / 500)[:980] == pytest.approx((3 - steps / 500)[:980])
    noise = np.random.default_rng(0).normal(size=1000)
    assert smoothed(noise)[100:].std() < 0.35 * noise.std()
    assert smoothed(np.array([4.0])) == pytest.approx([4.0])


def rendered(table):
    console = Console(file=io.StringIO(), width=80)
    console.print(table)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_table_sorts_the_model_among_the_baselines():
    lines = rendered(comparison_table(2.0721, BASELINES, model="StripedHyena", unit="bits per byte"))
    assert [" ".join(line.split()) for line in lines] == [
        "bits per byte difference",
        "n-gram order 5 2.050 -0.022 best baseline",
        "StripedHyena 2.072",
        "lzma -9e after train 2.100 +0.028",
        "n-gram order 0 4.500 +2.428",
    ]
    assert [" ".join(line.split()) for line in rendered(comparison_table(1.5, []))] == [
        "bits per token difference",
        "this model 1.500",
    ]
