"""The window of implicit filters against its formula in float64, with and without the compiled kernel."""

from __future__ import annotations

import pytest
import torch
from kernel_paths import each_path

from crocuta.ops.window import decay_window

SHIFT = 0.05


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def formula(taps: torch.Tensor, rates: torch.Tensor, delta: float) -> torch.Tensor:
    t = torch.arange(taps.shape[1], dtype=torch.float64) * delta
    return taps * (torch.exp(-rates[:, None] * t) + SHIFT)


def rates_of(groups: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.linspace(0.5, 40, groups, dtype=dtype)


@each_path
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize(("groups", "taps"), [(1, 2), (3, 1), (5, 17), (2, 1000), (4, 1024), (3, 5000)])
def test_values_and_gradients(path, dtype, bound, groups, taps):
    delta, found = 1 / max(1, taps - 1), []
    x, rates, dy = randn(groups, taps, dtype=dtype), rates_of(groups, dtype), randn(groups, taps, seed=1, dtype=dtype)
    for function in (lambda *given: decay_window(*given, SHIFT, delta), lambda *given: formula(*given, delta)):
        wide = dtype if not found else torch.float64
        leaves = [tensor.to(wide, copy=True).requires_grad_() for tensor in (x, rates)]
        with path():
            y = function(*leaves)
            found.append((y, *torch.autograd.grad(y, leaves, dy.to(wide))))
    for mine, true in zip(*found, strict=True):
        scale = true.norm() if true.norm() else 1
        assert (mine.double() - true).norm() <= bound * scale


@each_path
def test_fixed_rates_and_columns_that_lie_apart(path):
    wide, rates = randn(5, 40), rates_of(5, torch.float64)
    apart = wide[:, ::2].requires_grad_()
    with path():
        y = decay_window(apart, rates, SHIFT, 0.1)
        y.sum().backward()
    torch.testing.assert_close(y, formula(wide[:, ::2], rates, 0.1), rtol=1e-12, atol=1e-12)
    assert rates.grad is None


def test_the_op_passes_the_checks_of_torch():
    inputs = randn(3, 20).requires_grad_(), rates_of(3, torch.float64).requires_grad_(), SHIFT, 0.1
    torch.library.opcheck(torch.ops.crocuta.decay_window.default, inputs)
    assert torch.autograd.gradcheck(lambda taps, rates: decay_window(taps, rates, SHIFT, 0.1), inputs[:2])
