"""Products of matrices by oneDNN, where it is the fast one: the numbers of float64, whatever lies where."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import crocuta.ops.products as module
from crocuta.ops.kernels.library import library, switched_off, why_not
from crocuta.ops.linear import linear
from crocuta.ops.mlp import Affine, mlp
from crocuta.ops.products import accumulate, multiply, onednn_is_faster

SHAPES = [(1, 5, 3), (5, 1, 3), (5, 3, 1), (1300, 7, 9), (7, 1300, 9), (9, 7, 1300), (512, 512, 8), (513, 1025, 3)]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def by_onednn(monkeypatch):
    """Everything in float32 is multiplied by oneDNN, on any maker's processor; the list counts its calls."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    calls: list[tuple[int, ...]] = []
    product = module._onednn
    monkeypatch.setattr(module, "WORTH", 0)
    monkeypatch.setattr(module, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(module, "_onednn", lambda a, b, bias: calls.append(tuple(a.shape)) or product(a, b, bias))
    return calls


def layouts(t: Tensor) -> list[Tensor]:
    """Views of the same numbers: rows, columns, gaps full of NaN after rows, between numbers, and after columns."""
    gaps = torch.full((t.shape[0], 2 * t.shape[1] + 3), torch.nan)
    apart = torch.full((t.shape[0], 3 * t.shape[1]), torch.nan)
    gaps[:, : t.shape[1]] = t
    apart[:, 1::3] = t
    return [
        t,
        t.t().contiguous().t(),
        gaps[:, : t.shape[1]],
        apart[:, 1::3],
        gaps.t().contiguous().t()[:, : t.shape[1]],
    ]


def agree(found: Tensor, expected: Tensor, size: float) -> None:
    """Relative to what was added up: a sum may be near zero."""
    assert (found.double() - expected).abs().max() <= 1e-6 * size


@pytest.mark.parametrize("shape", SHAPES)
def test_products_and_sums(shape, by_onednn):
    m, k, n = shape
    a, b, c, bias = randn(m, k), randn(k, n, seed=1), randn(m, n, seed=2), randn(n, seed=3)
    exact, size = a.double() @ b.double(), 4 * (k**0.5 + 4)
    for x, (y, out) in itertools.product(layouts(a), zip(layouts(b), layouts(torch.full((m, n), torch.nan))[::-1])):
        assert multiply(x, y, out=out) is out
        agree(out, exact, size)
        agree(multiply(x, y, out=out, bias=bias), exact + bias.double(), size)
        out.copy_(c)
        assert accumulate(x, y, out=out) is out
        agree(out, exact + c.double(), size)
    assert by_onednn


def test_turns_are_of_what_is_long(by_onednn):
    out = torch.empty(8, 6)
    multiply(randn(1100, 8).t(), randn(1100, 6), out=out)
    accumulate(randn(1100, 8).t(), randn(1100, 6), out=out)
    assert by_onednn == 2 * [(8, 512), (8, 512), (8, 76)]
    by_onednn.clear()
    multiply(randn(1100, 8), randn(8, 6), out=torch.empty(1100, 6))
    accumulate(randn(1100, 8), randn(8, 6), out=torch.empty(1100, 6))
    assert by_onednn == 2 * [(512, 8), (512, 8), (76, 8)]


def test_what_lies_beside_is_not_touched(by_onednn):
    around = torch.zeros(6, 9)
    multiply(randn(4, 3), randn(3, 5, seed=1), out=around[1:5, 2:7])
    assert torch.equal(around[0], torch.zeros(9))
    assert torch.equal(around[5], torch.zeros(9))
    assert not around[:, :2].any()
    assert not around[:, 7:].any()
    assert by_onednn


def test_not_a_number_stays_where_it_is(by_onednn):
    a, b = randn(600, 8), randn(8, 6, seed=1)
    a[500, 3], b[2, 4] = torch.nan, torch.inf
    out = multiply(a, b, out=torch.empty(600, 6))
    expected = a @ b
    assert torch.equal(out.isfinite(), expected.isfinite())
    assert torch.equal(out.isnan(), expected.isnan())
    assert by_onednn


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_bits_again(threads, by_onednn):
    a, b = randn(1100, 96), randn(96, 80, seed=1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = [multiply(x, b, out=torch.empty(len(x), 80)) for x in (a, a.clone(), a.clone())]
        sums = [multiply(a.t(), found[0], out=torch.empty(96, 80)) for _ in range(3)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(each, found[0]) for each in found)
    assert all(torch.equal(each, sums[0]) for each in sums)
    assert by_onednn


@pytest.mark.parametrize("biased", [True, False])
def test_layers_and_their_gradients(biased, by_onednn):
    if library() is None:
        pytest.skip(f"linear layers are torch's own without the library: {why_not()}")
    x = randn(700, 24)
    up, down = (
        Affine(randn(*s, seed=i) / 5, randn(s[0], seed=i + 9) if biased else None)
        for i, s in ((1, (40, 24)), (2, (24, 40)))
    )
    gate = Affine(randn(40, 24, seed=3) / 5, randn(40, seed=4) if biased else None)

    def run(dtype: torch.dtype) -> list[Tensor]:
        given = [None if t is None else t.to(dtype).requires_grad_() for t in (x, *gate, *up, *down)]
        x_, g, gb, u, ub, d, db = given
        y = linear(mlp(x_, Affine(g, gb), Affine(u, ub), Affine(d, db), "silu"), u, ub)
        leaves = [t for t in given if t is not None]
        return [y, *torch.autograd.grad(y.sin().sum(), leaves)]

    found = run(torch.float32)
    assert len(by_onednn) >= 12, "MLP and linear layer, forward and backward"
    for mine, exact in zip(found, run(torch.float64)):
        assert (mine.double() - exact).norm() <= 1e-5 * exact.norm()


def test_only_where_mkl_is_slow(monkeypatch):
    if library() is None:
        pytest.skip(f"nothing says whose the processor is: {why_not()}")
    opened = library()
    for intel, isa, expected in (
        (False, "avx512", True),
        (True, "avx512", False),
        (False, "avx2", False),
        (False, "base", False),
    ):
        monkeypatch.setattr(opened, "intel", intel)
        monkeypatch.setattr(opened, "isa", isa)
        assert onednn_is_faster() == (expected and torch.backends.mkldnn.is_available())
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
        assert not onednn_is_faster()
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", True)
        with switched_off():
            assert not onednn_is_faster()


def test_small_products_and_other_dtypes_are_mkls(by_onednn, monkeypatch):
    monkeypatch.setattr(module, "WORTH", 60)
    multiply(randn(4, 3), randn(3, 5), out=torch.empty(4, 5))
    assert by_onednn == [(4, 3)]
    multiply(randn(4, 3), randn(3, 4), out=torch.empty(4, 4))
    for dtype in (torch.float64, torch.bfloat16):
        multiply(randn(4, 3).to(dtype), randn(3, 5).to(dtype), out=torch.empty(4, 5, dtype=dtype))
        for a, b in ((randn(4, 3).to(dtype), randn(3, 5)), (randn(4, 3), randn(3, 5).to(dtype))):
            with pytest.raises(RuntimeError, match="dtype"):
                multiply(a, b, out=torch.empty(4, 5))
    assert by_onednn == [(4, 3)]


def test_the_maker_is_the_systems():
    opened = library()
    if opened is None:
        pytest.skip(f"no library to ask: {why_not()}")
    try:
        with open("/proc/cpuinfo", encoding="ascii") as file:
            makers = {line.split(":")[1].strip() for line in file if line.startswith("vendor_id")}
    except OSError:
        makers = set()
    if not makers:
        pytest.skip("the system does not say who made the processor")
    assert opened.intel == (makers == {"GenuineIntel"})
