"""The gated linear unit, W3( act(W1 x) · (W2 x) ), a few rows at a time, with little kept for the backward pass."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Activation: TypeAlias = Literal["silu", "gelu", "gelu_tanh", "identity"]

_ROWS = 512
"""Rows done at once on a CPU: what lies between the products then stays in the cache and is never a whole tensor."""


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


def glu(
    x: Float[Tensor, "*b d"],
    gate: Float[Tensor, "i d"],
    up: Float[Tensor, "i d"],
    down: Float[Tensor, "d i"],
    activation: Activation,
) -> Float[Tensor, "*b d"]:
    """(act(x gateᵀ) · (x upᵀ)) downᵀ (Shazeer 2020), in x's dtype, or in autocast's.

    Keeps x and the two products; the activation and its gate are computed again in the backward pass.
    """
    tensors: tuple[Tensor, ...] = (x.reshape(-1, x.shape[-1]), gate, up, down)
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        tensors = tuple(t.to(torch.get_autocast_dtype(device)) for t in tensors)
    return _GLU.apply(*tensors, activation).view(x.shape)


class _GLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, activation: Activation) -> Tensor:
        a, b = x.new_empty(len(x), len(gate)), x.new_empty(len(x), len(gate))
        y = torch.empty_like(x)
        for x_, a_, b_, y_ in _in_turns(x, a, b, y):
            torch.mm(x_, gate.t(), out=a_)
            torch.mm(x_, up.t(), out=b_)
            torch.mm(activate(a_, activation) * b_, down.t(), out=y_)
        ctx.save_for_backward(x, a, b, gate, up, down)
        ctx.activation = activation
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        x, a, b, gate, up, down = ctx.saved_tensors
        dx, dgate, dup, ddown = (
            torch.empty_like(x),
            torch.zeros_like(gate),
            torch.zeros_like(up),
            torch.zeros_like(down),
        )
        for x_, a_, b_, dy_, dx_ in _in_turns(x, a, b, dy, dx):
            active = activate(a_, ctx.activation)
            ddown.addmm_(dy_.t(), active * b_)
            dproduct = torch.mm(dy_, down)
            db = active * dproduct
            da = _activation_adjoint(dproduct * b_, a_, ctx.activation)
            dgate.addmm_(da.t(), x_)
            dup.addmm_(db.t(), x_)
            torch.mm(da, gate, out=dx_)
            dx_.addmm_(db, up)
        return dx, dgate, dup, ddown, None


def _in_turns(*tensors: Tensor) -> zip[tuple[Tensor, ...]]:
    """Gradients of weights are summed over turns, so what is narrower than float32 is done in one."""
    first = tensors[0]
    rows = _ROWS if first.device.type == "cpu" and first.dtype.itemsize >= 4 else max(1, len(first))
    return zip(*(tensor.split(rows) for tensor in tensors))


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
