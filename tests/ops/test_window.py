"""The window of implicit filters against its formula in float64, with and without the compiled kernel."""

from __future__ import annotations

import pytest
import torch
from kernel_paths import each_path

from crocuta.ops.kernels.library import function, library, why_not
from crocuta.ops.window import decay_window

needs_library = pytest.mark.skipif(library() is None, reason=why_not() or "")
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
    x, rates = randn(groups, taps, dtype=dtype), rates_of(groups, dtype)
    dy = randn(groups, taps, seed=1, dtype=dtype).abs() * x.sign()  # no sum of a rate's gradient cancels itself
    for window in (lambda *given: decay_window(*given, SHIFT, delta), lambda *given: formula(*given, delta)):
        wide = dtype if not found else torch.float64
        leaves = [tensor.to(wide, copy=True).requires_grad_() for tensor in (x, rates)]
        with path():
            y = window(*leaves)
            found.append((y, *torch.autograd.grad(y, leaves, dy.to(wide))))
    for mine, true in zip(*found, strict=True):
        scale = true.norm() if true.norm() else 1
        assert (mine.double() - true).norm() <= bound * scale


@each_path
@pytest.mark.parametrize("columns", [slice(20), slice(None, None, 2)], ids=["rows apart", "columns apart"])
def test_fixed_rates_and_taps_that_lie_apart(path, columns):
    wide, rates = randn(5, 40), rates_of(5, torch.float64)
    apart = wide[:, columns].requires_grad_()
    with path():
        y = decay_window(apart, rates, SHIFT, 0.1)
        (dx,) = torch.autograd.grad(y.sum(), apart)
    torch.testing.assert_close(y, formula(wide[:, columns], rates, 0.1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dx, formula(torch.ones_like(apart), rates, 0.1), rtol=1e-12, atol=1e-12)


@needs_library
@pytest.mark.parametrize("of_rates", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_is_written_behind_the_end(dtype, of_rates):
    """Outputs in the middle of a larger tensor, whose other values stay."""
    groups, taps, kept = 3, 21, 64
    x, rates = randn(groups, taps, dtype=dtype), rates_of(groups, dtype)
    size, sizes = x.numel(), (SHIFT, 0.1)
    outputs = [torch.full((kept + size + kept,), 7.0, dtype=dtype) for _ in range(2)]
    y, dx = (whole[kept : kept + size] for whole in outputs)
    drates = torch.empty_like(rates) if of_rates else None
    function("window_forward", dtype, "ppddpiii")(x, rates, *sizes, y, groups, taps, 1)
    function("window_backward", dtype, "pppddppiii")(x, x, rates, *sizes, dx, drates, groups, taps, 1)
    for whole in outputs:
        assert (whole[:kept] == 7).all()
        assert (whole[kept + size :] == 7).all()
    assert torch.equal(y, dx)


@each_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_rate_that_is_no_number_shows(path, dtype):
    """Training that went astray must not look like a filter that decays at once."""
    rates = rates_of(3, dtype)
    rates[1] = torch.nan
    with path():
        y = decay_window(torch.ones(3, 19, dtype=dtype), rates, SHIFT, 0.1)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


@each_path
def test_gradients_of_rates_lose_nothing_over_a_million_taps(path):
    """Every term has the same sign: a sum in float32 without a second level would be off by 1e-5 and more."""
    t = torch.linspace(0, 1, 1 << 20, dtype=torch.float64)
    taps, rates = (1 / (t + 0.1)).float(), torch.tensor([0.7], requires_grad=True)
    with path():
        decay_window(taps[None], rates, SHIFT, 1 / (len(t) - 1)).sum().backward()
    assert rates.grad.item() == pytest.approx(-(taps * t * torch.exp(-t * rates.double())).sum().item(), rel=1e-6)


@needs_library
def test_the_op_passes_the_checks_of_torch():
    inputs = randn(3, 20).requires_grad_(), rates_of(3, torch.float64).requires_grad_(), SHIFT, 0.1
    torch.library.opcheck(torch.ops.crocuta.decay_window.default, inputs)
    assert torch.autograd.gradcheck(lambda taps, rates: decay_window(taps, rates, SHIFT, 0.1), inputs[:2])
