"""act(a) · b, the gate of a GLU, without keeping act(a) for the backward pass."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Activation: TypeAlias = Literal["silu", "gelu", "gelu_tanh", "identity"]


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


def gated(a: Float[Tensor, "*b i"], b: Float[Tensor, "*b i"], activation: Activation) -> Float[Tensor, "*b i"]:
    """act(a) · b in the inputs' dtype (Shazeer 2020); saves a and b only."""
    return _Gated.apply(a, b, activation)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.activation = activation
        return activate(a, activation) * b

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        a, b = ctx.saved_tensors
        db = activate(a, ctx.activation) * dy
        return _activation_adjoint(dy * b, a, ctx.activation), db, None


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
