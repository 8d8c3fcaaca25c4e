"""What stands between the matrix products of an MLP, compiled: biases, activation and gate, and their adjoint."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from crocuta.ops.kernels.library import function

ACTIVATIONS = {"identity": 0, "silu": 1, "gelu": 2, "gelu_tanh": 3}
"""Activation of cpp/activation.h."""


def activation(
    a: Float[Tensor, "r i"],
    a_bias: Float[Tensor, " i"] | None,
    b: Float[Tensor, "r i"] | None,
    b_bias: Float[Tensor, " i"] | None,
    h: Float[Tensor, "r i"],
    activation: str,
) -> None:
    """Write h = act(a + a_bias) · (b + b_bias), which may be a; all are contiguous, float32 or float64."""
    run = function("activation_forward", a.dtype, "pppppiiii")
    run(a, a_bias, b, b_bias, h, *a.shape, ACTIVATIONS[activation], torch.get_num_threads())


def activation_adjoint(
    a: Float[Tensor, "r i"],
    a_bias: Float[Tensor, " i"] | None,
    b: Float[Tensor, "r i"] | None,
    b_bias: Float[Tensor, " i"] | None,
    dh: Float[Tensor, "r i"],
    outputs: tuple[Float[Tensor, "r i"], Float[Tensor, "r i"], Float[Tensor, "r i"] | None],
    activation: str,
) -> None:
    """Write h, da (which may be dh) and db, the last where there is a b; all are contiguous, float32 or float64."""
    run = function("activation_backward", a.dtype, "ppppppppiiii")
    run(a, a_bias, b, b_bias, dh, *outputs, *a.shape, ACTIVATIONS[activation], torch.get_num_threads())
