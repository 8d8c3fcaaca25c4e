"""Causal depthwise FIR, short and medium, with the tail of earlier inputs; one Toeplitz product a block.

One form serves short and medium filters; shifted multiply-adds are faster for 3 taps (docs/decisions.md has figures).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from crocuta.ops.blocks import channels_first, compute_dtype, full_precision, pad_to_blocks, toeplitz, toeplitz_adjoint
from crocuta.ops.kernels import fir as compiled
from crocuta.ops.kernels.library import runs_here

_FEW = 4
"""Up to this many new tokens their windows are multiplied one by one: fewer operations a decoding step."""


def fir(
    u: Float[Tensor, "b l d"],
    taps: Float[Tensor, "g k"],
    bias: Float[Tensor, " d"] | None = None,
    tail: Float[Tensor, "b t d"] | None = None,
) -> Float[Tensor, "b l d"]:
    """y[t] = Σ_j taps[c // (d / g), j] · u[t - j] + bias, accumulated in float32 (or float64), in u's dtype.

    ``tail`` holds the last k - 1 inputs before u, oldest first (``next_tail``); None means that u starts the
    sequence. Cost O(l · d · (k + 32)). Gradients of all arguments; saves u, taps and tail only.
    Channels-last input goes to the compiled kernel where there is one.
    """
    if runs_here(u):
        return compiled.fir(u, taps, bias, tail)
    past = None if tail is None else channels_first(tail, compute_dtype(u.dtype))
    y = _FIR.apply(channels_first(u, compute_dtype(u.dtype)), taps.to(compute_dtype(u.dtype)), past)
    if bias is not None:
        y = y + bias[:, None, None]
    return y.permute(1, 2, 0).to(u.dtype)


def next_tail(
    u: Float[Tensor, "b l d"], tail: Float[Tensor, "b t d"], lengths: Tensor | None = None
) -> Float[Tensor, "b t d"]:
    """The last t inputs of each row after reading u (its first ``lengths[row]`` positions), oldest first."""
    t, l = tail.shape[1], u.shape[1]
    if lengths is None:
        kept = tail[:, l:] if l < t else tail[:, :0]
        return torch.cat([kept, u[:, max(0, l - t) :].to(tail.dtype)], dim=1)
    index = lengths.to(u.device)[:, None] + torch.arange(t, device=u.device)
    whole = torch.cat([tail, u.to(tail.dtype)], dim=1)
    return whole.gather(1, index[:, :, None].expand(-1, -1, u.shape[2]))


def apply_taps(u: Float[Tensor, "d b l"], taps: Float[Tensor, "g k"], tail: Tensor | None) -> Float[Tensor, "d b l"]:
    """The FIR of [d b l] inputs without autograd; the core of ``fir`` and of ``gate.fir_gate``.

    Outputs of a block are its inputs times a Toeplitz matrix, and the first k - 1 of them also the last k - 1 inputs
    of the block before times a small one.
    """
    (d, b, l), (g, k) = u.shape, taps.shape
    if l <= _FEW:
        past = u.new_zeros(d, b, k - 1) if tail is None else tail
        windows = torch.cat([past, u], dim=2).unfold(2, k, 1)
        return (windows * taps.flip(1).repeat_interleave(d // g, 0)[:, None, None]).sum(-1)
    block = _block(k, l)
    blocks = pad_to_blocks(u, block)
    y = torch.bmm(blocks.reshape(g, -1, block), toeplitz(_fit(taps, block)))
    if k > 1:
        y[..., : k - 1] += torch.bmm(_before(blocks, k, tail).reshape(g, -1, k - 1), _carry(taps))
    return y.view(d, b, -1)[:, :, :l]


def apply_taps_adjoint(
    dy: Float[Tensor, "d b l"], u: Tensor, taps: Float[Tensor, "g k"], tail: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of ``apply_taps`` for u, taps and tail."""
    (d, b, l), (g, k) = u.shape, taps.shape
    block = _block(k, l)
    blocks, dy_blocks = pad_to_blocks(u, block), pad_to_blocks(dy, block).reshape(g, -1, block)
    du = torch.bmm(dy_blocks, toeplitz(_fit(taps, block)).transpose(1, 2)).view(blocks.shape)
    dtaps = _fit(toeplitz_adjoint(torch.bmm(blocks.reshape(g, -1, block).transpose(1, 2), dy_blocks)), k)
    dtail = None
    if k > 1:
        first = dy_blocks[..., : k - 1]
        dbefore = torch.bmm(first, _carry(taps).transpose(1, 2)).view(d, b, -1, k - 1)
        du[:, :, :-1, block - k + 1 :] += dbefore[:, :, 1:]
        dtail = None if tail is None else dbefore[:, :, 0]
        dcarry = torch.bmm(_before(blocks, k, tail).reshape(g, -1, k - 1).transpose(1, 2), first)
        dtaps[:, 1:] += toeplitz_adjoint(dcarry.transpose(1, 2)).flip(1)
    elif tail is not None:
        dtail = torch.zeros_like(tail)
    return du.view(d, b, -1)[:, :, :l], dtaps, dtail


def _block(taps: int, length: int) -> int:
    """At least 32 and at least k - 1, but no longer than a short input needs."""
    wanted = max(32, 1 << max(0, taps - 2).bit_length())
    return min(wanted, max(taps - 1, 1 << max(0, length - 1).bit_length()))


def _fit(taps: Tensor, length: int) -> Tensor:
    """The first ``length`` taps, zeros where there are none."""
    return F.pad(taps, (0, length - taps.shape[1]))


def _carry(taps: Float[Tensor, "g k"]) -> Float[Tensor, "g t t"]:
    """C[i, j] = taps[k - 1 + j - i] for j <= i: from the last inputs of a block to the first outputs of the next."""
    return toeplitz(taps[:, 1:].flip(1)).transpose(1, 2)


def _before(blocks: Float[Tensor, "d b m c"], taps: int, tail: Tensor | None) -> Float[Tensor, "d b m t"]:
    """The k - 1 inputs before each block."""
    d, b, _, block = blocks.shape
    first = blocks.new_zeros(d, b, 1, taps - 1) if tail is None else tail[:, :, None]
    return torch.cat([first, blocks[:, :, :-1, block - taps + 1 :]], dim=2)


class _FIR(torch.autograd.Function):
    @staticmethod
    @full_precision
    def forward(ctx, u: Tensor, taps: Tensor, tail: Tensor | None) -> Tensor:
        ctx.save_for_backward(u, taps, tail)
        return apply_taps(u, taps, tail)

    @staticmethod
    @full_precision
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return apply_taps_adjoint(dy, *ctx.saved_tensors)
