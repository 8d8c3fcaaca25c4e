"""Metrics against their definitions: by hand on small cases, and by naive double loops on random ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crocuta.errors import InputError
from crocuta.training.task_metrics import auroc, classification_metrics, is_better, regression_metrics


def logits_of(predicted, classes):
    return np.eye(classes)[predicted] * 3.0


# --- classes, by hand ---


def test_two_classes_by_hand():
    """TP 3, FN 1, FP 2, TN 4."""
    true = [1] * 4 + [0] * 6
    predicted = [1, 1, 1, 0, 1, 1, 0, 0, 0, 0]
    found = classification_metrics(logits_of(predicted, 2), true)
    assert found.count == 10
    assert found.accuracy == pytest.approx(7 / 10)
    assert found.f1 == pytest.approx(2 * 3 / (2 * 3 + 2 + 1))
    assert found.mcc == pytest.approx((3 * 4 - 2 * 1) / math.sqrt(5 * 4 * 6 * 5))
    assert found.auroc == pytest.approx((3 * 4 + 0.5 * (3 * 2 + 1 * 4)) / 24)
    right, wrong = -math.log(1 / (1 + math.exp(-3))), -math.log(1 / (1 + math.exp(3)))
    assert found.loss == pytest.approx((7 * right + 3 * wrong) / 10)
    assert found.notes == ()


def test_the_positive_class_is_a_choice():
    true, predicted = [1, 1, 0, 0, 0], [1, 0, 0, 0, 1]
    logits = logits_of(predicted, 2)
    assert classification_metrics(logits, true, positive=1).f1 == pytest.approx(2 / 4)
    assert classification_metrics(logits, true, positive=0).f1 == pytest.approx(4 / 6)
    tilted = logits + np.array([[0.0, 9.0]])
    assert classification_metrics(tilted, true, positive=0).f1 == 0.0  # never predicted
    areas = [classification_metrics(tilted, true, positive=p).auroc for p in (0, 1)]
    assert areas[0] == pytest.approx(areas[1])  # the same order, seen from the other side


def test_three_classes_by_hand():
    true, predicted = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 2]
    found = classification_metrics(logits_of(predicted, 3), true)
    assert found.accuracy == pytest.approx(4 / 6)
    assert found.f1 == pytest.approx((4 / 5 + 2 / 4 + 2 / 3) / 3)
    # c = 4, s = 6, p = (2, 2, 2), t = (3, 2, 1): (24 - 12) / sqrt((36 - 12) (36 - 14))
    assert found.mcc == pytest.approx(12 / math.sqrt(24 * 22))


def test_a_class_that_is_absent_has_no_auroc_and_does_not_count_in_f1():
    found = classification_metrics(logits_of([0, 1, 1], 3), [0, 1, 0], names=("a", "b", "c"))
    assert found.auroc is None
    assert found.notes == ("no AUROC: no example of 'c' in this split",)
    assert found.f1 == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert classification_metrics(logits_of([0, 1], 2), [1, 1]).auroc is None


def test_one_predicted_class_has_no_correlation():
    assert classification_metrics(logits_of([1, 1, 1], 2), [0, 1, 1]).mcc == 0.0
    assert classification_metrics(logits_of([1, 0, 1], 2), [1, 1, 1]).mcc == 0.0
    assert classification_metrics(logits_of([1, 0, 1], 2), [0, 1, 0]).mcc == pytest.approx(-1)


def test_large_logits_do_not_overflow_nor_tie():
    found = classification_metrics([[0.0, 800.0], [0.0, 900.0], [0.0, 1000.0]], [0, 0, 1])
    assert found.auroc == 1.0
    assert found.loss == pytest.approx((800 + 900) / 3)


# --- classes, by loops ---

SCORES = st.integers(-3, 3)


@given(st.lists(st.tuples(SCORES, st.booleans()), min_size=1, max_size=30))
def test_auroc_counts_pairs(rows):
    positives, negatives = [s for s, p in rows if p], [s for s, p in rows if not p]
    found = auroc([s for s, _ in rows], [p for _, p in rows])
    if not positives or not negatives:
        assert found is None
        return
    wins = sum((p > n) + 0.5 * (p == n) for p in positives for n in negatives)
    assert found == pytest.approx(wins / (len(positives) * len(negatives)), abs=1e-12)


@given(st.integers(0, 10**6), st.integers(2, 4), st.integers(1, 25))
def test_classes_by_loops(seed, classes, count):
    draw = np.random.default_rng(seed)
    true, logits = draw.integers(0, classes, count), draw.normal(size=(count, classes))
    found = classification_metrics(logits, true)
    predicted = [max(range(classes), key=lambda c: row[c]) for row in logits]
    assert found.accuracy == pytest.approx(sum(p == t for p, t in zip(predicted, true)) / count)
    f1 = {}
    for c in range(classes):
        tp = sum(p == c and t == c for p, t in zip(predicted, true))
        wrong = sum((p == c) != (t == c) for p, t in zip(predicted, true))
        if tp or wrong:
            f1[c] = 2 * tp / (2 * tp + wrong)
    assert found.f1 == pytest.approx(f1.get(1, 0.0) if classes == 2 else sum(f1.values()) / len(f1))
    assert found.mcc == pytest.approx(_mcc_by_covariances(predicted, true, classes), abs=1e-12)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert found.loss == pytest.approx(-sum(math.log(p[i, t]) for i, t in enumerate(true)) / count)
    if len(set(true.tolist())) < classes:
        assert found.auroc is None
    else:
        wins = [
            np.mean([p[i, c] > p[j, c] for i in ins for j in outs])
            for c in range(classes)
            for ins, outs in [(np.flatnonzero(true == c), np.flatnonzero(true != c))]
        ]
        assert found.auroc == pytest.approx(np.mean(wins[1:] if classes == 2 else wins), abs=1e-9)


def _mcc_by_covariances(predicted, true, classes):
    """cov(X, Y) / sqrt(cov(X, X) cov(Y, Y)) of one-hot rows, Gorodkin's definition."""
    x, y = np.eye(classes)[predicted], np.eye(classes)[np.asarray(true)]

    def covariance(a, b):
        return sum(
            (a[i, k] - a[:, k].mean()) * (b[i, k] - b[:, k].mean()) for i in range(len(a)) for k in range(classes)
        )

    spread = covariance(x, x) * covariance(y, y)
    return covariance(x, y) / math.sqrt(spread) if spread > 1e-12 else 0.0


# --- targets ---


def test_targets_by_hand():
    true, predicted = [[1.0], [2.0], [3.0], [6.0]], [[2.0], [1.0], [3.0], [4.0]]
    found = regression_metrics(predicted, true)
    assert found.mse == pytest.approx((1 + 1 + 0 + 4) / 4)
    assert found.r2 == pytest.approx(1 - 6 / (4 + 1 + 0 + 9))
    # deviations of y: -2 -1 0 3; of p: -0.5 -1.5 0.5 1.5
    assert found.pearson == pytest.approx((1 + 1.5 + 0 + 4.5) / math.sqrt(14 * 5))
    assert found.spearman == pytest.approx(1 - 6 * (1 + 1) / (4 * 15))
    assert (found.count, found.notes) == (4, ())


def test_ranks_of_ties_are_averages():
    # ranks of y: 1, 2.5, 2.5, 4; of p: 1, 2, 3, 4
    found = regression_metrics([[1.0], [2.0], [3.0], [4.0]], [[0.0], [5.0], [5.0], [9.0]])
    assert found.spearman == pytest.approx(4.5 / math.sqrt(5 * 4.5))


def test_several_targets_are_averaged():
    draw = np.random.default_rng(0)
    true, predicted = draw.normal(size=(9, 3)), draw.normal(size=(9, 3))
    found = regression_metrics(predicted, true)
    single = [regression_metrics(predicted[:, [t]], true[:, [t]]) for t in range(3)]
    for name in ("mse", "pearson", "spearman", "r2"):
        assert getattr(found, name) == pytest.approx(np.mean([getattr(one, name) for one in single]))


@given(st.integers(0, 10**6), st.integers(3, 20))
def test_targets_by_loops(seed, count):
    draw = np.random.default_rng(seed)
    y, p = draw.integers(0, 6, count) + 0.0, draw.normal(size=count)
    y[:2] = 0, 1
    found = regression_metrics(p[:, None], y[:, None])
    n, r = range(count), []
    for values in (p, y):
        r.append([sum(v < w for v in values) + (sum(v == w for v in values) + 1) / 2 for w in values])

    def by_pairs(a, b):  # Σ over pairs of (a_i - a_j)(b_i - b_j) is n² times the covariance
        pairs = [((a[i] - a[j]) * (b[i] - b[j]), (a[i] - a[j]) ** 2, (b[i] - b[j]) ** 2) for i in n for j in n]
        ab, aa, bb = (sum(column) for column in zip(*pairs))
        return ab / math.sqrt(aa * bb)

    assert found.pearson == pytest.approx(by_pairs(p, y), abs=1e-9)
    assert found.spearman == pytest.approx(by_pairs(*r), abs=1e-9)
    mean = sum(y) / count
    assert found.r2 == pytest.approx(1 - sum((y[i] - p[i]) ** 2 for i in n) / sum((y[i] - mean) ** 2 for i in n))


def test_constants_have_no_correlation_and_it_is_said():
    found = regression_metrics([[0.1], [0.1], [0.1]], [[1.0], [2.0], [4.0]])
    assert (found.pearson, found.spearman) == (None, None)
    assert found.r2 is not None
    assert found.notes == ("predictions of target 0 are constant: no correlation",)
    found = regression_metrics([[0.1, 1], [0.3, 2]], [[1.0, 0.1], [2.0, 0.1]])
    assert (found.pearson, found.r2) == (None, None)
    assert found.notes == ("target 1 is constant: no correlation and no r2",)


# --- rules and faults ---


def test_what_is_better():
    assert is_better("mcc", 0.5, 0.4)
    assert not is_better("mcc", 0.4, 0.4)
    assert is_better("loss", 0.3, 0.4)
    assert not is_better("mse", 0.5, 0.4)
    assert is_better("auroc", 0.1, None)
    assert not is_better("auroc", None, 0.1)
    assert not is_better("loss", None, None)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: classification_metrics(np.zeros((0, 2)), np.zeros(0, int)), "do not fit the targets"),
        (lambda: classification_metrics(np.zeros((3, 2)), [0, 1]), r"got \(3, 2\); expected \(2, 2\)"),
        (lambda: classification_metrics(np.zeros(3), [0, 1, 1]), "do not fit the targets"),
        (lambda: classification_metrics(np.zeros((2, 2)), [0, 2]), "got classes 0 to 2 and 2 logits"),
        (lambda: classification_metrics(np.zeros((2, 2)), [-1, 0]), "do not fit the logits"),
        (lambda: classification_metrics(np.zeros((2, 2)), [0.0, 1.0]), "do not fit the logits"),
        (lambda: classification_metrics(np.zeros((2, 1)), [0, 0]), "do not fit the logits"),
        (lambda: classification_metrics([[0.0, math.nan]], [0]), "logits are not finite"),
        (lambda: regression_metrics(np.zeros((2, 1)), np.zeros((2, 2))), "do not fit the targets"),
        (lambda: regression_metrics(np.zeros((0, 1)), np.zeros((0, 1))), "do not fit the targets"),
        (lambda: regression_metrics([[math.inf]], [[0.0]]), "predictions are not finite"),
        (lambda: regression_metrics([[0.0]], [[math.nan]]), "targets are not finite"),
    ],
)
def test_faults(call, reason):
    with pytest.raises(InputError, match=reason):
        call()
