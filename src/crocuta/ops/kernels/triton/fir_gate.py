"""The short FIR and the first gate in one pass: (x2, x1 · v), the thirds of FIR(z) + bias; any layout of z.

A program has a tile of times and channels. Backward it filters again what lies ahead of it, k times for k taps, so that
between dy and dz nothing is written but partial sums for the taps, one row a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from crocuta.ops.kernels.fir import gate_gradients, gate_outputs
from crocuta.ops.kernels.library import contiguous
from crocuta.ops.kernels.triton.common import sums_of

_TIMES, _CHANNELS = 64, 32
"""Sides of a tile: at least 64 bytes side by side of 16-bit numbers, whichever axis is contiguous."""


def fir_gate(z: Tensor, taps: Tensor, bias: Tensor | None, tail: Tensor | None) -> tuple[Tensor, Tensor]:
    """``crocuta::fir_gate``; z in any floating dtype, the others in that of the sums."""
    x2, u = gate_outputs(z, taps, tail)
    b, l, d = x2.shape
    if x2.numel():
        grid = b * triton.cdiv(l, _TIMES), triton.cdiv(d, _CHANNELS)
        with torch.cuda.device_of(z):
            _forward[grid](
                *(z, *z.stride(), *contiguous(taps, bias, tail), x2, u, *x2.stride(), l, d),
                *(taps.shape[1], bias is not None, tail is not None, sums_of(z.dtype), _TIMES, _CHANNELS),
            )
    return x2, u


def fir_gate_backward(
    dx2: Tensor, du: Tensor, z: Tensor, taps: Tensor, bias: Tensor | None, tail: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``crocuta::fir_gate_backward``; sums over the times of a tile in their own dtype, over tiles in float64."""
    dz, dtaps, dbias, dtail = gate_gradients(z, taps, tail)
    (b, l, d), k = dx2.shape, taps.shape[1]
    first = -1 if tail is not None and k > 1 else 0  # a tile of times before z, for the gradient of the tail
    tiles = b * (triton.cdiv(l, _TIMES) - first)
    sums = taps.new_zeros(tiles, k + 1, 3 * d)
    if tiles * d:
        with torch.cuda.device_of(z):
            _backward[(tiles, triton.cdiv(d, _CHANNELS))](
                *(dx2, *dx2.stride(), du, *du.stride(), z, *z.stride(), *contiguous(taps, bias, tail)),
                *(dz, *dz.stride(), dtail, sums, l, d, first),
                *(k, bias is not None, tail is not None, sums_of(z.dtype), _TIMES, _CHANNELS),
            )
    total = sums.sum(0, dtype=torch.float64)
    dtaps.copy_(total[:-1].t())
    dbias.copy_(total[-1])
    return dz, dtaps, dbias, dtail


@triton.jit
def _load(x, x_l, x_d, t, c, l, inside):
    """A tile of one row; zeros before its first and after its last time."""
    return tl.load(x + t * x_l + c * x_d, mask=inside & (t >= 0) & (t < l), other=0)


@triton.jit
def _input(z, z_l, z_d, tail, t, c, l, d, inside, K: tl.constexpr, HAS_TAIL: tl.constexpr):
    """z[t], or what the tail holds for t < 0."""
    x = _load(z, z_l, z_d, t, c, l, inside)
    if HAS_TAIL:
        there = inside & (t < 0) & (t > -K)
        x += tl.load(tail + (t + (K - 1)) * (d * 3) + c, mask=there, other=0).to(x.dtype)
    return x


@triton.jit
def _filtered(
    z, z_l, z_d, taps, bias, tail, t, c, l, d, inside,
    K: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_TAIL: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """(FIR(z) + bias)[t]."""
    y = tl.zeros(inside.shape, SUMS)
    if HAS_BIAS:
        y += tl.load(bias + c, mask=inside, other=0)
    for j in tl.static_range(K):
        x = _input(z, z_l, z_d, tail, t - j, c, l, d, inside, K, HAS_TAIL)
        y += tl.load(taps + c * K + j, mask=inside, other=0) * x.to(SUMS)
    return y


@triton.jit
def _forward(
    z, z_b, z_l, z_d, taps, bias, tail, x2, u, o_b, o_l, o_d, l, d,
    K: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_TAIL: tl.constexpr, SUMS: tl.constexpr,
    TIMES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(l, TIMES)
    row, tile = (tl.program_id(0) // tiles).to(tl.int64), (tl.program_id(0) % tiles).to(tl.int64)
    t = tile * TIMES + tl.arange(0, TIMES)[:, None]
    c = tl.program_id(1).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    z += row * z_b
    if HAS_TAIL:
        tail += row * d * (3 * (K - 1))
    inside = (t < l) & (c < d)
    at = row * o_b + t * o_l + c * o_d
    y = _filtered(z, z_l, z_d, taps, bias, tail, t, c, l, d, inside, K, HAS_BIAS, HAS_TAIL, SUMS)
    tl.store(x2 + at, y, mask=inside)
    y = _filtered(z, z_l, z_d, taps, bias, tail, t, c + d, l, d, inside, K, HAS_BIAS, HAS_TAIL, SUMS)
    y *= _filtered(z, z_l, z_d, taps, bias, tail, t, c + d * 2, l, d, inside, K, HAS_BIAS, HAS_TAIL, SUMS)
    tl.store(u + at, y, mask=inside)


@triton.jit
def _backward(
    dx2, dx2_b, dx2_l, dx2_d, du, du_b, du_l, du_d, z, z_b, z_l, z_d, taps, bias, tail, dz, dz_b, dz_l, dz_d,
    dtail, sums, l, d, first,
    K: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_TAIL: tl.constexpr, SUMS: tl.constexpr,
    TIMES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(l, TIMES) - first
    row, tile = (tl.program_id(0) // tiles).to(tl.int64), (tl.program_id(0) % tiles + first).to(tl.int64)
    t = tile * TIMES + tl.arange(0, TIMES)[:, None]
    c = tl.program_id(1).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    z, dz = z + row * z_b, dz + row * dz_b
    dx2, du = dx2 + row * dx2_b, du + row * du_b
    if HAS_TAIL:
        tail, dtail = tail + row * d * (3 * (K - 1)), dtail + row * d * (3 * (K - 1))
    inside = (t < l) & (c < d)
    # gradients of the three filtered values here, and of z, which they reach from up to k - 1 times ahead
    d0, d1, d2 = tl.zeros(inside.shape, SUMS), tl.zeros(inside.shape, SUMS), tl.zeros(inside.shape, SUMS)
    dz0, dz1, dz2 = tl.zeros(inside.shape, SUMS), tl.zeros(inside.shape, SUMS), tl.zeros(inside.shape, SUMS)
    for j in tl.static_range(K):
        x1 = _filtered(z, z_l, z_d, taps, bias, tail, t + j, c + d, l, d, inside, K, HAS_BIAS, HAS_TAIL, SUMS)
        v = _filtered(z, z_l, z_d, taps, bias, tail, t + j, c + d * 2, l, d, inside, K, HAS_BIAS, HAS_TAIL, SUMS)
        gate = _load(du, du_l, du_d, t + j, c, l, inside).to(SUMS)
        g0, g1, g2 = _load(dx2, dx2_l, dx2_d, t + j, c, l, inside).to(SUMS), gate * v, gate * x1
        dz0 += tl.load(taps + c * K + j, mask=inside, other=0) * g0
        dz1 += tl.load(taps + (c + d) * K + j, mask=inside, other=0) * g1
        dz2 += tl.load(taps + (c + d * 2) * K + j, mask=inside, other=0) * g2
        if j == 0:
            d0, d1, d2 = g0, g1, g2
    _store_third(dz, dz_l, dz_d, dtail, t, c, d, inside, dz0, K, HAS_TAIL)
    _store_third(dz, dz_l, dz_d, dtail, t, c + d, d, inside, dz1, K, HAS_TAIL)
    _store_third(dz, dz_l, dz_d, dtail, t, c + d * 2, d, inside, dz2, K, HAS_TAIL)
    sums += tl.program_id(0).to(tl.int64) * d * (3 * (K + 1)) + c
    own = c < d
    for j in tl.static_range(K):
        x = _input(z, z_l, z_d, tail, t - j, c, l, d, inside, K, HAS_TAIL).to(SUMS)
        tl.store(sums + d * (3 * j), _over(d0 * x), mask=own)
        x = _input(z, z_l, z_d, tail, t - j, c + d, l, d, inside, K, HAS_TAIL).to(SUMS)
        tl.store(sums + d * (3 * j + 1), _over(d1 * x), mask=own)
        x = _input(z, z_l, z_d, tail, t - j, c + d * 2, l, d, inside, K, HAS_TAIL).to(SUMS)
        tl.store(sums + d * (3 * j + 2), _over(d2 * x), mask=own)
    tl.store(sums + d * (3 * K), _over(d0), mask=own)
    tl.store(sums + d * (3 * K + 1), _over(d1), mask=own)
    tl.store(sums + d * (3 * K + 2), _over(d2), mask=own)


@triton.jit
def _store_third(dz, dz_l, dz_d, dtail, t, c, d, inside, value, K: tl.constexpr, HAS_TAIL: tl.constexpr):
    tl.store(dz + t * dz_l + c * dz_d, value, mask=inside & (t >= 0))
    if HAS_TAIL:
        tl.store(dtail + (t + (K - 1)) * (d * 3) + c, value, mask=inside & (t < 0) & (t > -K))


@triton.jit
def _over(x):
    """The sum over time as [1 c]."""
    return tl.sum(x, axis=0)[None, :]
