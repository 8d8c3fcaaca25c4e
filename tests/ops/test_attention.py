"""Attention and RoPE against loops in float64."""

from __future__ import annotations

import pytest
import torch

from crocuta.ops import attention as attention_module
from crocuta.ops import reference
from crocuta.ops.attention import causal_attention
from crocuta.ops.rope import inverse_frequencies, rotate, rotation


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 9])
def test_whole_sequences(kv_heads, length):
    q, k, v = (
        randn(2, length, 4, 6),
        randn(2, length, kv_heads, 6, seed=1),
        randn(2, length, kv_heads, 6, seed=2),
    )
    expected = reference.attention(q, k, v, torch.zeros(2, dtype=torch.int64))
    torch.testing.assert_close(causal_attention(q, k, v, None), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("turn", [1 << 26, 20])
def test_rows_with_different_pasts_do_not_see_what_is_not_theirs(turn, monkeypatch):
    monkeypatch.setattr(attention_module, "_MASK_ELEMENTS", turn)
    q, k, v = randn(3, 2, 4, 6), randn(3, 9, 2, 6, seed=1), randn(3, 9, 2, 6, seed=2)
    starts = torch.tensor([0, 3, 7])
    expected = reference.attention(q, k, v, starts)
    k[0, 2:] = 1e6  # another row's length: must not matter
    v[0, 2:] = 1e6
    torch.testing.assert_close(causal_attention(q, k, v, starts), expected, rtol=1e-11, atol=1e-12)


def test_gradients():
    inputs = tuple(t.requires_grad_() for t in (randn(2, 3, 2, 4), randn(2, 5, 1, 4), randn(2, 5, 1, 4)))
    assert torch.autograd.gradcheck(lambda q, k, v: causal_attention(q, k, v, torch.tensor([2, 0])), inputs)


def test_rotation_is_the_halves_convention():
    x, positions, inverse = randn(2, 5, 3, 8), randn(2, 5, seed=1) * 10, randn(4, seed=2)
    expected = reference.rotate(x, positions, inverse)
    torch.testing.assert_close(rotate(x, *rotation(positions, inverse, x.dtype)), expected, rtol=1e-11, atol=1e-12)


def test_rotated_products_depend_on_distance_only():
    q, k = randn(1, 1, 1, 8), randn(1, 1, 1, 8, seed=1)
    inverse = inverse_frequencies(8, 10_000.0)

    def product(i, j):
        left = rotate(q, *rotation(torch.tensor([[float(i)]]), inverse, q.dtype))
        return (left * rotate(k, *rotation(torch.tensor([[float(j)]]), inverse, q.dtype))).sum()

    torch.testing.assert_close(product(7, 3), product(104, 100), rtol=1e-10, atol=1e-12)
    assert (product(7, 3) - product(7, 4)).abs() > 1e-3


def test_frequencies_are_the_published_formula():
    """To the four float32 roundings that its steps take; tests/checkpoints/test_golden.py has the bits."""
    expected = [10_000.0 ** (-2 * i / 16) for i in range(8)]
    torch.testing.assert_close(
        inverse_frequencies(16, 10_000.0).double(), torch.tensor(expected).double(), rtol=3e-7, atol=0
    )
