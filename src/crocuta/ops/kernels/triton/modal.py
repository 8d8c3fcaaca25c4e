"""The modal filter in chunks: a Toeplitz product inside each, and the state that goes from one to the next.

    y[j] = Σ_{i ≤ j} h[j - i] u[i] + Re Σ_n R_n p_n^(j+1) s_n,    s_n <- p_n^CHUNK s_n + Σ_i p_n^(CHUNK-1-i) u[i]

h[0] contains D. A program has one channel of one row and goes through its time once, ROWS chunks together: they are the
rows of a matrix. The states of ROWS chunks follow from one another by doubling, with powers that are rounded once; what
goes on to the next ROWS chunks is float64, so that rounding does not add up over a long sequence. All other sums and
states are float32 (float64 for float64); see ``common.precision`` for the products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from crocuta.ops.kernels import gpu
from crocuta.ops.kernels.library import contiguous
from crocuta.ops.kernels.modal import scan_outputs
from crocuta.ops.kernels.triton.common import columns_of, precision, sums_of
from crocuta.ops.kernels.triton.modal_tables import CHUNK, HEIGHT, JUMPS, ROWS, load_rows, make_tables, times, width

_WARPS = 8
"""A program's: with 4 of them, tables and sums do not fit into registers."""


def scan(
    u: Tensor, constants: Tensor, skip: Tensor | None, state: Tensor | None, lengths: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``crocuta::modal_scan``; u in any floating dtype, the others in that of the sums."""
    (b, l, d), (_, z, n, _) = u.shape, constants.shape
    y, last, kept = scan_outputs(u, constants, keep)
    if b * d == 0:
        return y, last, kept
    with torch.cuda.device_of(u):
        u = columns_of(u)
        _forward[(b * d,)](
            *(u, u.stride(0), u.stride(2), *make_tables(constants, skip), *contiguous(state, lengths)),
            *(y, y.stride(0), y.stride(2), last, kept, b, l, d, n, width(n), z == 2),
            *(state is not None, lengths is not None, keep, sums_of(u.dtype), precision(u.dtype)),
            num_warps=_WARPS,
        )
    return y, last, kept


def scan_backward(
    dy: Tensor,
    dlast: Tensor | None,
    u: Tensor,
    constants: Tensor,
    skip: Tensor | None,
    kept: Tensor,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``crocuta::modal_scan_backward``; sums over time in the dtype of the states, over rows in float64."""
    (b, l, d), (_, z, n, _) = u.shape, constants.shape
    du, dstate = gpu.empty(u, b, l, d), constants.new_empty(b, z * n, d)
    sums = constants.new_empty(b, 2 * z * n + 1, d)
    if b * d:
        with torch.cuda.device_of(u):
            u, dy = columns_of(u), columns_of(dy)
            _backward[(b * d,)](
                *(dy, dy.stride(0), dy.stride(2), u, u.stride(0), u.stride(2), *contiguous(dlast, constants)),
                *(*make_tables(constants, skip), *contiguous(kept.permute(3, 0, 1, 2), lengths)),
                *(du, du.stride(0), du.stride(2), dstate, sums, b, l, d, n, width(n), z == 2),
                *(dlast is not None, lengths is not None, sums_of(u.dtype), precision(u.dtype)),
                num_warps=_WARPS,
            )
    total = sums.double().sum(0).to(constants.dtype)
    dconstants = torch.zeros_like(constants)
    dconstants[:2] = total[:-1].view(2, z, n, d)
    return du, dconstants, total[-1], dstate


# --- the parts of both passes ---------------------------------------------------------------------------------


@triton.jit
def _product(a, b, SUMS: tl.constexpr, PRECISION: tl.constexpr):
    return tl.dot(a, b, input_precision=PRECISION, out_dtype=SUMS)


@triton.jit
def _row(x, at, rows):
    """Row ``at`` of x; zeros where it has no such row."""
    return tl.sum(tl.where(rows == at, x, 0.0), axis=0)


@triton.jit
def _moved(x, by, rows):
    """Row m - by of x in row m; zeros where x has no such row."""
    source = rows - by
    inside = (source >= 0) & (source < ROWS)
    index = tl.broadcast_to(tl.where(inside, source, 0), x.shape)
    return tl.where(inside, tl.gather(x, index, axis=0), 0.0)


@triton.jit
def _states(x_re, x_im, powers, rows, modes, n, SIGN: tl.constexpr, COMPLEX: tl.constexpr):
    """s[m] = a s[m - 1] + x[m], a = p^CHUNK, by doubling; SIGN -1 goes backwards, with conj(a)."""
    for bit in tl.static_range(4):
        a_re, a_im = load_rows(powers, tl.zeros([1, 1], tl.int32) + JUMPS + (1 << bit), modes, n, COMPLEX)
        past_re = _moved(x_re, SIGN * (1 << bit), rows)
        past_im = past_re
        if COMPLEX:
            past_im = _moved(x_im, SIGN * (1 << bit), rows)
        past_re, past_im = times(a_re, a_im * SIGN, past_re, past_im, COMPLEX)
        x_re += past_re
        if COMPLEX:
            x_im += past_im
    return x_re, x_im


@triton.jit
def _far(s_re, s_im, powers, modes, n, SIGN: tl.constexpr, COMPLEX: tl.constexpr):
    """p^(CHUNK ROWS) s, or with the conjugate, in float64: rounding what goes from end to end would add up."""
    one = tl.zeros([1, 1], tl.int32) + JUMPS + ROWS
    a_re, a_im = load_rows(powers, one, modes, n, COMPLEX)
    lost_re, lost_im = load_rows(powers, one + 1, modes, n, COMPLEX)
    a_re, a_im = a_re.to(tl.float64) + lost_re, a_im.to(tl.float64) + lost_im
    return times(a_re, a_im * SIGN, s_re, s_im, COMPLEX)


@triton.jit
def _carried(
    x_re,
    x_im,
    carry_re,
    carry_im,
    reach_re,
    reach_im,
    powers,
    rows,
    modes,
    n,
    SIGN: tl.constexpr,
    COMPLEX: tl.constexpr,
):
    """The states before ROWS chunks that add x, and the state after them all; SIGN -1 goes backwards, with conj(p).

    ``carry`` is the state before the first of them, and ``reach`` the power of p from there to each.
    """
    LAST: tl.constexpr = ROWS - 1 if SIGN == 1 else 0
    x_re, x_im = _states(x_re, x_im, powers, rows, modes, n, SIGN, COMPLEX)
    old_re, old_im = carry_re.to(x_re.dtype), carry_im.to(x_re.dtype)
    s_re, s_im = times(reach_re, reach_im * SIGN, old_re, old_im, COMPLEX)
    carry_re, carry_im = _far(carry_re, carry_im, powers, modes, n, SIGN, COMPLEX)
    s_re += _moved(x_re, SIGN, rows)
    carry_re += _row(x_re, LAST, rows)[None, :]
    if COMPLEX:
        s_im += _moved(x_im, SIGN, rows)
        carry_im += _row(x_im, LAST, rows)[None, :]
    return s_re, s_im, carry_re, carry_im


@triton.jit
def _toeplitz(taps):
    """T[i, j] = taps[j - i] for j >= i, so that (rows of inputs) T is their convolution inside a chunk."""
    shift = tl.arange(0, CHUNK)[None, :] - tl.arange(0, CHUNK)[:, None]
    return tl.load(taps + shift, mask=shift >= 0, other=0)


@triton.jit
def _load_state(pointer, modes, n, d, COMPLEX: tl.constexpr):
    """One channel of [b zn d] as [1 N]."""
    re = tl.load(pointer + modes * d, mask=modes < n, other=0)
    im = re
    if COMPLEX:
        im = tl.load(pointer + (n + modes) * d, mask=modes < n, other=0)
    return re, im


@triton.jit
def _store_state(pointer, modes, n, d, re, im, COMPLEX: tl.constexpr):
    tl.store(pointer + modes * d, re, mask=modes < n)
    if COMPLEX:
        tl.store(pointer + (n + modes) * d, im, mask=modes < n)


# --- forward --------------------------------------------------------------------------------------------------


@triton.jit
def _forward(
    u, u_b, u_d, powers, taps, state, lengths, y, y_b, y_d, last, kept, batch, l, d, n,
    N: tl.constexpr, COMPLEX: tl.constexpr, HAS_STATE: tl.constexpr, HAS_LENGTHS: tl.constexpr, KEEP: tl.constexpr,
    SUMS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, channel = (tl.program_id(0) // d).to(tl.int64), (tl.program_id(0) % d).to(tl.int64)
    Z: tl.constexpr = 2 if COMPLEX else 1
    time, rows, modes = tl.arange(0, CHUNK), tl.arange(0, ROWS)[:, None], tl.arange(0, N)[None, :]
    length = tl.minimum(tl.load(lengths + row), l).to(tl.int32) if HAS_LENGTHS else l
    full = length // CHUNK  # chunks before the one that is not full, if it is empty
    rest = length - full * CHUNK
    u += row * u_b + channel * u_d
    y += row * y_b + channel * y_d
    powers += channel * HEIGHT * Z * n
    blocks = tl.cdiv(l, CHUNK)
    kept += (channel * batch + row) * blocks * Z * n

    toeplitz = _toeplitz(taps + channel * CHUNK)
    read_re, read_im = load_rows(powers, -time[:, None] + (CHUNK - 1), modes, n, COMPLEX)
    write_re, write_im = load_rows(powers, time[None, :] + CHUNK, tl.arange(0, N)[:, None], n, COMPLEX)
    since_re, since_im = load_rows(powers, rows + JUMPS, modes, n, COMPLEX)
    carry_re, carry_im = tl.zeros([1, N], tl.float64), tl.zeros([1, N], tl.float64)
    if HAS_STATE:
        carry_re, carry_im = _load_state(state + row * Z * n * d + channel, modes, n, d, COMPLEX)
        carry_re, carry_im = carry_re.to(tl.float64), carry_im.to(tl.float64)
    end_re, end_im = tl.zeros([N], SUMS), tl.zeros([N], SUMS)
    for step in range(0, l // CHUNK // ROWS + 1):
        chunk = step * ROWS + rows
        t = chunk * CHUNK + time[None, :]
        x = tl.load(u + t, mask=t < length, other=0).to(SUMS)
        added_re = _product(x, read_re, SUMS, PRECISION)
        added_im = _product(x, read_im, SUMS, PRECISION) if COMPLEX else added_re
        past_re, past_im, carry_re, carry_im = _carried(
            added_re, added_im, carry_re, carry_im, since_re, since_im, powers, rows, modes, n, 1, COMPLEX
        )
        end_re += _row(past_re, full - step * ROWS, rows)
        out = _product(x, toeplitz, SUMS, PRECISION)
        out += _product(past_re, write_re, SUMS, PRECISION)
        if COMPLEX:
            end_im += _row(past_im, full - step * ROWS, rows)
            out -= _product(past_im, write_im, SUMS, PRECISION)
        if KEEP:
            at = kept + chunk * Z * n + modes
            tl.store(at, past_re, mask=(chunk < blocks) & (modes < n))
            if COMPLEX:
                tl.store(at + n, past_im, mask=(chunk < blocks) & (modes < n))
        tl.store(y + t, tl.where(t < length, out, 0.0), mask=t < l)

    # the state after the last input, which is ``rest`` steps into its chunk
    x = tl.load(u + full * CHUNK + time, mask=time < rest, other=0).to(SUMS)
    p_re, p_im = load_rows(powers, rest - 1 - time[:, None], modes, n, COMPLEX)
    a_re, a_im = load_rows(powers, tl.zeros([1, 1], tl.int32) + rest, modes, n, COMPLEX)
    re, im = times(a_re, a_im, end_re[None, :], end_im[None, :], COMPLEX)
    re += tl.sum(p_re * x[:, None], axis=0)[None, :]
    if COMPLEX:
        im += tl.sum(p_im * x[:, None], axis=0)[None, :]
    _store_state(last + row * Z * n * d + channel, modes, n, d, re, im, COMPLEX)


# --- backward -------------------------------------------------------------------------------------------------


@triton.jit
def _backward(
    dy, dy_b, dy_d, u, u_b, u_d, dlast, constants, powers, taps, kept, lengths, du, du_b, du_d, dstate, sums,
    batch, l, d, n, N: tl.constexpr, COMPLEX: tl.constexpr, HAS_END: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    SUMS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """λ[m], the gradient of the state before chunk m, goes backwards as states go forwards; the rest is products."""
    row, channel = (tl.program_id(0) // d).to(tl.int64), (tl.program_id(0) % d).to(tl.int64)
    Z: tl.constexpr = 2 if COMPLEX else 1
    time, rows, modes = tl.arange(0, CHUNK), tl.arange(0, ROWS)[:, None], tl.arange(0, N)[None, :]
    length = tl.minimum(tl.load(lengths + row), l).to(tl.int32) if HAS_LENGTHS else l
    full = length // CHUNK
    rest = length - full * CHUNK
    dy += row * dy_b + channel * dy_d
    u += row * u_b + channel * u_d
    du += row * du_b + channel * du_d
    powers += channel * HEIGHT * Z * n
    blocks = tl.cdiv(l, CHUNK)
    kept += (channel * batch + row) * blocks * Z * n

    toeplitz = tl.trans(_toeplitz(taps + channel * CHUNK))
    read_re, read_im = load_rows(powers, -time[None, :] + (CHUNK - 1), tl.arange(0, N)[:, None], n, COMPLEX)
    write_re, write_im = load_rows(powers, time[:, None] + CHUNK, modes, n, COMPLEX)
    until_re, until_im = load_rows(powers, -rows + (JUMPS + ROWS - 1), modes, n, COMPLEX)
    last_re, last_im = tl.zeros([1, N], SUMS), tl.zeros([1, N], SUMS)
    if HAS_END:
        last_re, last_im = _load_state(dlast + row * Z * n * d + channel, modes, n, d, COMPLEX)
    to_inputs, start_re, start_im = _from_last(last_re, last_im, powers, rest, modes, n, COMPLEX)
    carry_re, carry_im = tl.zeros([1, N], tl.float64), tl.zeros([1, N], tl.float64)
    end_re, end_im = tl.zeros([1, N], SUMS), tl.zeros([1, N], SUMS)
    djump_re, djump_im = tl.zeros([1, N], SUMS), tl.zeros([1, N], SUMS)
    dtoeplitz = tl.zeros([CHUNK, CHUNK], SUMS)
    dread_re, dread_im = tl.zeros([CHUNK, N], SUMS), tl.zeros([CHUNK, N], SUMS)
    dwrite_re, dwrite_im = tl.zeros([CHUNK, N], SUMS), tl.zeros([CHUNK, N], SUMS)
    steps = l // CHUNK // ROWS + 1
    for reverse in range(0, steps):
        step = steps - 1 - reverse
        chunk = step * ROWS + rows
        t = chunk * CHUNK + time[None, :]
        x = tl.load(u + t, mask=t < length, other=0).to(SUMS)
        g = tl.load(dy + t, mask=t < length, other=0).to(SUMS)
        at, there = kept + chunk * Z * n + modes, (chunk < blocks) & (chunk <= full) & (modes < n)
        s_re = tl.load(at, mask=there, other=0)
        s_im = tl.load(at + n, mask=there, other=0) if COMPLEX else s_re
        at_full = chunk == full
        from_re = _product(g, write_re, SUMS, PRECISION) + tl.where(at_full, start_re, 0.0)
        from_im = from_re
        if COMPLEX:
            from_im = tl.where(at_full, start_im, 0.0) - _product(g, write_im, SUMS, PRECISION)
        after_re, after_im, carry_re, carry_im = _carried(
            from_re, from_im, carry_re, carry_im, until_re, until_im, powers, rows, modes, n, -1, COMPLEX
        )
        out = _product(g, toeplitz, SUMS, PRECISION)
        out += _product(after_re, read_re, SUMS, PRECISION)
        out += tl.where(at_full, to_inputs[None, :], 0.0)
        x, g_t = tl.trans(x), tl.trans(g)
        dtoeplitz += _product(x, g, SUMS, PRECISION)
        dread_re += _product(x, after_re, SUMS, PRECISION)
        dwrite_re += _product(g_t, s_re, SUMS, PRECISION)
        end_re += _row(s_re, full - step * ROWS, rows)[None, :]
        djump_re += tl.sum(s_re * after_re, axis=0)[None, :]
        if COMPLEX:
            out += _product(after_im, read_im, SUMS, PRECISION)
            dread_im += _product(x, after_im, SUMS, PRECISION)
            dwrite_im -= _product(g_t, s_im, SUMS, PRECISION)
            end_im += _row(s_im, full - step * ROWS, rows)[None, :]
            djump_re += tl.sum(s_im * after_im, axis=0)[None, :]
            djump_im += tl.sum(s_re * after_im - s_im * after_re, axis=0)[None, :]
        tl.store(du + t, tl.where(t < length, out, 0.0), mask=t < l)
    _store_state(dstate + row * Z * n * d + channel, modes, n, d, carry_re, carry_im, COMPLEX)

    # inputs of the chunk that is not full, moved to its end, where the powers are those of ``read``
    x = tl.load(u + full * CHUNK + time + rest - CHUNK, mask=time + rest >= CHUNK, other=0).to(SUMS)[:, None]
    dread_re += x * last_re
    if COMPLEX:
        dread_im += x * last_im
    dend_re, dend_im = times(end_re, -end_im, last_re, last_im, COMPLEX)
    sums += row * (n * (2 * Z) + 1) * d + channel
    index = time[:, None] + time[None, :]
    inside = index < CHUNK
    dtaps = tl.sum(tl.where(inside, tl.gather(dtoeplitz, tl.where(inside, index, 0), axis=1), 0.0), axis=0)
    tl.store(sums + n * (2 * Z) * d + time * 0, dtaps, mask=time == 0)  # the gradient of D is that of the first tap
    dp_re, dp_im, dr_re, dr_im = _to_filter(
        powers, constants + n * Z * d + channel, dtaps[:, None], dread_re, dread_im, dwrite_re, dwrite_im,
        djump_re, djump_im, dend_re, dend_im, rest, modes, n, d, COMPLEX,
    )  # fmt: skip
    _store_state(sums, modes, n, d, dp_re, dp_im, COMPLEX)
    _store_state(sums + n * Z * d, modes, n, d, dr_re, dr_im, COMPLEX)


@triton.jit
def _from_last(last_re, last_im, powers, rest, modes, n, COMPLEX: tl.constexpr):
    """What the gradient of the last state gives to the inputs of the chunk that is not full and the state before it."""
    p_re, p_im = load_rows(powers, rest - 1 - tl.arange(0, CHUNK)[:, None], modes, n, COMPLEX)
    to_inputs = tl.sum(p_re * last_re + p_im * last_im, axis=1) if COMPLEX else tl.sum(p_re * last_re, axis=1)
    p_re, p_im = load_rows(powers, tl.zeros([1, 1], tl.int32) + rest, modes, n, COMPLEX)
    start_re, start_im = times(p_re, -p_im, last_re, last_im, COMPLEX)
    return to_inputs, start_re, start_im


@triton.jit
def _to_filter(
    powers, residues, dtaps, dread_re, dread_im, dwrite_re, dwrite_im, djump_re, djump_im, dend_re, dend_im, rest,
    modes, n, d, COMPLEX: tl.constexpr,
):  # fmt: skip
    """Gradients of p and R from those of what was made of them; that of p^t gives conj(t p^(t-1)) times itself to p."""
    t = tl.arange(0, CHUNK)[:, None]
    one = tl.zeros([1, 1], tl.int32) + 1
    p_re, p_im = load_rows(powers, one, modes, n, COMPLEX)
    r_re, r_im = _load_state(residues, modes, n, d, COMPLEX)
    # h[t] = Re R p^t, and R p^(t + 1) from the state to output t
    re, im = load_rows(powers, t, modes, n, COMPLEX)
    taps_re, taps_im = re * dtaps, -im * dtaps
    write_re, write_im = times(re, -im, dwrite_re, dwrite_im, COMPLEX)
    past_re, past_im = times(p_re, -p_im, _over(write_re), _over(write_im), COMPLEX)
    dr_re, dr_im = _over(taps_re) + past_re, _over(taps_im) + past_im
    re, im = load_rows(powers, t - 1, modes, n, COMPLEX)
    all_re, all_im = t * re * dtaps + (t + 1) * write_re, (t + 1) * write_im - t * im * dtaps
    dp_re, dp_im = times(r_re, -r_im, _over(all_re), _over(all_im), COMPLEX)
    # p^(CHUNK - 1 - t) from input t to the state, p^CHUNK from chunk to chunk, p^rest to the last state
    re, im = load_rows(powers, -t + (CHUNK - 2), modes, n, COMPLEX)
    all_re, all_im = times(re, -im, dread_re, dread_im, COMPLEX)
    dp_re, dp_im = dp_re + _over((-t + (CHUNK - 1)) * all_re), dp_im + _over((-t + (CHUNK - 1)) * all_im)
    re, im = load_rows(powers, one + CHUNK - 2, modes, n, COMPLEX)
    all_re, all_im = times(re, -im, djump_re, djump_im, COMPLEX)
    dp_re, dp_im = dp_re + all_re * CHUNK, dp_im + all_im * CHUNK
    re, im = load_rows(powers, one * rest - 1, modes, n, COMPLEX)
    all_re, all_im = times(re, -im, dend_re, dend_im, COMPLEX)
    return dp_re + rest * all_re, dp_im + rest * all_im, dr_re, dr_im


@triton.jit
def _over(x):
    """The sum over time as [1 N]."""
    return tl.sum(x, axis=0)[None, :]
