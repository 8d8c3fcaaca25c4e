"""Taps of implicit filters, an MLP over positions, a few positions at a time, keeping nothing for the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from crocuta.ops.kernels.memory import empty
from crocuta.ops.mlp import Affine
from crocuta.ops.turns import turn_size, turns

_POSITIONS = 1024
"""Positions done at once on a CPU."""


def implicit_taps(
    x: Float[Tensor, "l e"],
    layers: Sequence[Affine],
    frequency: Float[Tensor, "*w"] | None,
    output: Affine,
) -> Float[Tensor, "g l"]:
    """output( act(layer( .. act(first x))) )ᵀ, act(a) = sin(frequency · a), or max(a, 0) without one (Hyena §3.3).

    In the dtype of the weights, the first layer in that of x. ``frequency`` is one a unit, or one for all. There is at
    least one layer, and all have a bias. Differentiable in all; the backward pass computes what it needs again.
    """
    weights, biases = zip(*layers)
    return torch.ops.crocuta.implicit_taps(x, weights, biases, frequency, *output)


# --- the op ---------------------------------------------------------------------------------------------------

_ops = torch.library.Library("crocuta", "FRAGMENT")
_ops.define(
    "implicit_taps(Tensor x, Tensor[] weights, Tensor[] biases, Tensor? frequency, Tensor output, Tensor? output_bias)"
    " -> Tensor"
)
_ops.define(
    "implicit_taps_backward(Tensor dtaps, Tensor x, Tensor[] weights, Tensor[] biases, Tensor? frequency,"
    " Tensor output, bool of_x)"
    " -> (Tensor dx, Tensor[] dweights, Tensor[] dbiases, Tensor dfrequency, Tensor doutput, Tensor dbias)"
)


class _Layer(NamedTuple):
    """One layer at some positions: its input, its product with the weights, and what the activation makes of that."""

    x: Tensor
    a: Tensor
    h: Tensor


def _layer(x: Tensor, weight: Tensor, bias: Tensor, frequency: Tensor | None) -> _Layer:
    a = torch.addmm(bias.to(x.dtype), x, weight.to(x.dtype).t())
    return _Layer(x, a, (a.relu() if frequency is None else (frequency * a).sin()).to(weight.dtype))


def _forward(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    frequency: Tensor | None,
    output: Tensor,
    output_bias: Tensor | None,
) -> Tensor:
    taps = empty(output, len(output), len(x))
    for rows in turns(len(x), turn_size(output, _POSITIONS)):
        h = x[rows]
        for weight, bias in zip(weights, biases):
            h = _layer(h, weight, bias, frequency).h
        torch.mm(output, h.t(), out=taps[:, rows])
    return taps if output_bias is None else taps.add_(output_bias[:, None])


def _backward(
    dtaps: Tensor,
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    frequency: Tensor | None,
    output: Tensor,
    of_x: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor, Tensor, Tensor]:
    gradients = _gradients(dtaps, x, weights, biases, frequency, output, of_x)
    dx, dweights, dbiases, dfrequency, doutput, dbias = gradients
    for gradient in (*dweights, *dbiases, dfrequency, doutput):
        gradient.zero_()
    torch.sum(dtaps, 1, out=dbias)
    for rows in turns(len(x), turn_size(output, _POSITIONS)):
        layers, h = [], x[rows]
        for weight, bias in zip(weights, biases):
            layers.append(_layer(h, weight, bias, frequency))
            h = layers[-1].h
        dtaps_ = dtaps[:, rows]
        doutput += dtaps_ @ h
        dh = dtaps_.t() @ output
        for layer, weight, dweight, dweight_bias in reversed(list(zip(layers, weights, dweights, dbiases))):
            dh = dh.to(layer.a.dtype)
            if frequency is None:
                da = dh * (layer.a > 0)
            else:
                dangle = dh * (frequency * layer.a).cos()
                dfrequency += (dangle * layer.a).sum(0).sum_to_size(frequency.shape)
                da = frequency * dangle
            dweight += da.t() @ layer.x
            dweight_bias += da.sum(0)
            dh = da @ weight.to(da.dtype)
        if of_x:
            dx[rows] = dh
    return gradients


def _gradients(
    dtaps: Tensor,
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    frequency: Tensor | None,
    output: Tensor,
    of_x: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor, Tensor, Tensor]:
    """Tensors of the right shapes, empty where nothing is asked for."""
    dweights = [weight.new_empty(weight.shape) for weight in weights]
    dbiases = [bias.new_empty(bias.shape) for bias in biases]
    dfrequency = dtaps.new_empty(0 if frequency is None else frequency.shape)
    return (
        x.new_empty(x.shape if of_x else 0),
        dweights,
        dbiases,
        dfrequency,
        output.new_empty(output.shape),
        output.new_empty(len(output)),
    )


def _setup(ctx, inputs, output) -> None:  # noqa: ARG001 - torch names them so
    x, weights, biases, frequency, last, last_bias = inputs
    ctx.save_for_backward(x, frequency, last, *weights, *biases)
    ctx.layers, ctx.has_bias = len(weights), last_bias is not None


def _adjoint(ctx, dtaps):
    x, frequency, output, *layers = ctx.saved_tensors
    weights, biases = layers[: ctx.layers], layers[ctx.layers :]
    of_x = ctx.needs_input_grad[0]
    found = torch.ops.crocuta.implicit_taps_backward(dtaps, x, weights, biases, frequency, output, of_x)
    dx, dweights, dbiases, dfrequency, doutput, dbias = found
    dfrequency = dfrequency if ctx.needs_input_grad[3] else None
    return dx if of_x else None, dweights, dbiases, dfrequency, doutput, dbias if ctx.has_bias else None


_ops.impl("implicit_taps", _forward, "CompositeExplicitAutograd")
_ops.impl("implicit_taps_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake(
    "crocuta::implicit_taps", lambda x, *rest: rest[3].new_empty(len(rest[3]), len(x)), lib=_ops
)
torch.library.register_fake("crocuta::implicit_taps_backward", _gradients, lib=_ops)
torch.library.register_autograd("crocuta::implicit_taps", _adjoint, setup_context=_setup, lib=_ops)
