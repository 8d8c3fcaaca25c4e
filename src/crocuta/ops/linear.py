"""Products with weights, and sums: to kept memory where they are large (kernels/memory.py), by the fast library."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from crocuta.ops.kernels.library import runs_here
from crocuta.ops.kernels.memory import LARGE, empty
from crocuta.ops.products import faster_by_onednn, multiply


def linear(
    x: Float[Tensor, "*b d"], weight: Float[Tensor, "c d"], bias: Float[Tensor, " c"] | None = None
) -> Float[Tensor, "*b c"]:
    """x weightᵀ + bias, as ``F.linear`` has it; where it is an op of ours, saves x and the weight."""
    if not _worth_it(x, weight, bias):
        return F.linear(x, weight, bias)
    y = torch.ops.crocuta.linear(x.reshape(-1, x.shape[-1]), weight, bias)
    return y.view(*x.shape[:-1], len(weight))


def add(x: Float[Tensor, "*b d"], y: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
    """x + y."""
    large = x.numel() * x.dtype.itemsize >= LARGE and runs_here(x)
    return torch.ops.crocuta.add(x, y) if large and y.dtype == x.dtype else x + y


def _worth_it(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the op is worth its call, which does not cast as autocast would."""
    if x.dtype not in (torch.float32, torch.float64) or not runs_here(x) or torch.is_autocast_enabled("cpu"):
        return False
    if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        return False
    large = x.numel() // x.shape[-1] * len(weight) * x.dtype.itemsize >= LARGE
    return large or faster_by_onednn(x, weight.t())


# --- the op ---------------------------------------------------------------------------------------------------

_ops = torch.library.Library("crocuta", "FRAGMENT")
_ops.define("add(Tensor x, Tensor y) -> Tensor")
_ops.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_ops.define(
    "linear_backward(Tensor dy, Tensor x, Tensor weight, bool of_x, bool of_weight, bool of_bias)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)"
)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = empty(x, len(x), len(weight))
    return multiply(x, weight.t(), out=y, bias=bias)


def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, of_x: bool, of_weight: bool, of_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight, dbias = gradients = _gradients(dy, x, weight, of_x, of_weight, of_bias)
    if of_x:
        multiply(dy, weight, out=dx)
    if of_weight:
        multiply(dy.t(), x, out=dweight)
    if of_bias:  # a product with ones, which is faster than a sum over rows
        torch.mv(dy.t(), dy.new_ones(len(dy)), out=dbias)
    return gradients


def _gradients(
    dy: Tensor, x: Tensor, weight: Tensor, of_x: bool, of_weight: bool, of_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors of the right shapes, empty where nothing is asked for."""
    dx = empty(x, *x.shape) if of_x else x.new_empty(0)
    dweight = weight.new_empty(weight.shape if of_weight else 0)
    return dx, dweight, dy.new_empty(len(weight) if of_bias else 0)


def _setup(ctx, inputs, output) -> None:  # noqa: ARG001 - torch names them so
    ctx.save_for_backward(*inputs[:2])


def _adjoint(ctx, dy):
    x, weight = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    gradients = torch.ops.crocuta.linear_backward(dy, x, weight, *wanted)
    return tuple(gradient if asked else None for asked, gradient in zip(wanted, gradients))


_ops.impl("add", lambda x, y: torch.add(x, y, out=empty(x, *x.shape)), "CompositeExplicitAutograd")
_ops.impl("linear", _forward, "CompositeExplicitAutograd")
_ops.impl("linear_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("crocuta::add", lambda x, _: x.new_empty(x.shape), lib=_ops)
torch.library.register_autograd("crocuta::add", lambda ctx, dy: (dy, dy), lib=_ops)  # noqa: ARG005 - torch asks for both
torch.library.register_fake("crocuta::linear", lambda x, weight, _: x.new_empty(len(x), len(weight)), lib=_ops)
torch.library.register_fake("crocuta::linear_backward", _gradients, lib=_ops)
torch.library.register_autograd("crocuta::linear", _adjoint, setup_context=_setup, lib=_ops)
