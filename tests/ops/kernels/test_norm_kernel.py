"""The compiled norms with their residual against the reference in float64: values, gradients, odd sizes, threads."""

import pytest
import torch
from compiled import each_isa, needs_library, on, poisoned, relative_error, threads

from crocuta.ops import reference
from crocuta.ops.kernels.norm import Norm
from crocuta.ops.norm import add_layer_norm, add_rms_norm

pytestmark = needs_library
WIDE = pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 5e-7), (torch.float64, 1e-14)])
KINDS = pytest.mark.parametrize("kind", list(Norm))


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def ours(kind, x, y, scale, bias, eps):
    if kind is Norm.LAYER:
        return add_layer_norm(x, y, scale, bias, eps)
    return add_rms_norm(x, y, scale, eps, eps_inside_root=kind is Norm.RMS_INSIDE)


def formula(kind, x, y, scale, bias, eps):
    s = x if y is None else x + y
    if kind is Norm.LAYER:
        return s, reference.layer_norm(s, scale, bias, eps)
    return s, reference.rms_norm(s, scale, eps, eps_inside_root=kind is Norm.RMS_INSIDE)


def run(function, kind, inputs, dtype, adds, weights):
    """The sum, the norm and all gradients; the sum is used further only where something was added."""
    leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in inputs]
    x, y, scale, bias = leaves
    s, n = function(kind, x, y if adds else None, scale, bias, 1e-3)
    loss = (n * weights[0].to(dtype)).sum() + (s * weights[1].to(dtype)).sum()
    used = [x, *([y] if adds else []), scale, *([bias] if kind is Norm.LAYER else [])]
    return s, n, *torch.autograd.grad(loss, used)


@each_isa
@KINDS
@WIDE
@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("shape", [(1, 2), (3, 1, 7), (2, 5, 64), (70, 301), (2, 65, 33)])
def test_values_and_gradients(isa, kind, dtype, bound, adds, shape):
    d = shape[-1]
    inputs = normal(*shape) + 0.5, normal(*shape, seed=1), normal(d, seed=2), normal(d, seed=3)
    weights = normal(*shape, seed=4), normal(*shape, seed=5)
    inputs, weights = [[t.to(dtype) for t in group] for group in (inputs, weights)]
    expected = run(formula, kind, inputs, torch.float64, adds, weights)
    with on(isa), poisoned():
        found = run(ours, kind, inputs, dtype, adds, weights)
    for mine, true in zip(found, expected, strict=True):
        assert relative_error(mine, true) < bound


@each_isa
@KINDS
def test_strided_rows_and_a_zero_row(isa, kind):
    wide = normal(2, 6, 66, dtype=torch.float32)
    wide[0, 0] = 0
    rows = wide[:, ::2, :33].detach().requires_grad_()
    scale, bias = normal(33, seed=2, dtype=torch.float32), normal(33, seed=3, dtype=torch.float32)
    with on(isa):
        _, n = ours(kind, rows, None, scale, bias, 1e-6)
        n.sum().backward()
    assert relative_error(n, formula(kind, rows.double(), None, scale.double(), bias.double(), 1e-6)[1]) < 5e-7
    assert rows.grad.isfinite().all()


@KINDS
def test_threads_change_nothing(kind):
    inputs = normal(3, 301, 40), normal(3, 301, 40, seed=1), normal(40, seed=2), normal(40, seed=3)
    weights = normal(3, 301, 40, seed=4), normal(3, 301, 40, seed=5)
    found = []
    for count in (1, 2):
        with threads(count):
            found.append(run(ours, kind, inputs, torch.float32, True, weights))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@each_isa
def test_sums_over_many_rows_lose_nothing(isa):
    """Every term has the same sign: 64 rows are summed in float32, then float64 goes on."""
    x, bias = torch.full((400_000, 2), 0.1), torch.zeros(2, requires_grad=True)
    x[:, 1] = -0.1
    scale = torch.ones(2, requires_grad=True)
    dn = normal(*x.shape, dtype=torch.float32).abs()
    with on(isa):
        n = add_layer_norm(x, None, scale, bias, 1e-6)[1]
        n.backward(dn)
    assert relative_error(scale.grad, (dn.double() * n.double()).sum(0)) < 5e-7
    assert relative_error(bias.grad, dn.double().sum(0)) < 5e-7


@KINDS
def test_the_op_passes_the_checks_of_torch(kind):
    x, y, scale, bias = normal(3, 5), normal(3, 5, seed=1), normal(5, seed=2), normal(5, seed=3)
    leaves = [t.requires_grad_() for t in (x, y, scale)]
    of_layer = bias.requires_grad_() if kind is Norm.LAYER else None
    torch.library.opcheck(torch.ops.crocuta.add_norm.default, (*leaves, of_layer, 1e-3, int(kind)))
    torch.library.opcheck(torch.ops.crocuta.add_norm.default, (x, None, scale, of_layer, 1e-3, int(kind)))
    sums = lambda *tensors: [t for t in ours(kind, *tensors, bias, 1e-3)]  # noqa: E731
    assert torch.autograd.gradcheck(sums, leaves)
