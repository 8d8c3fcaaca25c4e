"""Work on rows, a few at a time: what lies between two products stays in the cache and is never a whole tensor."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor


def turn_size(x: Tensor, rows: int) -> int:
    """How many rows of x to do at once: ``rows`` on a CPU, else all of them.

    Gradients of weights are summed over turns, so what is narrower than float32 is done in one.
    """
    return rows if x.device.type == "cpu" and x.dtype.itemsize >= 4 else max(1, len(x))


def turns(rows: int, size: int) -> Iterator[slice]:
    """The slices of ``size`` rows that make up ``rows``; the last may be shorter."""
    return (slice(first, min(rows, first + size)) for first in range(0, rows, size))
