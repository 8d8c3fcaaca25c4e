"""Compiled Hyena operators: short filter, gate, long filter, D and gate in one pass over memory.

    (x2, x1, v) = FIR(z) + bias,   y = x2 · (h ∗ (x1 · v) + D · (x1 · v))          (Poli et al. 2023; StripedHyena)

On a CPU nothing between z and y is a tensor; the backward pass makes it again from z and one state a block.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from crocuta.ops.blocks import compute_dtype, full_precision
from crocuta.ops.kernels import gpu
from crocuta.ops.kernels.library import contiguous, function, rows_of
from crocuta.ops.kernels.memory import empty
from crocuta.ops.kernels.modal import ModalConstants, from_rows, scan_outputs, to_rows

_FORWARD = "piipppipppppppiiiiii"
_BACKWARD = "piipiipppippppppppppiiiiii"


@full_precision
def hyena_modal(
    z: Float[Tensor, "b l c"],
    taps: Float[Tensor, "c k"],
    bias: Float[Tensor, " c"] | None,
    constants: ModalConstants,
    skip: Float[Tensor, " d"] | None = None,
    tail: Float[Tensor, "b t c"] | None = None,
    state: Float[Tensor, "b d n *z"] | None = None,
    lengths: Int[Tensor, " b"] | None = None,
) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b d n *z"]]:
    """y for a modal filter, c = 3 d, and its state after each row.

    In float32 (or float64), y in z's dtype. ``tail`` holds the k - 1 inputs before z, oldest first; only the first
    ``lengths[row]`` inputs are read, and outputs past them are 0. Differentiable in all but lengths; saves z and one
    state a block.
    """
    dtype = compute_dtype(z.dtype)
    rows, n, is_complex = constants
    start = None if state is None else to_rows(state.to(dtype), is_complex)
    tensors = gpu.as_read(z), *(None if t is None else t.to(dtype) for t in (taps, bias, tail, rows, skip)), start
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    counts = None if lengths is None else lengths.to(z.device, torch.int64)
    y, last, _ = torch.ops.crocuta.hyena_modal(*tensors, counts, keep)
    return y.to(z.dtype), from_rows(last, n, is_complex)


# --- the op ---------------------------------------------------------------------------------------------------

_ops = torch.library.Library("crocuta", "FRAGMENT")
_ops.define(
    "hyena_modal(Tensor z, Tensor taps, Tensor? bias, Tensor? tail, Tensor constants, Tensor? skip, Tensor? state,"
    " Tensor? lengths, bool keep) -> (Tensor y, Tensor last, Tensor kept)"
)
_ops.define(
    "hyena_modal_backward(Tensor dy, Tensor? dlast, Tensor z, Tensor taps, Tensor? bias, Tensor? tail,"
    " Tensor constants, Tensor? skip, Tensor kept, Tensor? lengths)"
    " -> (Tensor dz, Tensor dtaps, Tensor dbias, Tensor dtail, Tensor dconstants, Tensor dskip, Tensor dstate)"
)


def _outputs(z: Tensor, constants: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    return scan_outputs(z[..., : constants.shape[3]], constants, keep)


def _forward(
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
    y, last, kept = _outputs(z, constants, keep)
    (b, l, _), (_, parts, n, d) = z.shape, constants.shape
    z = rows_of(z)
    taps, bias, tail, constants, skip, state, lengths = contiguous(taps, bias, tail, constants, skip, state, lengths)
    function("hyena_modal_forward", z.dtype, _FORWARD)(
        *(z, z.stride(0), z.stride(1), tail, taps, bias, taps.shape[1], constants, skip, state, lengths),
        *(y, last, kept if keep else None, b, l, d, n, parts == 2, torch.get_num_threads()),
    )
    return y, last, kept


def _backward(
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
    (b, l, c), (_, parts, n, d), k = z.shape, constants.shape, taps.shape[1]
    dz, dtail, dstate = empty(z, b, l, c), z.new_empty(b, k - 1, c), z.new_empty(b, parts * n, d)
    sums = z.new_empty(b, 2 * parts * n + 1, d, dtype=torch.float64)
    short_sums = z.new_empty(b, k + 1, c, dtype=torch.float64)
    z, dy = rows_of(z), rows_of(dy)
    taps, bias, tail, constants, skip, kept = contiguous(taps, bias, tail, constants, skip, kept)
    dlast, lengths = contiguous(dlast, lengths)
    function("hyena_modal_backward", z.dtype, _BACKWARD)(
        *(dy, dy.stride(0), dy.stride(1), z, z.stride(0), z.stride(1), tail, taps, bias, k, constants, skip, kept),
        *(dlast, lengths, dz, dtail, dstate, short_sums, sums),
        *(b, l, d, n, parts == 2, torch.get_num_threads()),
    )
    total, short = sums.sum(0).to(z.dtype), short_sums.sum(0).to(z.dtype)
    dconstants = torch.zeros_like(constants)
    dconstants[:2] = total[:-1].view(2, parts, n, d)
    return dz, short[:-1].t().contiguous(), short[-1], dtail, dconstants, total[-1], dstate


def _setup(ctx, inputs, output) -> None:
    z, taps, bias, tail, constants, skip, state, lengths, keep = inputs
    assert keep
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(z, taps, bias, tail, constants, skip, output[2], lengths)
    ctx.given = bias is not None, tail is not None, skip is not None, state is not None


def _adjoint(ctx, dy, dlast, _):
    saved = ctx.saved_tensors
    z, constants, (bias, tail, skip, state) = saved[0], saved[4], ctx.given
    dy = z.new_zeros(*z.shape[:2], constants.shape[3]) if dy is None else dy
    dz, dtaps, dbias, dtail, dconstants, dskip, dstate = torch.ops.crocuta.hyena_modal_backward(dy, dlast, *saved)
    given = (dbias if bias else None, dtail if tail else None, dconstants, dskip if skip else None)
    return dz, dtaps, *given, dstate if state else None, None, None


_ops.impl("hyena_modal", _forward, "CPU")
_ops.impl("hyena_modal_backward", _backward, "CPU")
gpu.implement(_ops, "hyena_modal", "hyena", "hyena_modal")
gpu.implement(_ops, "hyena_modal_backward", "hyena", "hyena_modal_backward")
torch.library.register_fake(
    "crocuta::hyena_modal",
    lambda z, taps, bias, tail, constants, skip, state, lengths, keep: _outputs(z, constants, keep),
    lib=_ops,
)


@torch.library.register_fake("crocuta::hyena_modal_backward", lib=_ops)
def _backward_fake(dy, dlast, z, taps, bias, tail, constants, skip, kept, lengths):
    (b, l, c), (_, parts, n, d) = z.shape, constants.shape
    return (
        *(gpu.empty(z, b, l, c), torch.empty_like(taps), taps.new_empty(c), taps.new_empty(b, taps.shape[1] - 1, c)),
        *(torch.empty_like(constants), constants.new_empty(d), constants.new_empty(b, parts * n, d)),
    )


torch.library.register_autograd("crocuta::hyena_modal", _adjoint, setup_context=_setup, lib=_ops)
