"""Modal filters: sums of decaying exponentials, complex (StripedHyena 1) or real (StripedHyena 2).

    s[t] = p · s[t-1] + u[t],   y[t] = Re Σ_n R_n s_n[t] + D · u[t],   h[t] = Re Σ_n R_n p_n^t

One filter, three exact ways to run it: the recurrence (``recurrent``, for decoding), the chunked dual form
(``chunked``: a Toeplitz product inside blocks, the state between them) and the materialised taps (``modal_taps``
with ``fft_convolution``). The state [b d n *z] is float32 (or float64), as are poles and all sums. The tables of
powers are made in float64, because an angle of 3 rad times 10^6 steps leaves no digits in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from crocuta.ops.blocks import channels_first, compute_dtype, full_precision, pad_to_blocks, toeplitz, toeplitz_adjoint

BLOCK = 32
"""Tokens a block of the chunked form: 2·32 flops a token inside, l / 32 states between (docs/decisions.md)."""

SPAN = 16
"""Blocks a span of the scan over blocks: spans side by side, then one step a span, so that rounding adds up over
l / (BLOCK · SPAN) steps instead of l."""


class ModalTables(NamedTuple):
    """What the chunked form needs of a filter; m is n real modes or n (re, im) pairs, flattened."""

    taps: Tensor  # [g c]: h[0 .. c-1]
    read: Tensor  # [g c m]: p^(c-1-i), input i of a block to the state after the block
    write: Tensor  # [g m c]: R p^(j+1), the state before a block to output j
    powers: Tensor  # [g n c+1] complex or real: p^0 .. p^c
    jumps: Tensor  # [g n SPAN+1] complex or real: p^0, p^c .. p^(SPAN c), for the scan over blocks


def modal_powers(log_poles: Float[Tensor, "g n *z"], count: int) -> Tensor:
    """p^0 .. p^(count-1) as [g n count], complex128 or float64 (one precision lower on devices without float64)."""
    wide = torch.float32 if log_poles.device.type == "mps" else torch.float64
    logs = log_poles.to(wide)
    step = torch.exp(torch.view_as_complex(logs.contiguous()) if logs.ndim == 3 else logs)[..., None]
    powers = torch.ones_like(step)
    while powers.shape[-1] < count:  # doubling: log2(count) products instead of count exponentials
        powers = torch.cat([powers, powers * step], dim=-1)
        step = step * step
    return powers[..., :count]


@full_precision
def modal_taps(
    log_poles: Float[Tensor, "g n *z"], residues: Float[Tensor, "g n *z"], length: int
) -> Float[Tensor, "g l"]:
    """h[0 .. length-1] by a two-level product: p^(a c + b) = (p^c)^a · p^b, one matrix product a group.

    Memory O(g · n · sqrt-sized tables) beside the result, never g · n · length. Differentiable.
    """
    fine = min(length, 1 << max(1, (max(length, 1).bit_length() + 1) // 2))
    coarse = -(-length // fine)
    low = modal_powers(log_poles, fine)
    high = modal_powers(log_poles * fine, coarse)
    r = _as_modes(residues).to(low.dtype)[..., None]
    dtype = residues.dtype
    left, right = (
        _real_pairs((r * high).transpose(1, 2), dtype),
        _real_pairs(low.transpose(1, 2), dtype, conjugate=True),
    )
    return torch.bmm(left, right.transpose(1, 2)).reshape(len(low), -1)[:, :length]


def modal_tables(
    log_poles: Float[Tensor, "g n *z"], residues: Float[Tensor, "g n *z"], block: int = BLOCK
) -> ModalTables:
    """The tables of the chunked form, in the residues' dtype; differentiable, small, worth keeping between calls."""
    dtype = residues.dtype
    powers = modal_powers(log_poles, block + 1)
    output = _as_modes(residues).to(powers.dtype)[..., None] * powers
    taps = (output[..., :block].real if output.is_complex() else output[..., :block]).sum(1).to(dtype)
    read = _real_pairs(powers[..., :block].flip(-1).transpose(1, 2), dtype)
    write = _real_pairs(output[..., 1:].transpose(1, 2), dtype, conjugate=True).transpose(1, 2)
    modes_dtype = _modes_dtype(powers, dtype)
    with torch.no_grad():
        jumps = modal_powers(log_poles * block, SPAN + 1)
    return ModalTables(taps, read, write, powers.to(modes_dtype), jumps.to(modes_dtype))


def chunked(
    u: Float[Tensor, "b l d"],
    tables: ModalTables,
    skip: Float[Tensor, " d"] | None = None,
    state: Float[Tensor, "b d n *z"] | None = None,
) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b d n *z"]]:
    """The whole convolution and the state after it, in O(l · d · (block + modes)) and matrix products.

    Returns y in u's dtype and the state in float32 (or float64). Differentiable in everything; saves u, the small
    tables and one state a block, and computes the Toeplitz matrix again in the backward pass.
    """
    b, l, d = u.shape
    groups, dtype = tables.taps.shape[0], compute_dtype(u.dtype)
    fused = skip is not None and groups == d  # D is tap 0: free where each channel has its own taps
    taps = (
        torch.cat([tables.taps[:, :1] + skip[:, None], tables.taps[:, 1:]], 1)
        if skip is not None and fused
        else tables.taps
    )
    modes_shape = tables.powers.shape[1:2] + ((2,) if tables.powers.is_complex() else ())
    start = u.new_zeros(b, d, *modes_shape, dtype=dtype) if state is None else state
    y, last = _Chunked.apply(channels_first(u, dtype), taps.to(dtype), *tables[1:], start)
    y = y.permute(1, 2, 0).to(u.dtype)
    return (y if skip is None or fused else y + skip.to(u.dtype) * u), last


def recurrent(
    u: Float[Tensor, "b l d"],
    poles: Tensor,
    residues: Tensor,
    skip: Float[Tensor, " d"] | None = None,
    state: Float[Tensor, "b d n *z"] | None = None,
) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b d n *z"]]:
    """The recurrence, token by token, for decoding; poles and residues as ``modal_step_constants`` makes them."""
    b, _, d = u.shape
    s = (
        poles.new_zeros(b, d, poles.shape[1])
        if state is None
        else (torch.view_as_complex(state.contiguous()) if poles.is_complex() else state)
    )
    outputs = []
    for u_t in u.to(compute_dtype(u.dtype)).unbind(1):
        s = torch.addcmul(u_t[..., None].to(s.dtype), poles, s)
        y_t = (residues * s).sum(-1)
        y_t = y_t.real if y_t.is_complex() else y_t
        outputs.append(y_t if skip is None else y_t + skip * u_t)
    return torch.stack(outputs, 1).to(u.dtype), torch.view_as_real(s) if s.is_complex() else s


def modal_step_constants(
    log_poles: Float[Tensor, "g n *z"], residues: Float[Tensor, "g n *z"], channels: int
) -> tuple[Tensor, Tensor]:
    """Poles and residues [d n] as ``recurrent`` wants them: expanded to channels, complex or real."""
    repeat = channels // log_poles.shape[0]
    poles = modal_powers(log_poles, 2)[..., 1]
    r = _as_modes(residues)
    return poles.to(r.dtype).repeat_interleave(repeat, 0), r.repeat_interleave(repeat, 0)


@full_precision
def modal_final_state(
    u: Float[Tensor, "b l d"],
    tables: ModalTables,
    log_poles: Float[Tensor, "g n *z"],
    state: Float[Tensor, "b d n *z"],
    lengths: Tensor,
) -> Float[Tensor, "b d n *z"]:
    """The state of each row after its first ``lengths[row]`` inputs: rows of one batch may have different lengths.

    Each row is moved to the right end of the window, zeros before it, so that every row ends at the same place:
    s = Σ_i p^(n-1-i) u_i + p^n s_0. Never divides by a power of a pole.
    """
    b, l, d = u.shape
    lengths = lengths.to(u.device)
    source = torch.arange(l, device=u.device) - (l - lengths)[:, None]
    moved = u.gather(1, source.clamp(min=0)[:, :, None].expand(-1, -1, d)).masked_fill((source < 0)[:, :, None], 0)
    blocks, rows = _block_inputs(channels_first(moved, state.dtype), tables.taps.shape)
    fresh = _block_states(blocks, rows, tables, torch.zeros_like(state), l)[1]
    logs = torch.view_as_complex(log_poles.contiguous()) if log_poles.ndim == 3 else log_poles
    decay = torch.exp(logs.repeat_interleave(d // logs.shape[0], 0) * lengths[:, None, None])
    old = decay * _as_modes(state, state.ndim == 4)
    return fresh + (torch.view_as_real(old) if old.is_complex() else old).to(state.dtype)


# --- the chunked form -----------------------------------------------------------------------------------------


class _Chunked(torch.autograd.Function):
    """[d b l] inputs and tables -> outputs and last state, with a backward pass made of the same products."""

    @staticmethod
    @full_precision
    def forward(ctx, u, taps, read, write, powers, jumps, state):
        tables = ModalTables(taps, read, write, powers, jumps)
        blocks, rows = _block_inputs(u, taps.shape)
        y = torch.bmm(blocks, toeplitz(taps))
        before, last = _block_states(blocks, rows, tables, state, u.shape[2])
        y.baddbmm_(before, write)
        ctx.save_for_backward(u, *tables, before)
        return y.view(*u.shape[:2], -1)[:, :, : u.shape[2]], last

    @staticmethod
    @full_precision
    def backward(ctx, dy, dlast):
        u, taps, read, write, powers, jumps, before = ctx.saved_tensors
        (d, b, l), (g, c), m = u.shape, taps.shape, read.shape[2]
        blocks, rows = _block_inputs(u, taps.shape)
        dy_blocks, _ = _block_inputs(channels_first(dy.permute(1, 2, 0), u.dtype), taps.shape)
        dtaps = toeplitz_adjoint(torch.bmm(blocks.transpose(1, 2), dy_blocks))
        dwrite = torch.bmm(before.transpose(1, 2), dy_blocks)
        dbefore = torch.bmm(dy_blocks, write.transpose(1, 2))
        end = _by_block(dlast.to(u.dtype), rows, g)
        remainder = l - (rows[2] - 1) * c
        dafter, dstate, dpowers = _scan_adjoint(dbefore, before, end, rows, powers, jumps, remainder)
        du = torch.bmm(dy_blocks, toeplitz(taps).transpose(1, 2)).baddbmm_(dafter, read.transpose(1, 2))
        du = du.view(d, b, -1)[:, :, :l]
        dread = torch.bmm(blocks.transpose(1, 2), dafter)
        # the last block, full or not, reads its inputs with powers that end at its own last token
        tail, dtail = u[:, :, l - remainder :].reshape(g, -1, remainder), end.reshape(g, -1, m)
        du[:, :, l - remainder :] += torch.bmm(dtail, read[:, c - remainder :].transpose(1, 2)).view(d, b, remainder)
        dread[:, c - remainder :] += torch.bmm(tail.transpose(1, 2), dtail)
        return du, dtaps, dread, dwrite, dpowers, None, dstate


def _block_inputs(
    u: Float[Tensor, "d b l"], taps_shape: torch.Size
) -> tuple[Float[Tensor, "g rows c"], tuple[int, int, int]]:
    """Inputs as one matrix a group, and (channels a group, batch, blocks) of its rows."""
    (d, b, _), (g, c) = u.shape, taps_shape
    blocks = pad_to_blocks(u, c)
    return blocks.reshape(g, -1, c), (d // g, b, blocks.shape[2])


def _by_block(state: Tensor, rows: tuple[int, int, int], groups: int) -> Float[Tensor, "g r b m"]:
    """A state [b d n *z] in the order of the scan."""
    return state.reshape(rows[1], groups, rows[0], -1).permute(1, 2, 0, 3)


def _block_states(
    blocks: Tensor, rows: tuple[int, int, int], tables: ModalTables, state: Tensor, length: int
) -> tuple[Tensor, Tensor]:
    """The state before each block [g rows m], and the state after the last token [b d n *z]."""
    (repeat, b, count), (g, c), m = rows, tables.taps.shape, tables.read.shape[2]
    added = torch.bmm(blocks, tables.read).view(g, repeat, b, count, m)
    before = _scan(_by_block(state, rows, g), added, tables.jumps)
    remainder = length - (count - 1) * c
    tail = blocks.view(g, repeat * b, count, c)[:, :, -1, :remainder]
    last = torch.bmm(tail, tables.read[:, c - remainder :]).view(g, repeat, b, m)
    last = last + _multiply(tables.powers[:, :, remainder], before[..., -1, :])
    return before.reshape(g, -1, m), last.permute(2, 0, 1, 3).reshape(state.shape)


def _scan(first: Float[Tensor, "g r b m"], added: Float[Tensor, "g r b steps m"], jumps: Tensor) -> Tensor:
    """x[0] = first, x[i + 1] = jumps[1] · x[i] + added[i]; returns x[0 .. steps-1], so the last added is not used.

    More than SPAN steps are cut into spans. Each is first run from zero, all side by side; then the carry goes from
    span to span by jumps[SPAN], and x = (from zero) + jumps[j] · (carry of its span).
    """
    steps = added.shape[3]
    width = min(SPAN, steps)
    spans = -(-steps // width)
    if spans * width != steps:
        added = F.pad(added, (0, 0, 0, spans * width - steps))
    is_complex = jumps.is_complex()
    factors = jumps.movedim(-1, 0)[:, :, None, None, None, :]  # [SPAN+1 g 1 1 1 n]
    sources = _modes(added.unflatten(3, (spans, width)), is_complex)
    start = _modes(first.contiguous(), is_complex)
    x = torch.zeros_like(sources[..., 0, :]) if spans > 1 else start[..., None, :]
    by_step = [x]
    for j in range(width - 1):
        x = torch.addcmul(sources[..., j, :], factors[1], x)
        by_step.append(x)
    local = torch.stack(by_step, -2)
    if spans > 1:
        whole = torch.addcmul(sources[..., -1, :], factors[1], x)
        carry = [start]
        for i in range(spans - 1):
            carry.append(torch.addcmul(whole[..., i, :], factors[SPAN, :, :, :, 0], carry[-1]))
        carried = torch.stack(carry, -2)[..., None, :]
        local.addcmul_(jumps[..., :SPAN].transpose(1, 2)[:, None, None, None], carried)
    return (torch.view_as_real(local).flatten(-2) if is_complex else local).flatten(3, 4)[..., :steps, :]


def _scan_adjoint(
    dbefore: Tensor,
    before: Tensor,
    end: Tensor,
    rows: tuple[int, int, int],
    powers: Tensor,
    jumps: Tensor,
    remainder: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for what each block adds to the state after it [g rows m], for the first state, and for the powers.

    The adjoint of the scan is the scan of the reversed gradients with conjugate factors. What the last block adds
    reaches no other block; the caller sees to it.
    """
    (repeat, b, count), g, m = rows, dbefore.shape[0], dbefore.shape[2]
    is_complex, c = powers.is_complex(), powers.shape[2] - 1
    direct, states = (t.view(g, repeat, b, count, m) for t in (dbefore, before))
    last = direct[..., -1, :] + _multiply(powers[:, :, remainder].conj(), end)
    backwards = F.pad(direct[..., :-1, :].flip(3), (0, 0, 0, 1))
    total = _scan(last, backwards, jumps.conj().resolve_conj()).flip(3)  # gradients of before[i]
    total_modes, state_modes, end_modes = (_modes(t.contiguous(), is_complex) for t in (total, states, end))
    dpowers = torch.zeros_like(powers)
    dpowers[:, :, c] = (state_modes[..., :-1, :].conj() * total_modes[..., 1:, :]).sum((1, 2, 3))
    dpowers[:, :, remainder] += (state_modes[..., -1, :].conj() * end_modes).sum((1, 2))
    dafter = F.pad(total[..., 1:, :], (0, 0, 0, 1))
    shape = (b, g * repeat, -1, 2) if is_complex else (b, g * repeat, m)
    return dafter.reshape(g, -1, m), total[..., 0, :].permute(2, 0, 1, 3).reshape(shape), dpowers


# --- real pairs and modes -------------------------------------------------------------------------------------


def _as_modes(pair: Tensor, is_complex: bool | None = None) -> Tensor:
    """[.. n 2] as complex [.. n]; real modes unchanged. ``is_complex`` defaults to the rule for [g n *z]."""
    return torch.view_as_complex(pair.contiguous()) if (pair.ndim == 3 if is_complex is None else is_complex) else pair


def _modes(flat: Tensor, is_complex: bool) -> Tensor:
    """[.. 2n] real pairs as complex [.. n], a view; real modes unchanged."""
    return torch.view_as_complex(flat.unflatten(-1, (-1, 2))) if is_complex else flat


def _multiply(step: Tensor, modes: Float[Tensor, "g r b m"]) -> Float[Tensor, "g r b m"]:
    if not step.is_complex():
        return step[:, None, None, :] * modes
    return torch.view_as_real(step[:, None, None, :] * _modes(modes.contiguous(), True)).flatten(-2)


def _real_pairs(values: Tensor, dtype: torch.dtype, *, conjugate: bool = False) -> Tensor:
    """[.. n] complex as [.. 2n] real pairs (re, im), or (re, -im): the dot product with a pair is then a real part."""
    if not values.is_complex():
        return values.to(dtype)
    return torch.view_as_real(values.conj().resolve_conj() if conjugate else values).flatten(-2).to(dtype)


def _modes_dtype(powers: Tensor, dtype: torch.dtype) -> torch.dtype:
    if not powers.is_complex():
        return dtype
    return torch.complex128 if dtype == torch.float64 else torch.complex64
