"""Compiled causal depthwise FIR, and the short one with the gate that follows it, on channels-last input.

Filters of 3, 4 and 7 taps are unrolled in registers; above 8, a vector of channels is copied and 12 outputs are made at
a time. Gradients of
the taps, of the bias and of D are added up in float32 over at most 120 steps, then in float64. Both save their inputs
alone.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from crocuta.ops.blocks import compute_dtype, full_precision
from crocuta.ops.kernels import gpu
from crocuta.ops.kernels.library import contiguous, function, rows_of
from crocuta.ops.kernels.memory import empty

_FORWARD, _BACKWARD = "piippppp" + "i" * 6, "ppiipppppppp" + "i" * 6
_GATE_FORWARD, _GATE_BACKWARD = "piippppp" + "i" * 5, "pppiippppppp" + "i" * 5


@full_precision
def fir(
    u: Float[Tensor, "b l d"],
    taps: Float[Tensor, "g k"],
    bias: Float[Tensor, " d"] | None = None,
    tail: Float[Tensor, "b t d"] | None = None,
    skip: Float[Tensor, " d"] | None = None,
) -> Float[Tensor, "b l d"]:
    """y[t] = Σ_j taps[c // (d / g), j] · u[t - j] + bias + D · u[t], D = skip, as ``crocuta.ops.fir.fir``.

    In float32 (or float64), in u's dtype. ``tail`` holds the k - 1 inputs before u, oldest first.
    """
    tensors = [None if t is None else t.to(compute_dtype(u.dtype)) for t in (u, taps, bias, skip, tail)]
    return torch.ops.crocuta.fir(*tensors).to(u.dtype)


@full_precision
def fir_gate(
    z: Float[Tensor, "b l c"],
    taps: Float[Tensor, "c k"],
    bias: Float[Tensor, " c"] | None = None,
    tail: Float[Tensor, "b t c"] | None = None,
) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b l d"]]:
    """(x2, x1 · v), the thirds of FIR(z) + bias over c = 3 d channels, as ``crocuta.ops.gate.fir_gate``.

    In float32 (or float64), in z's dtype. In Triton on a GPU, up to ``gpu.MOST_TAPS`` taps.
    """
    rest = [None if t is None else t.to(compute_dtype(z.dtype)) for t in (taps, bias, tail)]
    x2, u = torch.ops.crocuta.fir_gate(gpu.as_read(z), *rest)
    return x2.to(z.dtype), u.to(z.dtype)


# --- the ops --------------------------------------------------------------------------------------------------

_ops = torch.library.Library("crocuta", "FRAGMENT")
_ops.define("fir(Tensor u, Tensor taps, Tensor? bias, Tensor? skip, Tensor? tail) -> Tensor")
_ops.define(
    "fir_backward(Tensor dy, Tensor u, Tensor taps, Tensor? skip, Tensor? tail)"
    " -> (Tensor du, Tensor dtaps, Tensor dbias, Tensor dskip, Tensor dtail)"
)
_ops.define("fir_gate(Tensor z, Tensor taps, Tensor? bias, Tensor? tail) -> (Tensor x2, Tensor u)")
_ops.define(
    "fir_gate_backward(Tensor dx2, Tensor du, Tensor z, Tensor taps, Tensor? bias, Tensor? tail)"
    " -> (Tensor dz, Tensor dtaps, Tensor dbias, Tensor dtail)"
)


def _sizes(u: Tensor, taps: Tensor, tail: Tensor | None) -> tuple[Any, ...]:  # symbols, while a graph is traced
    """b, l, d, g and k; what the kernels read lies inside the tensors."""
    (b, l, d), (g, k) = u.shape, taps.shape
    assert g * k, "no taps"
    assert d % g == 0, f"{k} taps of {g} groups for {d} channels"
    assert tail is None or tail.shape == (b, k - 1, d), f"a tail {tuple(tail.shape)} for {k} taps"
    return b, l, d, g, k


def _filter(u: Tensor, taps: Tensor, bias: Tensor | None, skip: Tensor | None, tail: Tensor | None) -> Tensor:
    b, l, d, g, k = _sizes(u, taps, tail)
    u, y = rows_of(u), empty(u, b, l, d)
    constants = contiguous(taps, bias, skip, tail)
    run = function("fir_forward", u.dtype, _FORWARD)
    run(u, u.stride(0), u.stride(1), *constants, y, b, l, d, g, k, torch.get_num_threads())
    return y


def _filter_gradients(u: Tensor, taps: Tensor, tail: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Tensors of the right shapes; that of the tail is empty where there is none."""
    b, l, d, _, _ = _sizes(u, taps, tail)
    dtail = u.new_empty(0 if tail is None else tail.shape)
    return empty(u, b, l, d), u.new_empty(taps.shape), u.new_empty(d), u.new_empty(d), dtail


def _filter_backward(
    dy: Tensor, u: Tensor, taps: Tensor, skip: Tensor | None, tail: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    gradients = _filter_gradients(u, taps, tail)
    u, (dy, taps, skip, tail) = rows_of(u), contiguous(dy, taps, skip, tail)
    run = function("fir_backward", u.dtype, _BACKWARD)
    of_tail = None if tail is None else gradients[4]
    sizes = _sizes(u, taps, tail)
    run(dy, u, u.stride(0), u.stride(1), taps, skip, tail, *gradients[:4], of_tail, *sizes, torch.get_num_threads())
    return gradients


def gate_outputs(z: Tensor, taps: Tensor, tail: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tensors of the right shapes and layouts."""
    b, l, c, g, _ = _sizes(z, taps, tail)
    assert g == c == 3 * (c // 3), f"taps of {g} of {c} = 3 d channels"
    return gpu.empty(z, b, l, c // 3), gpu.empty(z, b, l, c // 3)


def _gate(z: Tensor, taps: Tensor, bias: Tensor | None, tail: Tensor | None) -> tuple[Tensor, Tensor]:
    x2, u = gate_outputs(z, taps, tail)
    z, constants = rows_of(z), contiguous(taps, bias, tail)
    run = function("fir_gate_forward", z.dtype, _GATE_FORWARD)
    threads = torch.get_num_threads()
    run(z, z.stride(0), z.stride(1), *constants, x2, u, *x2.shape, taps.shape[1], threads)
    return x2, u


def gate_gradients(z: Tensor, taps: Tensor, tail: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tensors of the right shapes and layouts; that of the tail is empty where there is none."""
    dtail = taps.new_empty(0 if tail is None else tail.shape)
    return gpu.empty(z, *z.shape), taps.new_empty(taps.shape), taps.new_empty(taps.shape[0]), dtail


def _gate_backward(
    dx2: Tensor, du: Tensor, z: Tensor, taps: Tensor, bias: Tensor | None, tail: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gradients = gate_gradients(z, taps, tail)
    b, l, c, _, k = _sizes(z, taps, tail)
    z, (dx2, du, taps, bias, tail) = rows_of(z), contiguous(dx2, du, taps, bias, tail)
    run = function("fir_gate_backward", z.dtype, _GATE_BACKWARD)
    of_tail = None if tail is None else gradients[3]
    inputs = dx2, du, z, z.stride(0), z.stride(1), taps, bias, tail
    run(*inputs, *gradients[:3], of_tail, b, l, c // 3, k, torch.get_num_threads())
    return gradients


def _save_filter(ctx, inputs, output) -> None:
    u, taps, bias, skip, tail = inputs
    ctx.save_for_backward(u, taps, skip, tail)
    ctx.has_bias = bias is not None


def _filter_adjoint(ctx, dy):
    u, taps, skip, tail = ctx.saved_tensors
    du, dtaps, dbias, dskip, dtail = torch.ops.crocuta.fir_backward(dy, u, taps, skip, tail)
    return du, dtaps, dbias if ctx.has_bias else None, None if skip is None else dskip, None if tail is None else dtail


def _save_gate(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _gate_adjoint(ctx, dx2, du):
    z, taps, bias, tail = ctx.saved_tensors
    dz, dtaps, dbias, dtail = torch.ops.crocuta.fir_gate_backward(dx2, du, z, taps, bias, tail)
    return dz, dtaps, None if bias is None else dbias, None if tail is None else dtail


_ops.impl("fir", _filter, "CPU")
_ops.impl("fir_backward", _filter_backward, "CPU")
_ops.impl("fir_gate", _gate, "CPU")
_ops.impl("fir_gate_backward", _gate_backward, "CPU")
gpu.implement(_ops, "fir_gate", "fir_gate", "fir_gate")
gpu.implement(_ops, "fir_gate_backward", "fir_gate", "fir_gate_backward")
torch.library.register_fake("crocuta::fir", lambda u, *_: u.new_empty(u.shape), lib=_ops)
torch.library.register_fake(
    "crocuta::fir_backward", lambda _, u, taps, *rest: _filter_gradients(u, taps, rest[-1]), lib=_ops
)
torch.library.register_fake("crocuta::fir_gate", lambda z, taps, *rest: gate_outputs(z, taps, rest[-1]), lib=_ops)
torch.library.register_fake(
    "crocuta::fir_gate_backward", lambda _, __, z, taps, *rest: gate_gradients(z, taps, rest[-1]), lib=_ops
)
torch.library.register_autograd("crocuta::fir", _filter_adjoint, setup_context=_save_filter, lib=_ops)
torch.library.register_autograd("crocuta::fir_gate", _gate_adjoint, setup_context=_save_gate, lib=_ops)
