"""What a run looks like: its loss curve as a PNG, and its result beside the baselines as a table."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from rich.table import Table

from crocuta.errors import InputError, MissingExtraError
from crocuta.training.baselines import Baseline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TRAIN, _HELD_OUT, _LINE, _TEXT = "#7aa6d8", "#c8442d", "#9a9a9a", "#333333"

_KEYS = {"train": ("loss",), "eval": ("held_out_bits", "bits_per_byte", "masked_bits", "loss")}
"""Where a line of an event has its bits; the first that is there counts."""


@dataclass(frozen=True)
class Curves:
    """Steps and bits a token of a run, training and held-out, each sorted by step."""

    train: npt.NDArray[np.float64]
    """[n 2]: step, bits."""
    held_out: npt.NDArray[np.float64]
    """[n 2]: step, bits."""


def read_curves(metrics_path: str | Path) -> Curves:
    """The curves in a ``metrics.jsonl``.

    A line is an object with ``step`` and ``event``: ``"train"`` (the default) with ``loss`` in nats a token, or
    ``"eval"`` with the first there is of ``held_out_bits``, ``bits_per_byte``, ``masked_bits`` and ``loss``. Lines
    without a step or a finite value, and other events, are passed over. A step that occurs twice, as after a resume,
    counts as its last line. A broken last line without a newline was cut off by a kill and is dropped.

    Raises:
        InputError: for a missing file, a broken line, or a file without any training loss.
    """
    path = Path(metrics_path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as failure:
        what = f"cannot read the metrics ({failure.strerror})"
        raise InputError(what, given=path, expected="the metrics.jsonl of a run") from failure
    train: dict[float, float] = {}
    held_out: dict[float, float] = {}
    for number, line in enumerate(lines, start=1):
        record = _record(path, number, line, is_cut=number == len(lines))
        step, event = record.get("step"), record.get("event", "train")
        bits = _first_bits(record, _KEYS.get(str(event), ()))
        if isinstance(step, int | float) and bits is not None:
            (train if event == "train" else held_out)[step] = bits
    if not train:
        raise InputError(f"{path} has no training loss", expected='lines such as {"step": 1, "loss": 5.5}')
    return Curves(train=_sorted(train), held_out=_sorted(held_out))


def plot_loss(
    metrics_path: str | Path,
    png_path: str | Path,
    lines: Sequence[Baseline] = (),
    *,
    title: str | None = None,
    unit: str = "bits per token",
) -> None:
    """Draw the curves of ``metrics_path`` as a PNG: training loss raw and smoothed, held-out points, baselines.

    Raises:
        InputError: see ``read_curves``.
        MissingExtraError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as failure:
        raise MissingExtraError("plots need matplotlib", fix="run: pip install crocuta[train]") from failure
    curves = read_curves(metrics_path)
    # A Figure of its own, not pyplot: the user's backend and open figures stay as they are.
    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    low, high = _limits(curves, lines)
    steps, bits = curves.train.T
    last: Baseline | None = None
    marker = "." if len(steps) == 1 else ""  # a line of one point shows nothing
    axes.plot(steps, bits, marker, color=_TRAIN, alpha=0.35, linewidth=0.8, label="training, each step")
    axes.plot(steps, smoothed(bits), color=_TRAIN, linewidth=1.8, label="training, smoothed")
    if len(curves.held_out):
        axes.plot(*curves.held_out.T, "o-", color=_HELD_OUT, markersize=4, label="held-out")
        last = Baseline("held-out", float(curves.held_out[-1, 1]))
    axes.set_ylim(low, high)
    axes.set_xlim(0, 1.01 * max(steps[-1], 1))
    _label(axes, lines, last)
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    axes.set_title(title or "Loss", loc="left", fontsize=11, color=_TEXT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, loc="upper right", facecolor="white", edgecolor="none", framealpha=0.9)
    figure.savefig(png_path, format="png")


def comparison_table(
    model_bits: float,
    baselines: Sequence[Baseline],
    *,
    model: str = "this model",
    unit: str = "bits per token",
) -> Table:
    """The model and the baselines, best first, with what each needs more (+) or less (-) than the model."""
    ours = Baseline(model, model_bits)
    rows = sorted([ours, *baselines], key=lambda row: row.bits_per_token)
    best = min(baselines, key=lambda row: row.bits_per_token, default=None)
    table = Table("", unit, "difference", "", box=None, header_style="bold", pad_edge=False)
    table.columns[0].no_wrap = True
    for column in table.columns[1:3]:
        column.justify = "right"
    for row in rows:
        difference = "" if row is ours else f"{row.bits_per_token - model_bits:+.3f}"
        note = "best baseline" if row is best else ""
        table.add_row(row.name, f"{row.bits_per_token:.3f}", difference, note, style="bold" if row is ours else None)
    return table


def smoothed(values: npt.NDArray[np.float64], share: float = 0.02) -> npt.NDArray[np.float64]:
    """Centred average over ``share`` of the points, at least 11; narrower at the start, where the loss falls fast."""
    places = np.arange(len(values))
    half = np.minimum(places // 2, max(5, int(share * len(values) / 2)))
    first, after = places - half, np.minimum(places + half + 1, len(values))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[after] - sums[first]) / (after - first)


def _limits(curves: Curves, lines: Sequence[Baseline]) -> tuple[float, float]:
    """Show the baselines and all of the curve but the fall from the random start, which would flatten the rest."""
    steps, train = curves.train.T
    settled = train[len(train) // 20 :]
    held_out = curves.held_out[curves.held_out[:, 0] > steps[-1] / 20, 1]
    shown = [*held_out, *(line.bits_per_token for line in lines), train[-1]]
    low, high = min(*shown, train.min()), max(*shown, np.quantile(settled, 0.99))
    margin = 0.06 * (high - low) or 0.1
    return low - margin, high + margin


def _label(axes: Axes, lines: Sequence[Baseline], last: Baseline | None) -> None:
    """Mark each baseline by a line and name it, and the last held-out point, at the right edge.

    Names are moved apart where the figures are close.
    """
    ordered = sorted([*lines, *([last] if last else [])], key=lambda line: line.bits_per_token)
    low, high = axes.get_ylim()
    places = spread([line.bits_per_token for line in ordered], 0.045 * (high - low), low, high)
    beside = axes.get_yaxis_transform()  # x in widths of the axes, y in bits
    for line, place in zip(ordered, places):
        bits, is_last = line.bits_per_token, line is last
        color, weight = (_HELD_OUT, "bold") if is_last else (_TEXT, "normal")
        if not is_last:
            axes.axhline(bits, color=_LINE, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
        leader = color if is_last else _LINE
        axes.plot([1, 1.03], [bits, place], transform=beside, color=leader, linewidth=0.6, clip_on=False)
        text = f"{line.name}  {bits:.3f}"
        axes.text(1.04, place, text, transform=beside, fontsize=7.5, color=color, weight=weight, va="center")


def spread(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Sorted ``values`` moved apart to at least ``gap``, and by no more than that needs, within [low, high].

    A crowded group stays centred on its values. More values than fit run over ``high``.
    """

    def start(group: list[float]) -> float:
        width = gap * (len(group) - 1)
        return max(low, min(sum(group) / len(group) - width / 2, high - width))

    groups: list[list[float]] = []
    for value in values:
        groups.append([value])
        while len(groups) > 1 and start(groups[-1]) < start(groups[-2]) + gap * len(groups[-2]):
            last = groups.pop()
            groups[-1].extend(last)
    return [start(group) + gap * place for group in groups for place in range(len(group))]


def _record(path: Path, number: int, line: str, *, is_cut: bool) -> dict[str, object]:
    """The object of one line; empty for a blank line and for the last one if a kill cut it off."""
    try:
        record = json.loads(line) if line.strip() else {}
    except json.JSONDecodeError as failure:
        if is_cut:
            return {}
        raise InputError(f"{path}, line {number} is no JSON", given=repr(line[:60]), fix=failure.msg) from failure
    if not isinstance(record, dict):
        raise InputError(f"{path}, line {number} is no JSON object", given=repr(line[:60]))
    return record


def _first_bits(record: dict[str, object], keys: tuple[str, ...]) -> float | None:
    for key in keys:
        value = record.get(key)
        if isinstance(value, int | float) and math.isfinite(value):
            return value / math.log(2) if key == "loss" else float(value)
    return None


def _sorted(points: dict[float, float]) -> npt.NDArray[np.float64]:
    return np.array(sorted(points.items()), dtype=np.float64).reshape(-1, 2)
