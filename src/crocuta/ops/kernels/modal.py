"""Modal filters as a compiled recurrence: outputs and state in one pass over channels-last input.

Poles, residues and what the poles lose when they are rounded (``ModalConstants``) are rows [.. d]; the kernel mends
the state with the last at the end of each block of BLOCK steps, so that rounding does not add up over a long sequence.
The state before each block is kept for the backward pass, which runs each block again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from crocuta.ops.blocks import compute_dtype, full_precision
from crocuta.ops.kernels import gpu
from crocuta.ops.kernels.library import contiguous, function, rows_of
from crocuta.ops.kernels.memory import empty

BLOCK = 64
"""Steps between two states that are kept: kBlock of cpp/modal.h."""

_FORWARD = "piipppppppiiiiii"
_BACKWARD = "piipiippppppppiiiiii"


class ModalConstants(NamedTuple):
    """A filter for the kernel: poles, residues and rounding errors of the poles, in float32 or float64."""

    rows: Tensor
    """[3 z n d] with z = 2 (re, im) or 1: p, R and (exact p) - p."""
    modes: int
    is_complex: bool


@full_precision
def modal_constants(
    log_poles: Float[Tensor, "g n *z"], residues: Float[Tensor, "g n *z"], channels: int
) -> ModalConstants:
    """What ``modal_scan`` needs of a filter; differentiable, small, worth keeping between calls."""
    is_complex, n = log_poles.ndim == 3, log_poles.shape[1]
    logs = log_poles.double()
    exact = torch.view_as_real(torch.exp(torch.view_as_complex(logs.contiguous()))) if is_complex else torch.exp(logs)
    poles = exact.to(residues.dtype)
    with torch.no_grad():
        lost = (exact - poles.double()).to(residues.dtype)
    parts = torch.stack([poles, residues, lost])  # [3 g n *z]
    rows = parts.permute(0, 3, 2, 1) if is_complex else parts.permute(0, 2, 1)[:, None]
    rows = rows.repeat_interleave(channels // rows.shape[-1], -1) if channels != rows.shape[-1] else rows
    return ModalConstants(rows.contiguous(), n, is_complex)


@full_precision
def modal_scan(
    u: Float[Tensor, "b l d"],
    constants: ModalConstants,
    skip: Float[Tensor, " d"] | None = None,
    state: Float[Tensor, "b d n *z"] | None = None,
    lengths: Int[Tensor, " b"] | None = None,
) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b d n *z"]]:
    """s[t] = p · s[t-1] + u[t], y[t] = Re Σ_n R_n s_n[t] + D · u[t], and the state after each row.

    In float32 (or float64), y in u's dtype. Only the first ``lengths[row]`` inputs are read; outputs past them are 0.
    Differentiable in everything but lengths; saves u and one state a block.
    """
    dtype = compute_dtype(u.dtype)
    rows, n, is_complex = constants
    start = None if state is None else to_rows(state.to(dtype), is_complex)
    y, last, _ = torch.ops.crocuta.modal_scan(
        gpu.as_read(u),
        rows.to(dtype),
        None if skip is None else skip.to(dtype),
        start,
        None if lengths is None else lengths.to(u.device, torch.int64),
        torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (u, rows, skip, start)),
    )
    return y.to(u.dtype), from_rows(last, n, is_complex)


def to_rows(state: Float[Tensor, "b d n *z"], is_complex: bool) -> Float[Tensor, "b zn d"]:
    """A state as the kernels want it: channels side by side, all real parts before all imaginary ones."""
    moved = state.permute(0, 3, 2, 1) if is_complex else state.permute(0, 2, 1)
    return moved.reshape(len(state), -1, state.shape[1])


def from_rows(state: Float[Tensor, "b zn d"], n: int, is_complex: bool) -> Float[Tensor, "b d n *z"]:
    """The inverse of ``to_rows``."""
    return state.unflatten(1, (2, n)).permute(0, 3, 2, 1) if is_complex else state.transpose(1, 2)


# --- the op ---------------------------------------------------------------------------------------------------

_ops = torch.library.Library("crocuta", "FRAGMENT")
_ops.define(
    "modal_scan(Tensor u, Tensor constants, Tensor? skip, Tensor? state, Tensor? lengths, bool keep)"
    " -> (Tensor y, Tensor last, Tensor kept)"
)
_ops.define(
    "modal_scan_backward(Tensor dy, Tensor? dlast, Tensor u, Tensor constants, Tensor? skip, Tensor kept,"
    " Tensor? lengths) -> (Tensor du, Tensor dconstants, Tensor dskip, Tensor dstate)"
)


def scan_outputs(u: Tensor, constants: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors of the right shapes, dtypes and layouts; ``kept`` is empty where nothing is kept."""
    (b, l, d), (_, z, n, _) = u.shape, constants.shape
    blocks = -(-l // BLOCK) if keep else 0
    last, kept = constants.new_empty(b, z * n, d), gpu.empty(constants, b, blocks * z * n, d)
    return gpu.empty(u, b, l, d), last, kept.unflatten(1, (blocks, z * n))


def _scan(
    u: Tensor, constants: Tensor, skip: Tensor | None, state: Tensor | None, lengths: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    y, last, kept = scan_outputs(u, constants, keep)
    (b, l, d), (_, z, n, _) = u.shape, constants.shape
    u = rows_of(u)
    constants, skip, state, lengths = contiguous(constants, skip, state, lengths)
    run = function("modal_forward", u.dtype, _FORWARD)
    strides = u.stride(0), u.stride(1)
    threads = torch.get_num_threads()
    run(u, *strides, constants, skip, state, lengths, y, last, kept if keep else None, b, l, d, n, z == 2, threads)
    return y, last, kept


def _scan_backward(
    dy: Tensor,
    dlast: Tensor | None,
    u: Tensor,
    constants: Tensor,
    skip: Tensor | None,
    kept: Tensor,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (b, l, d), (_, z, n, _) = u.shape, constants.shape
    du, dstate = empty(u, b, l, d), u.new_empty(b, z * n, d)
    sums = u.new_empty(b, 2 * z * n + 1, d, dtype=torch.float64)
    u, dy = rows_of(u), rows_of(dy)
    constants, skip, kept, dlast, lengths = contiguous(constants, skip, kept, dlast, lengths)
    run = function("modal_backward", u.dtype, _BACKWARD)
    run(
        *(dy, dy.stride(0), dy.stride(1), u, u.stride(0), u.stride(1), constants, skip, kept, dlast, lengths),
        *(du, dstate, sums, b, l, d, n, z == 2, torch.get_num_threads()),
    )
    total = sums.sum(0).to(u.dtype)
    dconstants = torch.zeros_like(constants)
    dconstants[:2] = total[:-1].view(2, z, n, d)
    return du, dconstants, total[-1], dstate


def _setup(ctx, inputs, output) -> None:
    u, constants, skip, state, lengths, keep = inputs
    assert keep
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(u, constants, skip, lengths, output[2])
    ctx.shape = output[1].shape, skip is not None, state is not None


def _adjoint(ctx, dy, dlast, _):
    u, constants, skip, lengths, kept = ctx.saved_tensors
    dy = torch.zeros_like(u) if dy is None else dy
    du, dconstants, dskip, dstate = torch.ops.crocuta.modal_scan_backward(dy, dlast, u, constants, skip, kept, lengths)
    return du, dconstants, dskip if ctx.shape[1] else None, dstate if ctx.shape[2] else None, None, None


_ops.impl("modal_scan", _scan, "CPU")
_ops.impl("modal_scan_backward", _scan_backward, "CPU")
gpu.implement(_ops, "modal_scan", "modal", "scan")
gpu.implement(_ops, "modal_scan_backward", "modal", "scan_backward")
torch.library.register_fake(
    "crocuta::modal_scan", lambda u, constants, skip, state, lengths, keep: scan_outputs(u, constants, keep), lib=_ops
)
torch.library.register_fake(
    "crocuta::modal_scan_backward",
    lambda dy, dlast, u, constants, skip, kept, lengths: (
        gpu.empty(u, *u.shape),
        torch.empty_like(constants),
        constants.new_empty(u.shape[2]),
        constants.new_empty(u.shape[0], constants.shape[1] * constants.shape[2], u.shape[2]),
    ),
    lib=_ops,
)
torch.library.register_autograd("crocuta::modal_scan", _adjoint, setup_context=_setup, lib=_ops)
