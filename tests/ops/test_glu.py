"""The gated linear unit against its formula in float64: values, gradients, turns, precision."""

from __future__ import annotations

import pytest
import torch

from crocuta.ops import glu as glu_module
from crocuta.ops.glu import activate, glu

ACTIVATIONS = ["silu", "gelu", "gelu_tanh", "identity"]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights(d: int = 4, i: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return randn(i, d, seed=1), randn(i, d, seed=2), randn(d, i, seed=3)


def formula(x, gate, up, down, activation):
    return (activate(x @ gate.t(), activation) * (x @ up.t())) @ down.t()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("turn", [1, 2, 512])
def test_values(activation, turn, monkeypatch):
    monkeypatch.setattr(glu_module, "_ROWS", turn)
    x = randn(2, 5, 4)
    expected = formula(x, *weights(), activation)
    torch.testing.assert_close(glu(x, *weights(), activation), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients(activation, monkeypatch):
    monkeypatch.setattr(glu_module, "_ROWS", 2)
    inputs = tuple(t.requires_grad_() for t in (randn(1, 5, 4), *weights()))
    assert torch.autograd.gradcheck(lambda *tensors: glu(*tensors, activation), inputs)


def test_gelu_is_the_exact_one_unless_asked():
    x = torch.tensor([1.0], dtype=torch.float64)
    exact = 0.5 * (1 + torch.special.erf(x / 2**0.5))
    torch.testing.assert_close(activate(x, "gelu"), exact, rtol=1e-12, atol=0)
    assert (activate(x, "gelu_tanh") - exact).abs() > 1e-5


def test_autocast_makes_the_products_bfloat16_and_gives_gradients_in_float32():
    x, *matrices = (t.float().requires_grad_() for t in (randn(3, 4), *weights()))
    with torch.autocast("cpu", torch.bfloat16):
        y = glu(x, *matrices, "silu")
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in (x, *matrices))


def test_bfloat16_is_done_in_one_turn(monkeypatch):
    """Weight gradients summed over turns in bfloat16 would lose digits."""
    monkeypatch.setattr(glu_module, "_ROWS", 1)
    x = torch.ones(600, 4, dtype=torch.bfloat16)
    matrices = [t.bfloat16().requires_grad_() for t in weights()]
    glu(x, *matrices, "identity").sum().backward()
    exact = [t.detach().double().requires_grad_() for t in matrices]
    formula(x.double(), *exact, "identity").sum().backward()
    for matrix, true in zip(matrices, exact):
        torch.testing.assert_close(matrix.grad.double(), true.grad, rtol=2e-2, atol=2e-1)
