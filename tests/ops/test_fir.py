"""Short and medium FIR, and the fused gate, against direct convolution in float64."""

from __future__ import annotations

import pytest
import torch
from kernel_paths import COMPILED, TORCH

from crocuta.ops import reference
from crocuta.ops.fir import fir, next_tail
from crocuta.ops.gate import fir_gate


@pytest.fixture(autouse=True, params=[COMPILED, TORCH])
def path(request):
    """Every test with the compiled kernels, and without."""
    with request.param():
        yield


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("taps", [1, 2, 3, 7, 33, 40])
@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 70])
@pytest.mark.parametrize("with_tail", [True, False])
def test_fir_is_the_direct_convolution(taps, length, with_tail):
    u, h, bias = randn(2, length, 4), randn(2, taps, seed=1), randn(4, seed=2)
    tail = randn(2, taps - 1, 4, seed=3) if with_tail else None
    expected = reference.causal_convolution(u, h, tail) + bias
    torch.testing.assert_close(fir(u, h, bias, tail), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("taps", "length"), [(1, 3), (3, 1), (3, 9), (7, 40), (5, 2)])
def test_gradients(taps, length):
    inputs = tuple(t.requires_grad_() for t in (randn(2, length, 4), randn(2, taps), randn(4), randn(2, taps - 1, 4)))
    assert torch.autograd.gradcheck(fir, inputs)
    assert torch.autograd.gradcheck(lambda u, h: fir(u, h), inputs[:2])


@pytest.mark.parametrize("length", [1, 2, 5])
def test_tail_of_ragged_rows(length):
    u, tail = randn(3, length, 2), randn(3, 3, 2, seed=1)
    lengths = torch.tensor([0, 1, length])
    ragged = next_tail(u, tail, lengths)
    for row, n in enumerate(lengths.tolist()):
        alone = torch.cat([tail[row], u[row, :n]])[-3:]
        assert torch.equal(ragged[row], alone)
    assert torch.equal(next_tail(u, tail), next_tail(u, tail, torch.full((3,), length)))


@pytest.mark.parametrize("length", [1, 2, 33])
def test_fir_gate_is_fir_split_and_product(length):
    z, taps, bias, tail = randn(2, length, 6), randn(6, 3, seed=1), randn(6, seed=2), randn(2, 2, 6, seed=3)
    x2, x1, v = (reference.causal_convolution(z, taps, tail) + bias).chunk(3, dim=-1)
    torch.testing.assert_close(fir_gate(z, taps, bias, tail), (x2, x1 * v), rtol=1e-11, atol=1e-11)


def test_fir_gate_gradients():
    inputs = tuple(t.requires_grad_() for t in (randn(2, 5, 6), randn(6, 3), randn(6), randn(2, 2, 6)))
    assert torch.autograd.gradcheck(fir_gate, inputs)
    assert torch.autograd.gradcheck(lambda z, h: fir_gate(z, h), inputs[:2])


def test_bf16_is_accumulated_in_float32():
    """256 equal inputs sum exactly in float32 and stick at 256 · 0.5 only there: bf16 sums would stop at 128."""
    u, taps = torch.full((1, 600, 1), 0.5, dtype=torch.bfloat16), torch.ones(1, 512)
    assert fir(u, taps)[0, -1, 0] == 256.0
