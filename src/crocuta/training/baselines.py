"""What a model must beat: character n-grams and lzma, on the same split, fitted on the training tokens only.

An n-gram model of order k predicts a token from the k before it and interpolates with all lower orders:

    p_k(w | c) = discounted count(c w) / count(c) + mass(c) · p_{k-1}(w | c without its oldest token)

down to the uniform distribution over the vocabulary, so no token has probability zero and the followers of
every context sum to one. Three ways to discount are fitted (see ``Smoothing``), and each order uses the one
that does best on the last tenth of the *training* tokens; the held-out tokens decide nothing. Counting is
exact, without hashing.

Sources: Witten and Bell 1991; Ney, Essen and Kneser 1994; Chen and Goodman 1998 (interpolated forms, modified
discounts).
"""

from __future__ import annotations

import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from crocuta.errors import InputError

Ids: TypeAlias = npt.NDArray[np.int64]
Probabilities: TypeAlias = npt.NDArray[np.float64]

Smoothing: TypeAlias = Literal["witten-bell", "absolute", "kneser-ney"]
"""witten-bell: mass by the number of distinct followers. absolute: modified discounts on plain counts at each
order. kneser-ney: the same discounts, and lower orders count distinct left neighbours, not occurrences."""


@dataclass(frozen=True)
class Baseline:
    """A named figure to compare a model with, in bits a token."""

    name: str
    bits_per_token: float


@dataclass(frozen=True)
class LzmaBits:
    """Bits a byte of ``xz -9e`` without its headers; ``primed`` has the training bytes in its window."""

    primed: float
    alone: float


def ngram_bits(
    train: npt.ArrayLike,
    held_out: npt.ArrayLike,
    vocab_size: int,
    max_order: int = 5,
    *,
    contiguous: bool = False,
) -> dict[int, float]:
    """Held-out bits a token of the n-gram models of order 0 to ``max_order``.

    Args:
        train: ids [l] that the models are fitted on.
        held_out: ids [l] to predict, each from the tokens before it.
        vocab_size: number of ids; the base distribution is uniform over them.
        contiguous: ``held_out`` follows ``train`` directly, so its first tokens are predicted from the end of
            ``train``. Otherwise they have a shorter context.

    Raises:
        InputError: for ids that are empty, not 1-D integers, or outside the vocabulary.
    """
    train, held_out = _ids("train", train, vocab_size), _ids("held_out", held_out, vocab_size)
    if max_order < 0:
        raise InputError("max_order is negative", given=max_order, expected=">= 0")
    chosen = _choose_smoothings(train, vocab_size, max_order)
    past = _tail(train, max_order) if contiguous else _tail(train, 0)
    counts = _fit(train, max_order)
    bits: dict[int, float] = {}
    for smoothing in sorted(set(chosen)):
        for order, p in enumerate(_predict(counts, past, held_out, vocab_size, smoothing)):
            if chosen[order] == smoothing:
                bits[order] = _mean_bits(p)
    return dict(sorted(bits.items()))


def markov_bits(
    train: npt.ArrayLike,
    held_out: npt.ArrayLike,
    vocab_size: int,
    max_order: int = 12,
    *,
    contiguous: bool = False,
) -> dict[int, float]:
    """``ngram_bits`` with the long contexts that a small alphabet such as DNA allows."""
    return ngram_bits(train, held_out, vocab_size, max_order, contiguous=contiguous)


def ngram_probabilities(
    train: npt.ArrayLike,
    text: npt.ArrayLike,
    vocab_size: int,
    max_order: int,
    smoothing: Smoothing,
    *,
    past: npt.ArrayLike = (),
) -> Probabilities:
    """Probability [max_order + 1, l] that each order gives each token of ``text`` after ``past``."""
    counts = _fit(_ids("train", train, vocab_size), max_order)
    before, ids = np.asarray(past, dtype=np.int64), _ids("text", text, vocab_size)
    return np.stack(list(_predict(counts, before, ids, vocab_size, smoothing)))


def lzma_bits(train: bytes, held_out: bytes) -> LzmaBits:
    """Bits a byte of lzma on ``held_out``: with ``train`` already seen (the stronger baseline), and alone.

    primed = 8 · (size(train + held_out) - size(train)) / len(held_out), sizes without headers or checksums.
    """
    if not held_out:
        raise InputError("held_out is empty", given="0 bytes", expected="at least 1 byte")
    primed = _lzma_size(train + held_out) - _lzma_size(train)
    return LzmaBits(primed=8 * primed / len(held_out), alone=8 * _lzma_size(held_out) / len(held_out))


def baselines(
    train: npt.ArrayLike,
    held_out: npt.ArrayLike,
    vocab_size: int,
    max_order: int = 5,
    *,
    contiguous: bool = False,
    family: Literal["n-gram", "Markov"] = "n-gram",
) -> list[Baseline]:
    """Every baseline on one split: orders 0 to ``max_order`` of ``family``, then lzma primed and alone.

    lzma sees each token as one little-endian integer of the fewest bytes that hold every id.
    """
    train, held_out = _ids("train", train, vocab_size), _ids("held_out", held_out, vocab_size)
    orders = ngram_bits(train, held_out, vocab_size, max_order, contiguous=contiguous)
    integer = np.min_scalar_type(int(max(train.max(), held_out.max()))).newbyteorder("<")
    compressed = lzma_bits(train.astype(integer).tobytes(), held_out.astype(integer).tobytes())
    return [
        *(Baseline(f"{family} order {order}", bits) for order, bits in orders.items()),
        Baseline("lzma -9e after train", integer.itemsize * compressed.primed),
        Baseline("lzma -9e alone", integer.itemsize * compressed.alone),
    ]


# --- counting -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Level:
    """The distinct grams of one order: a context (a gram of the order below) and the token after it."""

    keys: Ids
    """context · radix + token, sorted; the position of a key is the gram's number."""
    context: Ids
    contexts: int
    counts: Ids
    """Occurrences of each gram."""
    neighbours: Ids
    """Distinct tokens left of each gram; the start of the text is one. At the top order, unknown: counts."""


@dataclass(frozen=True)
class _Counts:
    alphabet: Ids
    levels: list[_Level]

    @property
    def radix(self) -> int:
        return len(self.alphabet) + 1

    def encode(self, ids: Ids) -> Ids:
        """Rank of each id among the training ids; one past the last rank for an id that never occurred."""
        rank = np.searchsorted(self.alphabet, ids)
        known = self.alphabet[np.minimum(rank, len(self.alphabet) - 1)] == ids
        return np.where(known, rank, len(self.alphabet))


def _fit(train: Ids, max_order: int) -> _Counts:
    counts = _Counts(alphabet=np.unique(train), levels=[])
    codes = counts.encode(train)
    context, contexts = np.zeros_like(codes), 1
    below = context
    for order in range(max_order + 1):
        key = context * counts.radix + codes[order:]
        keys, gram, occurrences = np.unique(key, return_inverse=True, return_counts=True)
        if order and gram.size:
            counts.levels[-1].neighbours[:] = _left_neighbours(below, gram, len(counts.levels[-1].keys))
        counts.levels.append(_Level(keys, keys // counts.radix, contexts, occurrences, occurrences.copy()))
        below, context, contexts = gram, gram[:-1], len(keys)
    return counts


def _left_neighbours(below: Ids, gram: Ids, size: int) -> Ids:
    """For each gram of the order below: how many distinct grams of this order end in it; the start is one."""
    example = np.empty(int(gram.max()) + 1, dtype=np.int64)
    example[gram] = np.arange(1, len(gram) + 1)
    neighbours = np.bincount(below[example], minlength=size)
    neighbours[below[0]] += 1
    return neighbours


def _find(level: _Level, key: Ids) -> Ids:
    """The number of the gram with each key, -1 for a gram that never occurred."""
    if not level.keys.size:
        return np.full(len(key), -1)
    place = np.minimum(np.searchsorted(level.keys, key), len(level.keys) - 1)
    return np.where(level.keys[place] == key, place, -1)


# --- smoothing ----------------------------------------------------------------------------------------------


def _choose_smoothings(train: Ids, vocab_size: int, max_order: int) -> list[Smoothing]:
    """The smoothing of each order that predicts the last tenth of ``train`` best from the rest."""
    methods = get_args(Smoothing)
    size = len(train) // 10
    if size == 0:
        return [methods[0]] * (max_order + 1)
    counts, past = _fit(train[:-size], max_order), _tail(train[:-size], max_order)
    bits = [[_mean_bits(p) for p in _predict(counts, past, train[-size:], vocab_size, method)] for method in methods]
    return [methods[best] for best in np.argmin(bits, axis=0)]


def _predict(counts: _Counts, past: Ids, text: Ids, vocab_size: int, smoothing: Smoothing) -> Iterator[Probabilities]:
    """Order by order, the probability of each token of ``text`` after ``past``."""
    codes = counts.encode(np.concatenate([past, text]))
    context = np.zeros_like(codes)
    lower = np.full(len(codes), 1 / vocab_size)
    for level in counts.levels:
        gram = _find(level, context * counts.radix + codes)
        p = _interpolate(level, level.counts, context, gram, lower, smoothing)
        yield p[len(past) :]
        if smoothing == "kneser-ney":
            p = _interpolate(level, level.neighbours, context, gram, lower, smoothing)
        lower = p
        context = np.concatenate([[-1], gram[:-1]])


def _interpolate(
    level: _Level, counts: Ids, context: Ids, gram: Ids, lower: Probabilities, smoothing: Smoothing
) -> Probabilities:
    """One step of the recursion in the module's docstring; a context never seen leaves ``lower`` as it is.

    ``context`` and ``gram`` are -1 where unseen; that indexes the zero appended to each table.
    """
    total = np.bincount(level.context, weights=counts, minlength=level.contexts)
    if smoothing == "witten-bell":
        discount, given = np.zeros(len(counts)), np.ones(len(counts))
    else:
        discount = given = _discounts(counts)[np.minimum(counts, 3)]
    mass = np.bincount(level.context, weights=given, minlength=level.contexts)
    divisor = total + mass if smoothing == "witten-bell" else total
    seen = np.append(total, 0.0)[context] > 0
    own = np.append(counts - discount, 0.0)[gram]
    p = own + np.append(mass, 0.0)[context] * lower
    return np.where(seen, p / np.where(seen, np.append(divisor, 1.0)[context], 1.0), lower)


def _discounts(counts: Ids) -> Probabilities:
    """What is taken from a count of 0, 1, 2 and 3 or more (Chen and Goodman 1998, equation 26).

    A formula that a small table leaves undefined gives 1/2; each is kept in [0.1, count], so that some mass
    is always left for unseen tokens.
    """
    once, twice, thrice, four = (int(np.count_nonzero(counts == n)) for n in (1, 2, 3, 4))
    discounts = np.full(3, 0.5)
    if once and twice:
        y = once / (once + 2 * twice)
        ratios = (twice / once, thrice / twice, four / thrice if thrice else 1.0)
        discounts = np.array([n - (n + 1) * y * ratio for n, ratio in enumerate(ratios, start=1)])
    return np.concatenate([[0.0], np.clip(discounts, 0.1, [1, 2, 3])])


# --- small helpers ------------------------------------------------------------------------------------------


def _lzma_size(data: bytes) -> int:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
    return len(lzma.compress(data, format=lzma.FORMAT_RAW, filters=filters))


def _mean_bits(p: Probabilities) -> float:
    return float(-np.log2(p).mean())


def _tail(ids: Ids, size: int) -> Ids:
    return ids[len(ids) - min(size, len(ids)) :]


def _ids(name: str, ids: npt.ArrayLike, vocab_size: int) -> Ids:
    array = np.asarray(ids)
    if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iu":
        given = f"{array.dtype} of shape {array.shape}"
        raise InputError(f"{name} is no token sequence", given=given, expected="integers of shape [l], l >= 1")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= vocab_size:
        raise InputError(
            f"{name} has an id outside the vocabulary",
            given=f"{low} to {high}",
            expected=f"0 to {vocab_size - 1}",
        )
    return array.astype(np.int64)
