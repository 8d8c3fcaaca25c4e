"""Norms against their formulas in float64."""

from __future__ import annotations

import pytest
import torch

from crocuta.ops import reference
from crocuta.ops.norm import add_layer_norm, add_rms_norm


def rms_norm(x: torch.Tensor, scale: torch.Tensor, eps: float, *, eps_inside_root: bool) -> torch.Tensor:
    return add_rms_norm(x, None, scale, eps, eps_inside_root=eps_inside_root)[1]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("shape", [(1, 8), (2, 3, 5)])
def test_rms_norm(inside, shape):
    x, scale = randn(*shape), randn(shape[-1], seed=1)
    expected = reference.rms_norm(x, scale, 0.1, eps_inside_root=inside)
    torch.testing.assert_close(rms_norm(x, scale, 0.1, eps_inside_root=inside), expected, rtol=1e-12, atol=1e-12)


def test_where_the_eps_stands_matters():
    x, scale = randn(2, 4), torch.ones(4, dtype=torch.float64)
    inside, outside = (rms_norm(x, scale, 0.1, eps_inside_root=flag) for flag in (True, False))
    assert (inside - outside).abs().max() > 1e-2


@pytest.mark.parametrize("inside", [True, False])
def test_rms_norm_gradients(inside):
    inputs = (randn(2, 3, 4).requires_grad_(), randn(4, seed=1).requires_grad_())
    assert torch.autograd.gradcheck(lambda x, s: rms_norm(x, s, 0.1, eps_inside_root=inside), inputs)


def test_a_zero_row_has_a_finite_gradient():
    x = torch.zeros(1, 4, requires_grad=True)
    rms_norm(x, torch.ones(4), 1e-6, eps_inside_root=False).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_bf16_statistics_are_in_float32():
    x = torch.full((1, 1024), 0.1, dtype=torch.bfloat16)
    y = rms_norm(x, torch.ones(1024), 1e-6, eps_inside_root=True)
    assert y.dtype == torch.bfloat16
    assert (y == 1).all()


def test_layer_norm():
    x, scale, bias = randn(2, 3, 5), randn(5, seed=1), randn(5, seed=2)
    expected = reference.layer_norm(x, scale, bias, 0.1)
    torch.testing.assert_close(add_layer_norm(x, None, scale, bias, 0.1)[1], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("layer", [True, False])
def test_gradients_of_the_stream_and_of_its_norm_meet(stream, layer):
    """What comes out beside the norm is x itself, and may go on with or without it."""
    x, scale, bias = (
        randn(2, 3, 4).requires_grad_(),
        randn(4, seed=1).requires_grad_(),
        randn(4, seed=2).requires_grad_(),
    )

    def run(x, scale, bias):
        if layer:
            s, n = add_layer_norm(x, None, scale, bias, 0.1)
        else:
            s, n = add_rms_norm(x, None, scale, 0.1, eps_inside_root=True)
        return torch.sin(n) * 2 + torch.cos(s) if stream else torch.sin(n)

    assert torch.autograd.gradcheck(run, (x, scale, bias))
    s, n = add_layer_norm(x, None, scale, bias, 0.1)
    assert torch.equal(s, x)
    (dx,) = torch.autograd.grad(s.square().sum(), [x])
    torch.testing.assert_close(dx, 2 * x.detach(), rtol=1e-12, atol=1e-12)
    assert n.requires_grad
    frozen = x.detach()
    s, n = add_layer_norm(frozen, None, scale, bias, 0.1)
    (n * s).sum().backward()
    assert scale.grad is not None
    assert frozen.grad is None
