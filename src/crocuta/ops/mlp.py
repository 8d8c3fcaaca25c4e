"""MLPs, down( act(gate x) · up x ) or down( act(up x) ), a few rows at a time, keeping little for the backward pass."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from crocuta.ops.kernels.activation import activation as compiled_activation
from crocuta.ops.kernels.activation import activation_adjoint as compiled_adjoint
from crocuta.ops.kernels.library import available
from crocuta.ops.kernels.memory import empty
from crocuta.ops.products import accumulate, multiply
from crocuta.ops.turns import turn_size, turns

Activation: TypeAlias = Literal["silu", "gelu", "gelu_tanh", "identity"]

_ROWS = 1024
"""Rows done at once on a CPU."""


class Affine(NamedTuple):
    """One product of an MLP, x weightᵀ + bias."""

    weight: Float[Tensor, "i d"]
    bias: Float[Tensor, " i"] | None = None


def activate(x: Tensor, activation: Activation) -> Tensor:
    """silu, exact (erf) gelu, tanh gelu, or the identity."""
    match activation:
        case "silu":
            return F.silu(x)
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "identity":
            return x


def mlp(
    x: Float[Tensor, "*b d"], gate: Affine | None, up: Affine, down: Affine, activation: Activation
) -> Float[Tensor, "*b d"]:
    """down( act(gate x) · up x ) (Shazeer 2020), or down( act(up x) ) without a gate, in x's dtype, or in autocast's.

    Where gradients are due it keeps x and what the activation sees (and the gated product); activations are computed
    again in the backward pass. Biases are there for all products or for none of them.
    """
    tensors: list[Tensor | None] = [x.reshape(-1, x.shape[-1]), *(gate or (None, None)), *up, *down]
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        tensors = [None if t is None else t.to(torch.get_autocast_dtype(device)) for t in tensors]
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    y, _, _ = torch.ops.crocuta.mlp(*tensors, activation, keep)
    return y.view(*x.shape[:-1], y.shape[-1])


# --- the op ---------------------------------------------------------------------------------------------------

_ops = torch.library.Library("crocuta", "FRAGMENT")
_ops.define(
    "mlp(Tensor x, Tensor? gate, Tensor? gate_bias, Tensor up, Tensor? up_bias, Tensor down, Tensor? down_bias,"
    " str activation, bool keep) -> (Tensor y, Tensor a, Tensor b)"
)
_ops.define(
    "mlp_backward(Tensor dy, Tensor x, Tensor a, Tensor b, Tensor? gate, Tensor? gate_bias, Tensor up, Tensor? up_bias,"
    " Tensor down, str activation, bool weights) -> (Tensor dx, Tensor dgate, Tensor dgate_bias, Tensor dup,"
    " Tensor dup_bias, Tensor ddown, Tensor ddown_bias)"
)


def _outputs(x: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y and the products of the first layer, without their biases, which are empty where they are not kept."""
    a, b = len(x) if keep else 0, len(x) if keep and gate is not None else 0
    return empty(x, len(x), len(down)), empty(x, a, len(up)), empty(x, b, len(up))


def _forward(
    x: Tensor,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    activation: Activation,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    y, a, b = _outputs(x, gate, up, down, keep)
    turn = turn_size(x, _ROWS)
    scratch = x.new_empty(1 if keep else 1 + (gate is not None), min(turn, len(x)), len(up))
    first, first_bias, factor_bias = (up, up_bias, None) if gate is None else (gate, gate_bias, up_bias)
    for rows in turns(len(x), turn):
        size = rows.stop - rows.start
        a_ = a[rows] if keep else scratch[0, :size]
        b_ = None if gate is None else b[rows] if keep else scratch[1, :size]
        multiply(x[rows], first.t(), out=a_)
        if b_ is not None:
            multiply(x[rows], up.t(), out=b_)
        h = _activated(Products(a_, first_bias, b_, factor_bias), scratch[0, :size], activation)
        multiply(h, down.t(), out=y[rows], bias=down_bias)
    return y, a, b


def _backward(
    dy: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    activation: Activation,
    weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    gradients = _gradients(x, gate, up, down, weights)
    dx, dgate, dgate_bias, dup, dup_bias, ddown, ddown_bias = gradients
    for gradient in gradients[1:]:
        gradient.zero_()
    turn = turn_size(x, _ROWS)
    scratch = x.new_empty(3, min(turn, len(x)), len(up))
    first, first_bias, factor_bias = (up, up_bias, None) if gate is None else (gate, gate_bias, up_bias)
    dfirst, dfirst_bias = (dup, dup_bias) if gate is None else (dgate, dgate_bias)
    for rows in turns(len(x), turn):
        x_, dy_, dx_ = x[rows], dy[rows], dx[rows]
        h, dh, db = (each[: rows.stop - rows.start] for each in scratch)
        multiply(dy_, down, out=dh)
        products = Products(a[rows], first_bias, None if gate is None else b[rows], factor_bias)
        h, da = _adjoint_of_activation(products, dh, h, db, activation)
        multiply(da, first, out=dx_)
        if gate is not None:
            accumulate(db, up, out=dx_)
        if weights:
            _accumulate(ddown, ddown_bias, dy_, h)
            _accumulate(dfirst, dfirst_bias, da, x_)
            if gate is not None:
                _accumulate(dup, dup_bias, db, x_)
    return gradients


def _gradients(
    x: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, weights: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Tensors of the right shapes, empty where weights are frozen and where there is no gate."""

    def like(weight: Tensor | None) -> tuple[Tensor, Tensor]:
        if weight is None or not weights:
            return x.new_empty(0), x.new_empty(0)
        return weight.new_empty(weight.shape), weight.new_empty(len(weight))

    return empty(x, *x.shape), *like(gate), *like(up), *like(down)


def _accumulate(dweight: Tensor, dbias: Tensor, d: Tensor, x: Tensor) -> None:
    accumulate(d.t(), x, out=dweight)
    dbias.add_(d.sum(0))


class Products(NamedTuple):
    """What an activation gets: the products of the first layer, and their biases."""

    a: Tensor
    a_bias: Tensor | None
    b: Tensor | None
    b_bias: Tensor | None

    def with_biases(self) -> tuple[Tensor, Tensor | None]:
        a = self.a if self.a_bias is None else self.a + self.a_bias
        return a, self.b if self.b is None or self.b_bias is None else self.b + self.b_bias

    def compiled(self) -> bool:
        """Whether the kernel takes them, which sees addresses alone: all of one dtype, numbers side by side."""
        if self.a.device.type != "cpu" or self.a.dtype not in (torch.float32, torch.float64) or not available():
            return False
        return all(t is None or (t.dtype == self.a.dtype and t.is_contiguous()) for t in self)


def _activated(products: Products, h: Tensor, activation: Activation) -> Tensor:
    """act(a), times b; written to h where the kernel does it."""
    if not products.compiled():
        a, b = products.with_biases()
        return activate(a, activation) if b is None else activate(a, activation) * b
    compiled_activation(*products, h, activation)
    return h


def _adjoint_of_activation(
    products: Products, dh: Tensor, h: Tensor, db: Tensor, activation: Activation
) -> tuple[Tensor, Tensor]:
    """h and da; db is written. The kernel writes the others to ``h`` and over ``dh``."""
    if products.compiled():
        compiled_adjoint(*products, dh, (h, dh, None if products.b is None else db), activation)
        return h, dh
    a, b = products.with_biases()
    active = activate(a, activation)
    if b is None:
        return active, _activation_adjoint(dh, a, activation)
    torch.mul(active, dh, out=db)
    return active * b, _activation_adjoint(dh * b, a, activation)


def _activation_adjoint(dy: Tensor, x: Tensor, activation: Activation) -> Tensor:
    match activation:
        case "silu":
            return torch.ops.aten.silu_backward(dy, x)
        case "gelu":
            return torch.ops.aten.gelu_backward(dy, x, approximate="none")
        case "gelu_tanh":
            return torch.ops.aten.gelu_backward(dy, x, approximate="tanh")
        case "identity":
            return dy


def _setup(ctx, inputs, output) -> None:
    x, *weights, activation, keep = inputs
    assert keep
    ctx.set_materialize_grads(False)  # zeros for the outputs that are only kept would be as large as they are
    ctx.save_for_backward(x, output[1], output[2], *weights)
    ctx.activation = activation


def _adjoint(ctx, dy, _, __):
    x, a, b, *parameters, down_bias = ctx.saved_tensors
    if dy is None:
        return (None,) * 9
    weights = any(ctx.needs_input_grad[1:7])
    dx, *gradients = torch.ops.crocuta.mlp_backward(dy.contiguous(), x, a, b, *parameters, ctx.activation, weights)
    given = [parameter is not None and weights for parameter in (*parameters, down_bias)]
    return dx, *(gradient if wanted else None for wanted, gradient in zip(given, gradients)), None, None


def _backward_fake(dy, x, a, b, gate, gate_bias, up, up_bias, down, activation, weights):  # noqa: ARG001
    return _gradients(x, gate, up, down, weights)


_ops.impl("mlp", _forward, "CompositeExplicitAutograd")
_ops.impl("mlp_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake(
    "crocuta::mlp", lambda x, gate, _, up, __, down, *rest: _outputs(x, gate, up, down, rest[-1]), lib=_ops
)
torch.library.register_fake("crocuta::mlp_backward", _backward_fake, lib=_ops)
torch.library.register_autograd("crocuta::mlp", _adjoint, setup_context=_setup, lib=_ops)
