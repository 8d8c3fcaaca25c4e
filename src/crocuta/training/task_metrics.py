"""How well a head does: accuracy, F1, MCC and AUROC of classes, squared error and correlations of targets.

Everything is computed in float64. A figure that a split cannot give (a class that is absent, a target that is constant)
is None, and ``notes`` says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from crocuta.errors import InputError

Floats: TypeAlias = npt.NDArray[np.float64]
ClassificationFigure: TypeAlias = Literal["accuracy", "f1", "mcc", "auroc", "loss"]
RegressionFigure: TypeAlias = Literal["mse", "pearson", "spearman", "r2"]
LOWER_IS_BETTER = ("loss", "mse")


@dataclass(frozen=True, kw_only=True)
class ClassificationMetrics:
    """Of ``count`` sequences, or of ``count`` tokens that have a label."""

    count: int
    loss: float
    """Mean cross-entropy in nats."""
    accuracy: float
    f1: float
    """Of the positive label where there are two classes, else the mean over the classes that occur or are predicted."""
    mcc: float
    """Correlation of true and predicted classes; 0 where all predictions, or all labels, are of one class."""
    auroc: float | None
    """Where there are two classes, of the positive label; else the mean over classes, each against the rest."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RegressionMetrics:
    """Of ``count`` sequences; with several targets the mean of each target's figure."""

    count: int
    mse: float
    pearson: float | None
    spearman: float | None
    r2: float | None
    notes: tuple[str, ...] = ()


TaskMetrics: TypeAlias = ClassificationMetrics | RegressionMetrics


def classification_metrics(
    logits: npt.ArrayLike, targets: npt.ArrayLike, *, positive: int = 1, names: Sequence[str] = ()
) -> ClassificationMetrics:
    """Figures of ``logits`` [n c] against the true classes ``targets`` [n].

    ``positive`` is the class that F1 and AUROC are of where c = 2. ``names`` are for the notes.

    Raises:
        InputError: nothing to measure, shapes that do not fit, logits that are not finite, or a class below 0 or
            above c - 1.
    """
    scores, true = np.asarray(logits, np.float64), np.asarray(targets)
    _check_shapes(scores, true.shape + (scores.shape[-1:] if scores.ndim else ()), "logits")
    classes = scores.shape[1]
    if classes < 2 or true.dtype.kind not in "iu" or true.min() < 0 or true.max() >= classes:
        given = f"classes {true.min()} to {true.max()} and {classes} logits"
        raise InputError("the classes do not fit the logits", given=given, expected=f"whole numbers below {classes}")
    confusion = np.zeros((classes, classes))
    np.add.at(confusion, (true, scores.argmax(1)), 1)
    area, notes = _auroc_of_classes(scores, true, positive, names)
    log_p = _log_softmax(scores)
    return ClassificationMetrics(
        count=len(true),
        loss=float(-log_p[np.arange(len(true)), true].mean()),
        accuracy=float(np.trace(confusion) / len(true)),
        f1=_f1(confusion, positive),
        mcc=_mcc(confusion),
        auroc=area,
        notes=notes,
    )


def regression_metrics(predictions: npt.ArrayLike, targets: npt.ArrayLike) -> RegressionMetrics:
    """Figures of ``predictions`` [n t] against ``targets`` [n t].

    mse = mean (y - p)²; r2 = 1 - Σ (y - p)² / Σ (y - mean y)²; Spearman is Pearson of average ranks.

    Raises:
        InputError: nothing to measure, shapes that do not fit, or numbers that are not finite.
    """
    predicted, true = np.asarray(predictions, np.float64), np.asarray(targets, np.float64)
    _check_shapes(predicted, true.shape, "predictions")
    if not np.isfinite(true).all():
        raise InputError("targets are not finite", expected="finite numbers")
    constant = [(y == y[0]).all() for y in true.T]
    flat = [(p == p[0]).all() for p in predicted.T]
    notes = [f"target {t} is constant: no correlation and no r2" for t in np.flatnonzero(constant)]
    notes += [f"predictions of target {t} are constant: no correlation" for t in np.flatnonzero(flat)]
    pairs = list(zip(predicted.T, true.T))
    correlates = not any(constant) and not any(flat)
    return RegressionMetrics(
        count=len(true),
        mse=float(((true - predicted) ** 2).mean()),
        pearson=_mean([_correlation(p, y) for p, y in pairs]) if correlates else None,
        spearman=_mean([_correlation(_ranks(p), _ranks(y)) for p, y in pairs]) if correlates else None,
        r2=None if any(constant) else _mean([1 - _squares(y - p) / _squares(y - y.mean()) for p, y in pairs]),
        notes=tuple(notes),
    )


def is_better(name: str, new: float | None, old: float | None) -> bool:
    """Whether ``new`` improves on ``old`` in the figure ``name``; any number is better than none."""
    if new is None or old is None:
        return new is not None and old is None
    return new < old if name in LOWER_IS_BETTER else new > old


def auroc(scores: npt.ArrayLike, is_positive: npt.ArrayLike) -> float | None:
    """Probability that a positive scores above a negative, ties counting half; None without one of the two.

    By ranks: (Σ ranks of positives - p (p + 1) / 2) / (p · n), average ranks for ties (Mann and Whitney 1947).
    """
    positive = np.asarray(is_positive, bool)
    p, n = int(positive.sum()), int((~positive).sum())
    if not p or not n:
        return None
    ranks = _ranks(np.asarray(scores, np.float64))
    return float((ranks[positive].sum() - p * (p + 1) / 2) / (p * n))


# --- parts ------------------------------------------------------------------------------------------------------


def _auroc_of_classes(
    scores: Floats, true: npt.NDArray[np.integer], positive: int, names: Sequence[str]
) -> tuple[float | None, tuple[str, ...]]:
    classes = scores.shape[1]
    absent = np.flatnonzero(np.bincount(true, minlength=classes) == 0).tolist()
    if absent:
        called = ", ".join(repr(names[c]) if names else str(c) for c in absent)
        return None, (f"no AUROC: no example of {called} in this split",)
    if classes == 2:
        return auroc(scores[:, positive] - scores[:, 1 - positive], true == positive), ()
    log_p = _log_softmax(scores)
    areas = [auroc(log_p[:, c], true == c) for c in range(classes)]
    return _mean([area for area in areas if area is not None]), ()


def _f1(confusion: Floats, positive: int) -> float:
    """2 TP / (2 TP + FP + FN); a class that neither occurs nor is predicted has none."""
    hits, sums = np.diag(confusion), confusion.sum(0) + confusion.sum(1)
    if len(confusion) == 2:
        return float(2 * hits[positive] / sums[positive]) if sums[positive] else 0.0
    return _mean([2 * hit / total for hit, total in zip(hits, sums) if total])


def _mcc(confusion: Floats) -> float:
    """(c s - Σ p_k t_k) / sqrt((s² - Σ p_k²) (s² - Σ t_k²)) (Gorodkin 2004, from the counts of each class)."""
    predicted, true, total = confusion.sum(0), confusion.sum(1), confusion.sum()
    spread = (total**2 - predicted @ predicted) * (total**2 - true @ true)
    return float((np.trace(confusion) * total - predicted @ true) / np.sqrt(spread)) if spread > 0 else 0.0


def _ranks(values: Floats) -> Floats:
    """Ranks from 1, the average of their places for equal values."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    average: Floats = last - (counts - 1) / 2
    return average[place]


def _correlation(a: Floats, b: Floats) -> float:
    a, b = a - a.mean(), b - b.mean()
    return float(a @ b / np.sqrt(_squares(a) * _squares(b)))


def _squares(values: Floats) -> float:
    return float(values @ values)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _log_softmax(scores: Floats) -> Floats:
    shifted = scores - scores.max(1, keepdims=True)
    normal: Floats = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return normal


def _check_shapes(values: Floats, expected: tuple[int, ...], name: str) -> None:
    if values.ndim != 2 or values.shape != expected or not values.size:
        raise InputError(f"{name} do not fit the targets", given=values.shape, expected=f"{expected}, not empty")
    if not np.isfinite(values).all():
        raise InputError(f"{name} are not finite", expected="finite numbers")
