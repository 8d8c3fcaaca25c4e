"""The Hyena operator of a modal filter out of the other kernels: y = x2 · (h ∗ u + D · u), (x2, u) = fir_gate(z).

Between z and y there are three passes over memory, but for the backward pass nothing is kept but z and one state a
chunk: x2, u and the output of the filter are made again.
"""

from __future__ import annotations

from torch import Tensor

from crocuta.ops.blocks import own_positions
from crocuta.ops.kernels.triton.fir_gate import fir_gate, fir_gate_backward
from crocuta.ops.kernels.triton.modal import scan, scan_backward


def hyena_modal(
    z: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    tail: Tensor | None,
    constants: Tensor,
    skip: Tensor | None,
    state: Tensor | None,
    lengths: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``crocuta::hyena_modal``; z in any floating dtype, the others in that of the sums."""
    x2, u = fir_gate(_own(z, lengths), taps, bias, tail)
    y, last, kept = scan(u, constants, skip, state, lengths, keep)
    return y.mul_(x2), last, kept


def hyena_modal_backward(
    dy: Tensor,
    dlast: Tensor | None,
    z: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    tail: Tensor | None,
    constants: Tensor,
    skip: Tensor | None,
    kept: Tensor,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``crocuta::hyena_modal_backward``; the first state that was kept is the one that the rows began with."""
    z = _own(z, lengths)
    x2, u = fir_gate(z, taps, bias, tail)
    start = kept[:, 0] if kept.shape[1] else None
    filtered, _, _ = scan(u, constants, skip, start, lengths, False)
    du, dconstants, dskip, dstate = scan_backward(dy * x2, dlast, u, constants, skip, kept, lengths)
    dz, dtaps, dbias, dtail = fir_gate_backward(filtered.mul_(dy), du, z, taps, bias, tail)
    dtail = dtail if tail is not None else taps.new_zeros(len(z), taps.shape[1] - 1, z.shape[2])
    return dz, dtaps, dbias, dtail, dconstants, dskip, dstate


def _own(z: Tensor, lengths: Tensor | None) -> Tensor:
    """z with zeros for padding, which may hold anything: 0 times a NaN would be one."""
    if lengths is None:
        return z
    return z.masked_fill(~own_positions(lengths, z.shape[1], z.device)[:, :, None], 0)
