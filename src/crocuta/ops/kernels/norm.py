"""Norms, compiled, with the residual before them: s = x + y and n = norm(s), in one pass over memory each way.

Statistics of a row and sums over rows are in the dtype of x over at most 64 rows, then in float64.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

from crocuta.ops.kernels.library import contiguous, function
from crocuta.ops.kernels.memory import empty


class Norm(IntEnum):
    """Kinds; the numbers are those of cpp/norm.cpp and cpp/decode_mixers.h."""

    RMS_INSIDE = 0
    RMS_OUTSIDE = 1
    LAYER = 2


_ops = torch.library.Library("crocuta", "FRAGMENT")
_ops.define(
    "add_norm(Tensor x, Tensor? y, Tensor scale, Tensor? bias, float eps, int kind)"
    " -> (Tensor s, Tensor n, Tensor middle, Tensor inverse)"
)
_ops.define(
    "add_norm_backward(Tensor? ds, Tensor dn, Tensor s, Tensor scale, Tensor middle, Tensor inverse, float eps,"
    " int kind) -> (Tensor dx, Tensor dscale, Tensor dbias)"
)


def _outputs(x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """s, empty where there is nothing to add; n; and two numbers a row."""
    rows = x.shape[:-1]
    s = x.new_empty(0) if y is None else empty(x, *x.shape)
    return s, empty(x, *x.shape), x.new_empty(rows), x.new_empty(rows)


def _forward(
    x: Tensor, y: Tensor | None, scale: Tensor, bias: Tensor | None, eps: float, kind: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert y is None or (y.shape, y.dtype) == (x.shape, x.dtype), "what is added fits the stream"
    assert scale.shape == x.shape[-1:], "a scale a channel"
    assert bias is None or bias.shape == scale.shape, "a bias a channel"
    s, n, middle, inverse = outputs = _outputs(x, y)
    inputs = contiguous(x, y, scale, bias)
    sizes = middle.numel(), x.shape[-1], kind, torch.get_num_threads()
    function("norm_forward", x.dtype, "ppppdppppiiii")(*inputs, eps, s, n, middle, inverse, *sizes)
    return outputs


def _backward(
    ds: Tensor | None, dn: Tensor, s: Tensor, scale: Tensor, middle: Tensor, inverse: Tensor, eps: float, kind: int
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _gradients(ds, dn, s, scale)
    ds, dn, s, scale = contiguous(ds, dn, s, scale)
    sizes = middle.numel(), s.shape[-1], kind, torch.get_num_threads()
    run = function("norm_backward", s.dtype, "ppppdpppppiiii")
    run(ds, dn, s, scale, eps, middle, inverse, *outputs, *sizes)
    return outputs


def _gradients(ds: Tensor | None, dn: Tensor, s: Tensor, scale: Tensor, *_) -> tuple[Tensor, Tensor, Tensor]:
    return empty(s, *s.shape), scale.new_empty(scale.shape), scale.new_empty(scale.shape)


def _setup(ctx, inputs, output) -> None:
    x, y, scale, bias, ctx.eps, ctx.kind = inputs
    ctx.set_materialize_grads(False)
    s, _, middle, inverse = output
    ctx.save_for_backward(x if y is None else s, scale, middle, inverse)
    ctx.given = y is not None, bias is not None


def _adjoint(ctx, ds, dn, _, __):
    s, scale, middle, inverse = ctx.saved_tensors
    has_sum, has_bias = ctx.given
    dn = torch.zeros_like(s) if dn is None else dn
    given = ds if has_sum else None, dn, s, scale, middle, inverse
    dx, dscale, dbias = torch.ops.crocuta.add_norm_backward(*given, ctx.eps, ctx.kind)
    return dx, dx if has_sum else None, dscale, dbias if has_bias else None, None, None


_ops.impl("add_norm", _forward, "CPU")
_ops.impl("add_norm_backward", _backward, "CPU")
torch.library.register_fake("crocuta::add_norm", lambda x, y, *_: _outputs(x, y), lib=_ops)
torch.library.register_fake("crocuta::add_norm_backward", _gradients, lib=_ops)
torch.library.register_autograd("crocuta::add_norm", _adjoint, setup_context=_setup, lib=_ops)
