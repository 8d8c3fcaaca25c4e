"""Training batches as a pure function of (seed, step): resuming needs no state but the step."""

from __future__ import annotations

from typing import NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from crocuta.data.windows import TokenSource
from crocuta.errors import InputError


class _Epoch(NamedTuple):
    number: int
    phase: int
    order: NDArray[np.int64]
    flips: NDArray[np.bool_]


@final
class WindowLoader:
    """Random windows of ``source``; each epoch shows every one of its windows exactly once, in its own order.

    The stream is read as a ring. Epoch e cuts it, from a random phase on, into len(source) // length windows of
    ``length`` inputs that do not overlap; what the last window leaves over is missed in this epoch, elsewhere in the
    next. (The window that crosses the end of the stream goes on at its start, as windows go on across documents.)
    Batches run on from one epoch into the next.

    ``reverse_complement`` turns each row, inputs and targets together, into the other strand with probability 1/2;
    it needs the tokenizer's ``complement_ids``.

    Phase, order and strands come from raw Philox bits keyed by (seed, epoch), which numpy keeps for ever the same.
    Memory: 9 bytes a window for the current epoch, kept only to save time.

    Raises:
        InputError: an impossible length, batch size or seed, too short a stream, or missing ``complement_ids``.
    """

    def __init__(
        self,
        source: TokenSource,
        length: int,
        batch_size: int,
        seed: int,
        *,
        reverse_complement: bool = False,
        complement_ids: NDArray[np.int64] | None = None,
    ):
        for name, value in (("length", length), ("batch_size", batch_size)):
            if value < 1:
                raise InputError(f"{name} is impossible", given=value, expected=">= 1")
        if not 0 <= seed < 2**64:
            raise InputError("the seed is impossible", given=seed, expected="0 <= seed < 2^64")
        if len(source) <= length:
            raise InputError(
                "the stream is shorter than one window",
                given=f"{len(source)} tokens",
                expected=f"at least {length + 1}",
                fix="train on shorter windows or more data",
            )
        if reverse_complement and complement_ids is None:
            raise InputError("reverse_complement needs complement_ids", fix="use a tokenizer of nucleotides")
        self.source, self.length, self.batch_size, self.seed = source, length, batch_size, seed
        self.windows_per_epoch = len(source) // length
        self._complement_ids = complement_ids if reverse_complement else None
        self._epoch: _Epoch | None = None

    def batch(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(inputs [b l], targets [b l]) of step 0, 1, ...; targets are the inputs one place on."""
        if step < 0:
            raise InputError("there is no such step", given=step, expected=">= 0")
        rows = np.empty((self.batch_size, self.length + 1), np.int64)
        for row in range(self.batch_size):
            number, place = divmod(step * self.batch_size + row, self.windows_per_epoch)
            epoch = self._plan(number)
            tokens = self._window((epoch.phase + int(epoch.order[place]) * self.length) % len(self.source))
            if self._complement_ids is not None and epoch.flips[place]:
                tokens = self._complement_ids[tokens[::-1]]
            rows[row] = tokens
        return np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])

    def epoch(self, step: int) -> float:
        """How many times the data has been seen when ``step`` begins."""
        return step * self.batch_size / self.windows_per_epoch

    def _window(self, start: int) -> NDArray[np.int64]:
        length = self.length + 1
        whole = min(length, len(self.source) - start)
        tokens = self.source.read(start, whole)
        if whole < length:
            tokens = np.concatenate([tokens, self.source.read(0, length - whole)])
        return tokens

    def _plan(self, number: int) -> _Epoch:
        if self._epoch is None or self._epoch.number != number:
            n = self.windows_per_epoch
            phase = int(self._bits(number, 0, 1)[0]) % len(self.source)
            order = np.argsort(self._bits(number, 1, n), kind="stable")
            flips = np.unpackbits(self._bits(number, 2, -(-n // 64)).astype("<u8").view(np.uint8))[:n].astype(np.bool_)
            self._epoch = _Epoch(number, phase, order, flips)
        return self._epoch

    def _bits(self, epoch: int, purpose: int, count: int) -> NDArray[np.uint64]:
        """``count`` random words of the stream (seed, epoch, purpose)."""
        key = np.array([self.seed, epoch], np.uint64)
        return np.random.Philox(key=key, counter=[0, 0, 0, purpose]).random_raw(count)
