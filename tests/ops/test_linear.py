"""Products with weights, and sums, as ops of their own: the numbers of torch, and torch where the ops do not fit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import crocuta.ops.linear as module
from crocuta.ops.kernels.library import available, why_not
from crocuta.ops.linear import add, linear

GENERATOR = torch.Generator().manual_seed(5)


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64).to(dtype)


@pytest.fixture
def as_ops(monkeypatch):
    """Small tensors take the ops too."""
    if not available():
        pytest.skip(f"linear layers are torch's own without the library: {why_not()}")
    monkeypatch.setattr(module, "LARGE", 0)


class Seen(TorchDispatchMode):
    """The names of our ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "crocuta":
            self.names.add(op.name())
        return op(*args, **(kwargs or {}))


def ops_of(run) -> set[str]:
    with Seen() as seen:
        run()
    return seen.names


@pytest.mark.usefixtures("as_ops")
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", [(7, 6), (2, 3, 6), (1, 6), (2, 0, 6)])
def test_linear_is_that_of_torch(shape, biased):
    x, weight, bias = randn(*shape), randn(5, 6), randn(5) if biased else None
    leaves = [t.requires_grad_() for t in (x, weight, bias) if t is not None]
    found, expected = linear(x, weight, bias), F.linear(x, weight, bias)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    dy = randn(*shape[:-1], 5)
    for given in (dy, dy[..., :1].expand_as(dy), dy.flip(-1).transpose(0, -1).contiguous().transpose(0, -1)):
        mine = torch.autograd.grad(found, leaves, given, retain_graph=True)
        for a, b in zip(mine, torch.autograd.grad(expected, leaves, given, retain_graph=True)):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("as_ops")
def test_gradients_are_those_that_are_asked_for():
    for asked in range(1, 8):
        leaves = [randn(4, 3), randn(5, 3), randn(5)]
        wanted = [leaf.requires_grad_() for i, leaf in enumerate(leaves) if asked >> i & 1]
        expected = torch.autograd.grad(F.linear(*leaves).square().sum(), wanted)
        linear(*leaves).square().sum().backward()
        for leaf, gradient in zip(wanted, expected):
            torch.testing.assert_close(leaf.grad, gradient, rtol=1e-9, atol=1e-9)
        assert all((leaf.grad is not None) == leaf.requires_grad for leaf in leaves)


@pytest.mark.usefixtures("as_ops")
def test_opcheck():
    x, weight, bias = (t.requires_grad_() for t in (randn(4, 3), randn(5, 3), randn(5)))
    torch.library.opcheck(torch.ops.crocuta.linear.default, (x, weight, bias))
    torch.library.opcheck(torch.ops.crocuta.linear.default, (x, weight, None))
    torch.library.opcheck(
        torch.ops.crocuta.linear_backward.default, (randn(4, 5), x.detach(), weight.detach(), *[True] * 3)
    )
    torch.library.opcheck(torch.ops.crocuta.add.default, (x, randn(4, 3).requires_grad_()))


@pytest.mark.usefixtures("as_ops")
def test_what_the_op_cannot_do_is_torchs():
    x, weight, bias = randn(4, 3).float(), randn(5, 3).float(), randn(5).float()
    assert ops_of(lambda: linear(x, weight, bias)) == {"crocuta::linear"}
    narrow = [t.bfloat16() for t in (x, weight, bias)]
    assert not ops_of(lambda: linear(*narrow))
    assert linear(*narrow).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert not ops_of(lambda: linear(x, weight, bias))
        assert linear(x, weight, bias).dtype == torch.bfloat16
    assert linear(x.to("meta"), weight.to("meta")).shape == (4, 5)
    with pytest.raises(RuntimeError, match="dtype"):
        linear(x, weight.double())


def test_small_outputs_take_no_op():
    x, weight = randn(4, 3).float(), randn(5, 3).float()
    assert not ops_of(lambda: add(linear(x, weight), linear(x, weight)))


@pytest.mark.usefixtures("as_ops")
def test_sums():
    x, y = randn(2, 4, 3).requires_grad_(), randn(2, 4, 3).requires_grad_()
    assert ops_of(lambda: add(x, y)) == {"crocuta::add"}
    assert torch.equal(add(x, y), x + y)
    dx, dy = torch.autograd.grad((add(x, y) * x).sum(), [x, y])
    torch.testing.assert_close(dx, 2 * x + y, rtol=1e-12, atol=1e-12)
    assert torch.equal(dy, x)
    assert add(x.bfloat16(), y).dtype == torch.float64


def test_a_graph_holds_them_whole():
    """The ops alone: checks of shapes, which only tests have, are nothing for a graph."""
    x, weight, bias = (t.requires_grad_() for t in (randn(4, 3), randn(5, 3), randn(5)))
    ops = torch.ops.crocuta

    def both(x: Tensor) -> Tensor:
        return ops.add(ops.linear(x, weight, bias), x[:, :1].expand(4, 5).clone())

    run = torch.compile(both, backend="aot_eager", fullgraph=True)
    expected = F.linear(x, weight, bias) + x[:, :1]
    torch.testing.assert_close(run(x), expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(run(x).sin().sum(), [x, weight, bias]),
        torch.autograd.grad(expected.sin().sum(), [x, weight, bias]),
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
