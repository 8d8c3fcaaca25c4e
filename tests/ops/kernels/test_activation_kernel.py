"""The compiled activations against torch in float64, far out and at odd sizes."""

import pytest
import torch
from compiled import each_isa, needs_library, on, relative_error, threads

from crocuta.ops.kernels.activation import ACTIVATIONS, activation, activation_adjoint
from crocuta.ops.mlp import activate

pytestmark = needs_library
WIDE = pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 3e-7), (torch.float64, 1e-14)])


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def truth(products, dh, kind):
    """h, da and db in float64."""
    a, a_bias, b, b_bias = [None if t is None else t.double() for t in products]
    a = (a if a_bias is None else a + a_bias).requires_grad_()
    b = b if b is None else (b if b_bias is None else b + b_bias).requires_grad_()
    h = activate(a, kind) if b is None else activate(a, kind) * b
    return h, *torch.autograd.grad(h, [a] if b is None else [a, b], dh.double())


@each_isa
@WIDE
@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 17), (5, 301), (70, 512)])
@pytest.mark.parametrize(("gated", "biased"), [(False, False), (True, False), (True, True), (False, True)])
def test_values_and_adjoint(isa, dtype, bound, kind, rows, columns, gated, biased):
    a, b, dh = (4 * normal(rows, columns, seed=seed, dtype=dtype) for seed in range(3))
    bias = normal(2, columns, seed=3, dtype=dtype) if biased else (None, None)
    products = a, bias[0], b if gated else None, bias[1] if gated else None
    h, again, da, db = (torch.full_like(a, torch.nan) for _ in range(4))
    with on(isa):
        activation(*products, h, kind)
        activation_adjoint(*products, dh, (again, da, db if gated else None), kind)
    for found, true in zip((h, da, db), truth(products, dh, kind)):
        assert relative_error(found, true) < bound
    torch.testing.assert_close(again, h, rtol=0, atol=0)


@each_isa
@WIDE
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_far_out_and_at_zero(isa, dtype, bound, kind):
    """Each value by itself, not the norm of all: no overflow, no noise where the truth is tiny or none."""
    a = torch.cat([torch.linspace(-30, 30, 1201), torch.tensor([0.0, -1e4, 1e4, -1e30, 1e30, torch.inf])]).to(dtype)
    h, da, ones = torch.empty_like(a), torch.empty_like(a), torch.ones_like(a)
    with on(isa):
        activation_adjoint(a[None], None, None, None, ones[None], (h[None], da[None], None), kind)
    finite = a.isfinite() & ((a.abs() < 1e19) | (torch.tensor(kind != "gelu_tanh")))  # a cube that overflows
    true_h, true_da = truth((a[None], None, None, None), ones[None], kind)
    torch.testing.assert_close(h[finite].double(), true_h[0, finite], rtol=40 * bound, atol=bound)
    torch.testing.assert_close(da[finite].double(), true_da[0, finite], rtol=40 * bound, atol=4 * bound)


@each_isa
@WIDE
def test_the_exponential_is_right_everywhere(isa, dtype, bound):
    """By itself it is seen in silu(-x) = -x e^-x / (1 + e^-x), whose relative error is that of e^-x far out."""
    a = torch.linspace(-80, 0, 20_001).to(dtype)
    h = torch.empty_like(a)
    with on(isa):
        activation(a[None], None, None, None, h[None], "silu")
    torch.testing.assert_close(h.double(), activate(a.double(), "silu"), rtol=2 * bound, atol=0)


@each_isa
def test_nan_stays_nan_and_in_place_is_the_same(isa):
    a, dh = normal(4, 70, dtype=torch.float32), normal(4, 70, seed=1, dtype=torch.float32)
    a[1, 3] = torch.nan
    for kind in ACTIVATIONS:
        h, da = torch.empty_like(a), torch.empty_like(a)
        with on(isa):
            activation_adjoint(a, None, None, None, dh, (h, da, None), kind)
            over, again = dh.clone(), torch.empty_like(a)
            activation_adjoint(a, None, None, None, over, (again, over, None), kind)
        assert h.isnan().sum() == 1
        assert torch.equal(over.nan_to_num(), da.nan_to_num())


def test_threads_change_nothing():
    a, b = normal(300, 257, dtype=torch.float32), normal(300, 257, seed=1, dtype=torch.float32)
    found = []
    for count in (1, 2):
        h = torch.empty_like(a)
        with threads(count):
            activation(a, None, b, None, h, "gelu")
        found.append(h)
    assert torch.equal(*found)
