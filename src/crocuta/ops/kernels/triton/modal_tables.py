"""What the chunked modal filter needs of each channel: powers of its poles, made in float64 whatever the dtype."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

CHUNK = tl.constexpr(64)
"""Steps inside a Toeplitz product, and between two states that are kept: BLOCK of kernels/modal.py."""

ROWS = tl.constexpr(16)
"""Chunks that are worked on at once: the rows of the smallest matrix that a tensor core multiplies."""

JUMPS = tl.constexpr(2 * 64)
"""First row of the powers of p^CHUNK in a table."""

HEIGHT = tl.constexpr(2 * 64 + 16 + 2)
"""Rows of a table: p^t and R p^(t + 1) for t < CHUNK, p^(CHUNK m) for m < ROWS, then p^(CHUNK ROWS) and its error."""


class Tables(NamedTuple):
    """The filters of all channels, in the dtype of the sums."""

    powers: Tensor
    """[d z HEIGHT n] with z = 2 (re, im) or 1."""
    taps: Tensor
    """[d CHUNK]: the first taps, D in the first of them."""


def make_tables(constants: Tensor, skip: Tensor | None) -> Tables:
    """Tables from the rows [3 z n d] of ``ModalConstants``: poles, residues, and what rounding the poles has lost."""
    _, z, n, d = constants.shape
    powers = constants.new_empty(d, z, HEIGHT.value, n)
    taps = constants.new_empty(d, CHUNK.value)
    if d:
        _tables[(d,)](
            constants.contiguous(), None if skip is None else skip.contiguous(), powers, taps,
            *(d, n, width(n), z == 2, skip is not None),
        )  # fmt: skip
    return Tables(powers, taps)


def width(n: int) -> int:
    """Modes as a side of a matrix: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(n))


@triton.jit
def times(a_re, a_im, x_re, x_im, COMPLEX: tl.constexpr):
    """a · x; of real numbers the second parts are never looked at."""
    if COMPLEX:
        return a_re * x_re - a_im * x_im, a_re * x_im + a_im * x_re
    else:
        return a_re * x_re, x_im


@triton.jit
def load_rows(powers, rows, modes, n, COMPLEX: tl.constexpr):
    """Rows of one channel's table as (re, im); zeros for rows below the first and modes past the last."""
    at = rows * n + modes
    inside = (rows >= 0) & (modes < n)
    re = tl.load(powers + at, mask=inside, other=0)
    im = re
    if COMPLEX:
        im = tl.load(powers + n * HEIGHT + at, mask=inside, other=0)
    return re, im


@triton.jit
def _store_rows(powers, rows, modes, n, re, im, COMPLEX: tl.constexpr):
    at = rows * n + modes
    inside = (rows >= 0) & (modes < n)
    tl.store(powers + at, re, mask=inside)
    if COMPLEX:
        tl.store(powers + n * HEIGHT + at, im, mask=inside)


@triton.jit
def _power_table(p_re, p_im, exponents, BITS: tl.constexpr, COMPLEX: tl.constexpr):
    """p^t for all exponents t < 2^BITS, one row each, and p^(2^BITS), by squaring."""
    re, im = exponents * 0 + tl.full(p_re.shape, 1.0, tl.float64), exponents * 0 + tl.zeros(p_re.shape, tl.float64)
    for bit in tl.static_range(BITS):
        more_re, more_im = times(p_re, p_im, re, im, COMPLEX)
        chosen = ((exponents >> bit) & 1) == 1
        re, im = tl.where(chosen, more_re, re), tl.where(chosen, more_im, im)
        p_re, p_im = times(p_re, p_im, p_re, p_im, COMPLEX)
    return re, im, p_re, p_im


@triton.jit
def _load_pair(pointer, modes, n, d, COMPLEX: tl.constexpr):
    re = tl.load(pointer + modes * d, mask=modes < n, other=0).to(tl.float64)
    im = re
    if COMPLEX:
        im = tl.load(pointer + (n + modes) * d, mask=modes < n, other=0).to(tl.float64)
    return re, im


@triton.jit
def _tables(constants, skip, powers, taps, d, n, N: tl.constexpr, COMPLEX: tl.constexpr, HAS_SKIP: tl.constexpr):
    channel = tl.program_id(0).to(tl.int64)
    Z: tl.constexpr = 2 if COMPLEX else 1
    modes = tl.arange(0, N)[None, :]
    p_re, p_im = _load_pair(constants + channel, modes, n, d, COMPLEX)
    r_re, r_im = _load_pair(constants + n * Z * d + channel, modes, n, d, COMPLEX)
    lost_re, lost_im = _load_pair(constants + n * (2 * Z) * d + channel, modes, n, d, COMPLEX)
    p_re, p_im = p_re + lost_re, p_im + lost_im
    powers += channel * HEIGHT * Z * n

    time = tl.arange(0, CHUNK)[:, None]
    re, im, jump_re, jump_im = _power_table(p_re, p_im, time, 6, COMPLEX)
    _store_rows(powers, time, modes, n, re, im, COMPLEX)
    out_re, out_im = times(r_re, r_im, re, im, COMPLEX)
    first = tl.sum(out_re, axis=1)
    if HAS_SKIP:
        first += tl.where(tl.arange(0, CHUNK) == 0, tl.load(skip + channel).to(tl.float64), 0.0)
    tl.store(taps + channel * CHUNK + tl.arange(0, CHUNK), first)
    out_re, out_im = times(p_re, p_im, out_re, out_im, COMPLEX)
    _store_rows(powers, time + CHUNK, modes, n, out_re, out_im, COMPLEX)

    row = tl.arange(0, ROWS)[:, None]
    re, im, far_re, far_im = _power_table(jump_re, jump_im, row, 4, COMPLEX)
    _store_rows(powers, row + JUMPS, modes, n, re, im, COMPLEX)
    kept_re = far_re.to(powers.dtype.element_ty).to(tl.float64)
    kept_im = far_im.to(powers.dtype.element_ty).to(tl.float64)
    one = tl.zeros([1, 1], tl.int32) + JUMPS + ROWS
    _store_rows(powers, one, modes, n, kept_re, kept_im, COMPLEX)
    _store_rows(powers, one + 1, modes, n, far_re - kept_re, far_im - kept_im, COMPLEX)
