"""Synthetic tasks that show what a sequence model can do: six of MAD and associative recall, from seeds alone.

A task is a frozen description; ``task.draw(count, seed, split)`` gives inputs and targets, both int64 [n l]. The target
of a position is what the model should say there, ``IGNORED`` where nothing counts. The published definitions (Poli et
al. 2024, "Mechanistic Design and Scaling of Hybrid Architectures", and its code; Poli et al. 2023, "Hyena Hierarchy")
are kept, except that

- every target that counts is determined by the inputs up to its position, in training too. ``every_next_token`` gives
  the published training targets of the recall tasks: all next tokens, most of which nobody can know;
- selective copying draws its blanks from the seed, uniformly over all places (the published code takes them from a
  global generator and never puts one after the last token);
- the probe of fuzzy recall has always been shown before (in the published code its place may lie behind the end of
  the sequence, and then the target is a guess);
- compression does not count the constant token at the end.

Bits come from Philox, whose output numpy keeps the same for ever, and never from the methods of ``Generator``, whose
output it may change. Training and test draws have keys of their own, and so has every part of a longer stream.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, TypeAlias, final

import numpy as np
from numpy.typing import NDArray

from crocuta.errors import InputError

Split: TypeAlias = Literal["train", "test"]
Integers: TypeAlias = NDArray[np.int64]

IGNORED = -100
"""The target of a position that does not count; the same that the loss leaves out."""

_SPLITS: tuple[Split, ...] = ("train", "test")


class Examples(NamedTuple):
    """``inputs`` and ``targets``, int64 [n l]; ``IGNORED`` where no target counts."""

    inputs: Integers
    targets: Integers


@dataclass(frozen=True, kw_only=True)
class SyntheticTask(ABC):
    """A task with ``vocab_size`` tokens; ``length`` is that of the published definition."""

    name: ClassVar[str]
    vocab_size: int
    length: int

    @property
    def input_length(self) -> int:
        """l: the tokens that a model reads."""
        return self.length

    @final
    def draw(self, count: int, seed: int, split: Split = "train", part: int = 0) -> Examples:
        """``count`` examples, a function of the arguments alone; ``part`` numbers the pieces of an endless stream.

        Raises InputError for a count below 1, a negative seed or part, or an unknown split.
        """
        for what, given, least in (("count", count, 1), ("seed", seed, 0), ("part", part, 0)):
            if isinstance(given, bool) or not isinstance(given, int | np.integer) or given < least:
                raise InputError(f"{what} is impossible", given=repr(given), expected=f"a whole number >= {least}")
        if split not in _SPLITS:
            raise InputError("unknown split", given=repr(split), expected=f"one of {_SPLITS}")
        return self._examples(_Draws(seed, _SPLITS.index(split), part), count, split)

    @abstractmethod
    def _examples(self, draws: _Draws, count: int, split: Split) -> Examples: ...

    def _require(self, holds: bool, what: str, given: object, expected: str) -> None:
        if not holds:
            raise InputError(f"{type(self).__name__}.{what} is impossible", given=given, expected=expected)


@final
class _Draws:
    """Random integers, decisions and orders from raw bits of Philox."""

    def __init__(self, *key: int) -> None:
        self._bits = np.random.Philox(np.random.SeedSequence(key))

    def _raw(self, shape: tuple[int, ...]) -> NDArray[np.uint64]:
        return self._bits.random_raw(shape)

    def below(self, bound: int | Integers, shape: tuple[int, ...]) -> Integers:
        """Uniform on 0 .. bound - 1, but for a bias of bound / 2^32."""
        high = self._raw(shape) >> np.uint64(32)
        return ((high * np.asarray(bound, np.uint64)) >> np.uint64(32)).astype(np.int64)

    def happens(self, probability: float, shape: tuple[int, ...]) -> NDArray[np.bool_]:
        """True with ``probability``."""
        return (self._raw(shape) >> np.uint64(11)) * 2.0**-53 < probability

    def order(self, shape: tuple[int, ...]) -> Integers:
        """A random permutation along the last axis."""
        return self._raw(shape).argsort(axis=-1, kind="stable")


# --- recall ---


@dataclass(frozen=True, kw_only=True)
class InContextRecall(SyntheticTask):
    """Pairs of a key and a value; a key that was seen before has the value that it had then (MAD).

    The first half of the vocabulary is keys, the second values; each sequence draws a value for each key. length / 2
    pairs of uniform keys, the last one of a key that was seen. Counted: the value of every key that was seen before.
    """

    name: ClassVar[str] = "in-context-recall"
    vocab_size: int = 16
    length: int = 128
    every_next_token: bool = False
    """Training targets as published: the next token everywhere."""

    def __post_init__(self) -> None:
        self._require(self._letters >= 4, "vocab_size", self.vocab_size, "two keys and two values at least")
        self._require(self.length >= 4 and self.length % 2 == 0, "length", self.length, "an even number >= 4")

    @property
    def input_length(self) -> int:
        return self.length - 1

    @property
    def _letters(self) -> int:
        """Tokens that are keys or values."""
        return self.vocab_size

    @property
    def _noise(self) -> float:
        return 0.0

    def _examples(self, draws: _Draws, count: int, split: Split) -> Examples:
        pairs, half = self.length // 2, self._letters // 2
        keys = draws.below(half, (count, pairs))
        values_of = half + draws.below(self._letters - half, (count, half))
        noisy = draws.happens(self._noise, (count, pairs))
        noisy[np.arange(count), draws.below(pairs - 1, (count,))] = False  # one pair is there to be probed
        noisy[:, -1] = False
        keys[:, -1] = _pick(draws, keys[:, :-1], ~noisy[:, :-1])
        real = np.stack([keys, np.take_along_axis(values_of, keys, axis=1)], axis=-1)
        noise = self._letters + draws.below(max(1, self.vocab_size - self._letters), (count, pairs, 2))
        tokens = np.where(noisy[..., None], noise, real).reshape(count, -1)
        seen = _first(np.where(noisy, -1, keys)) < np.arange(pairs)
        counted = np.zeros((count, pairs, 2), bool)
        counted[..., 1] = seen & ~noisy
        return _shifted(tokens, counted.reshape(count, -1), self.every_next_token and split == "train")


@dataclass(frozen=True, kw_only=True)
class NoisyRecall(InContextRecall):
    """In-context recall where a pair is replaced by two noise tokens with ``noise`` probability (MAD).

    The last ``noise_tokens`` of the vocabulary are noise. At least one pair, and the probe, are real.
    """

    name: ClassVar[str] = "noisy-in-context-recall"
    vocab_size: int = 32
    noise_tokens: int = 16
    noise: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.noise_tokens >= 1, "noise_tokens", self.noise_tokens, ">= 1")
        self._require(0 <= self.noise < 1, "noise", self.noise, "0 <= noise < 1")

    @property
    def _letters(self) -> int:
        return self.vocab_size - self.noise_tokens

    @property
    def _noise(self) -> float:
        return self.noise


@dataclass(frozen=True, kw_only=True)
class FuzzyRecall(SyntheticTask):
    """In-context recall where keys and values are motifs of 1 to ``motif`` different tokens (MAD).

    The last token of the vocabulary is padding, put on the left; of the others the first half are the keys' and the
    rest the values'. Sizes and motifs are uniform, keys of a test are of the largest size; the pairs fill the sequence
    and the last repeats one of them. Counted: all tokens of the value of a key that was seen before. (In training a
    short key might have gone on; that its value comes next is then not certain.)
    """

    name: ClassVar[str] = "fuzzy-in-context-recall"
    vocab_size: int = 16
    length: int = 128
    motif: int = 3
    every_next_token: bool = False

    def __post_init__(self) -> None:
        half = (self.vocab_size - 1) // 2
        self._require(1 <= self.motif <= half, "motif", self.motif, f"1 to {half}, the number of keys' tokens")
        self._require(self.length >= 4 * self.motif, "length", self.length, f">= {4 * self.motif}: two pairs")

    def _examples(self, draws: _Draws, count: int, split: Split) -> Examples:
        tokens, counted = self._pairs(draws, count, split)
        return _shifted(tokens, counted, self.every_next_token and split == "train", self.vocab_size - 1)

    def _pairs(self, draws: _Draws, count: int, split: Split) -> tuple[Integers, NDArray[np.bool_]]:
        m, room = self.motif, self.length + 1
        most = room // 2  # pairs that fit, if all are short
        half = (self.vocab_size - 1) // 2
        keys = draws.order((count, most, half))[..., :m]
        values = half + draws.order((count, most, self.vocab_size - 1 - half))[..., :m]
        key_sizes = 1 + draws.below(m, (count, most)) if split == "train" else np.full((count, most), m)
        value_sizes = 1 + draws.below(m, (count, most))

        code = ((keys + 1) * (np.arange(m) < key_sizes[..., None])) @ (half + 1) ** np.arange(m)
        first = _first(code)
        values = np.take_along_axis(values, first[..., None], axis=1)
        value_sizes = np.take_along_axis(value_sizes, first, axis=1)

        # As many pairs as leave room for the probe, however long it is; then the probe, and nothing after it.
        sizes = key_sizes + value_sizes
        body = (sizes.cumsum(axis=1) <= room - 2 * m).sum(axis=1)
        source = np.broadcast_to(np.arange(most), (count, most)).copy()
        source[np.arange(count), body] = draws.below(body, (count,))
        kept = np.arange(most) <= body[:, None]
        order = source[..., None]
        key_sizes, value_sizes = (np.take_along_axis(s, source, axis=1) * kept for s in (key_sizes, value_sizes))
        motifs = np.concatenate([np.take_along_axis(x, order, axis=1) for x in (keys, values)], axis=-1)
        seen = (np.take_along_axis(first, source, axis=1) < np.arange(most)) & kept
        return self._laid_out(motifs, key_sizes, value_sizes, seen)

    def _laid_out(
        self, motifs: Integers, key_sizes: Integers, value_sizes: Integers, seen: NDArray[np.bool_]
    ) -> tuple[Integers, NDArray[np.bool_]]:
        """Motifs [n pairs 2m] one after the other, against the right end of rows of length + 1 tokens."""
        count, m = len(motifs), self.motif
        place = np.arange(m)
        used = np.concatenate([place < key_sizes[..., None], place < value_sizes[..., None]], axis=-1)
        is_value = np.arange(2 * m) >= m
        counted = used & is_value & seen[..., None]
        flat = used.reshape(count, -1)
        to = self.length + flat.cumsum(axis=1) - flat.sum(axis=1, keepdims=True)
        rows = np.broadcast_to(np.arange(count)[:, None], flat.shape)
        tokens = np.full((count, self.length + 1), self.vocab_size - 1)
        marks = np.zeros(tokens.shape, bool)
        tokens[rows[flat], to[flat]] = motifs.reshape(count, -1)[flat]
        marks[rows[flat], to[flat]] = counted.reshape(count, -1)[flat]
        return tokens, marks


@dataclass(frozen=True, kw_only=True)
class AssociativeRecall(SyntheticTask):
    """length / 2 pairs of a key and its value, a mark, and a key that was seen: which was its value (H3; Hyena, §4.1).

    Of the vocabulary, the last two tokens are the mark and one that the published definition keeps for keys never seen
    (here there are none); the first half of the rest are keys, the second values. Counted in a test: the value at
    the end. Counted in training: the value of every key that was seen before.
    """

    name: ClassVar[str] = "associative-recall"
    vocab_size: int = 10
    length: int = 256
    every_next_token: bool = False

    def __post_init__(self) -> None:
        self._require(self.vocab_size >= 6, "vocab_size", self.vocab_size, ">= 6: two keys, two values, two marks")
        self._require(self.length >= 2 and self.length % 2 == 0, "length", self.length, "an even number >= 2")

    @property
    def input_length(self) -> int:
        return self.length + 2

    def _examples(self, draws: _Draws, count: int, split: Split) -> Examples:
        pairs, letters = self.length // 2, self.vocab_size - 2
        half = letters // 2
        keys = draws.below(half, (count, pairs + 1))
        keys[:, -1] = _pick(draws, keys[:, :-1], np.ones((count, pairs), bool))
        values_of = half + draws.below(letters - half, (count, half))
        real = np.stack([keys, np.take_along_axis(values_of, keys, axis=1)], axis=-1).reshape(count, -1)
        tokens = np.insert(real, self.length, letters, axis=1)
        counted = np.zeros(real.shape, bool)
        counted[:, 1::2] = _first(keys) < np.arange(pairs + 1)
        if split == "test":
            counted[:, :-1] = False
        counted = np.insert(counted, self.length, False, axis=1)
        return _shifted(tokens, counted, self.every_next_token and split == "train")


# --- memory, compression, copying ---


@dataclass(frozen=True, kw_only=True)
class Memorization(SyntheticTask):
    """The value of each key is a fact of the task, learned by heart: k ? k ? ... (MAD).

    The last token of the vocabulary is the question; of the others the first half are keys, the rest values, and
    ``facts`` seeds the one-to-one map between them, the same in training and test. Counted: every question.
    """

    name: ClassVar[str] = "memorization"
    vocab_size: int = 256
    length: int = 32
    facts: int = 12345

    def __post_init__(self) -> None:
        self._require(self.vocab_size >= 5, "vocab_size", self.vocab_size, ">= 5: two keys, two values, the question")
        self._require(self.length >= 2 and self.length % 2 == 0, "length", self.length, "an even number >= 2")

    def values(self) -> Integers:
        """The value of each key."""
        half = (self.vocab_size - 1) // 2
        return half + _Draws(self.facts).order((self.vocab_size - 1 - half,))[:half]

    def _examples(self, draws: _Draws, count: int, split: Split) -> Examples:
        values = self.values()
        keys = draws.below(len(values), (count, self.length // 2))
        question, ignored = np.full_like(keys, self.vocab_size - 1), np.full_like(keys, IGNORED)
        inputs = np.stack([keys, question], axis=-1).reshape(count, -1)
        return Examples(inputs, np.stack([ignored, values[keys]], axis=-1).reshape(count, -1))


@dataclass(frozen=True, kw_only=True)
class Compression(SyntheticTask):
    """Random tokens and a last one that marks the end; what the model makes of the last must say all others (MAD).

    The target of a position is its own input, to be said by a decoder that sees the hidden state of the last token
    and the number of the position, nothing else. Counted: all but the mark.
    """

    name: ClassVar[str] = "compression"
    vocab_size: int = 16
    length: int = 32

    def __post_init__(self) -> None:
        self._require(self.vocab_size >= 3, "vocab_size", self.vocab_size, ">= 3")
        self._require(self.length >= 2, "length", self.length, ">= 2")

    def _examples(self, draws: _Draws, count: int, split: Split) -> Examples:
        inputs = draws.below(self.vocab_size - 1, (count, self.length))
        inputs[:, -1] = self.vocab_size - 1
        targets = inputs.copy()
        targets[:, -1] = IGNORED
        return Examples(inputs, targets)


@dataclass(frozen=True, kw_only=True)
class SelectiveCopying(SyntheticTask):
    """``copied`` random tokens among blanks, a mark, then as many blanks: say the tokens in their order (MAD).

    The last token of the vocabulary is the mark, the one before it the blank. Counted: the blanks after the mark.
    """

    name: ClassVar[str] = "selective-copying"
    vocab_size: int = 16
    length: int = 256
    copied: int = 16

    def __post_init__(self) -> None:
        self._require(self.vocab_size >= 4, "vocab_size", self.vocab_size, ">= 4")
        self._require(self.copied >= 1, "copied", self.copied, ">= 1")
        least = 2 * self.copied + 1
        self._require(self.length >= least, "length", self.length, f">= {least}: the tokens twice, and the mark")

    def _examples(self, draws: _Draws, count: int, split: Split) -> Examples:
        places = self.length - self.copied - 1
        tokens = draws.below(self.vocab_size - 2, (count, self.copied))
        chosen = np.sort(draws.order((count, places))[:, : self.copied], axis=1)
        inputs = np.full((count, self.length), self.vocab_size - 2)
        np.put_along_axis(inputs, chosen, tokens, axis=1)
        inputs[:, places] = self.vocab_size - 1
        targets = np.full_like(inputs, IGNORED)
        targets[:, places + 1 :] = tokens
        return Examples(inputs, targets)


MAD: tuple[type[SyntheticTask], ...] = (
    InContextRecall,
    NoisyRecall,
    FuzzyRecall,
    Memorization,
    Compression,
    SelectiveCopying,
)
"""The six tasks of MAD; each one's defaults are its baseline setting."""


# --- helpers ---


def _first(keys: Integers) -> Integers:
    """[n p] -> [n p]: the first place of a row that holds the same key."""
    return (keys[:, :, None] == keys[:, None, :]).argmax(axis=2)


def _pick(draws: _Draws, keys: Integers, allowed: NDArray[np.bool_]) -> Integers:
    """One of the different allowed keys of each row, each as likely."""
    present = np.zeros((len(keys), int(keys.max()) + 1), bool)
    rows = np.broadcast_to(np.arange(len(keys))[:, None], keys.shape)
    present[rows[allowed], keys[allowed]] = True
    chosen = draws.below(present.sum(axis=1), (len(keys),))
    return (present.cumsum(axis=1) > chosen[:, None]).argmax(axis=1)


def _shifted(tokens: Integers, counted: NDArray[np.bool_], everywhere: bool, padding: int | None = None) -> Examples:
    """Inputs and next tokens as targets; all of them if ``everywhere`` (but no padding), else the counted ones."""
    if everywhere:
        counted = np.ones(tokens.shape, bool) if padding is None else tokens != padding
    return Examples(tokens[:, :-1].copy(), np.where(counted, tokens, IGNORED)[:, 1:])
