"""Attention and RoPE against loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from crocuta.ops import attention as attention_module
from crocuta.ops import reference
from crocuta.ops.attention import causal_attention, full_attention
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
    monkeypatch.setattr(attention_module, "MASK_ELEMENTS", turn)
    q, k, v = randn(3, 2, 4, 6), randn(3, 9, 2, 6, seed=1), randn(3, 9, 2, 6, seed=2)
    starts = torch.tensor([0, 3, 7])
    expected = reference.attention(q, k, v, starts)
    k[0, 2:] = 1e6  # another row's length: must not matter
    v[0, 2:] = 1e6
    torch.testing.assert_close(causal_attention(q, k, v, starts), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("starts", [[2, 0], [2, 2]])
def test_gradients(starts, monkeypatch):
    monkeypatch.setattr(attention_module, "_FEW", 0)
    inputs = tuple(t.requires_grad_() for t in (randn(2, 3, 2, 4), randn(2, 5, 1, 4), randn(2, 5, 1, 4)))
    assert torch.autograd.gradcheck(lambda q, k, v: causal_attention(q, k, v, torch.tensor(starts)), inputs)


# --- rows that begin at one position: no mask -------------------------------------------------------------------


@pytest.fixture(params=["flash", "plain"])
def unmasked(request, monkeypatch) -> None:
    """Both ways without a mask; the plain one in small turns and blocks, with ends that fit nothing."""
    if request.param == "plain":
        monkeypatch.setattr(attention_module, "_flash_operator", lambda q: None)
        monkeypatch.setattr(attention_module, "_KEYS", 5)
        monkeypatch.setattr(attention_module, "SCORES", 5 * 2 * 4 * 3)

    def fail(*_) -> None:
        raise AssertionError("a mask was made")

    monkeypatch.setattr(attention_module, "_masked", fail)


def past_and_chunk(first: int, length: int, heads: int, kv_heads: int, dtype=torch.float64):
    """q, k, v of two rows, keys and values in a longer buffer whose end is not a number, and the expected result."""
    q = randn(2, length, heads, 6).to(dtype)
    k, v = (randn(2, first + length + 5, kv_heads, 6, seed=seed).to(dtype) for seed in (1, 2))
    starts = torch.full((2,), first)
    expected = reference.attention(q.double(), k.double(), v.double(), starts)
    k[:, first + length :], v[:, first + length :] = torch.nan, torch.nan
    return q, k, v, starts, expected


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("first", "length"), [(0, 9), (1, 12), (13, 9), (23, 31)])
@pytest.mark.usefixtures("unmasked")
def test_a_chunk_on_its_past(kv_heads, first, length):
    q, k, v, starts, expected = past_and_chunk(first, length, 4, kv_heads)
    torch.testing.assert_close(causal_attention(q, k, v, starts), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("cast", [1 << 22, 2 * 2 * 6 * 4])
@pytest.mark.usefixtures("unmasked")
def test_keys_and_values_in_bfloat16(cast, monkeypatch):
    """Cast piece by piece, and only them: nothing else is rounded to bfloat16."""
    monkeypatch.setattr(attention_module, "_CAST", cast)
    q, k, v, starts, _ = past_and_chunk(13, 9, 4, 2)
    k, v = k.bfloat16(), v.bfloat16()
    expected = reference.attention(q, k.double(), v.double(), starts)
    torch.testing.assert_close(causal_attention(q, k, v, starts), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.usefixtures("unmasked")
def test_bfloat16_adds_up_in_float32(scale, monkeypatch):
    """Forty partial softmaxes, one a key of the past: rounded to bfloat16 at the end, and not forty times."""
    monkeypatch.setattr(attention_module, "_CAST", 1)
    q, k, v, starts, _ = past_and_chunk(40, 12, 4, 2, torch.bfloat16)
    expected = reference.attention((q * scale).double(), k.double(), v.double(), starts)
    y = causal_attention(q * scale, k.float(), v.float(), starts)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), expected, rtol=2**-7, atol=2**-8)


@pytest.mark.usefixtures("unmasked")
def test_autocast_does_not_reach_it():
    q, k, v, starts, expected = past_and_chunk(13, 9, 4, 2, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = causal_attention(q, k, v, starts)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [1, 8])
def test_a_few_queries_take_one_call(length, monkeypatch):
    monkeypatch.delattr(attention_module, "_unmasked")
    q, k, v, starts, expected = past_and_chunk(13, length, 4, 2)
    torch.testing.assert_close(causal_attention(q, k, v, starts), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("length", [0, 1, 9])
def test_a_buffer_that_ends_before_the_padding_does(length):
    """Of 12 queries ``length`` are real, and only their keys are there."""
    q, k, v, starts, expected = past_and_chunk(13, 12, 4, 2)
    y = causal_attention(q, k[:, : 13 + length], v[:, : 13 + length], starts)
    torch.testing.assert_close(y[:, :length], expected[:, :length], rtol=1e-11, atol=1e-12)
    assert torch.isfinite(y).all()


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation makes in memory of its own."""

    def __init__(self, *inputs: torch.Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("way", ["flash", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_grows_with_the_past(way, dtype, monkeypatch):
    """Neither a mask nor scores of [l, p], nor copies of the keys, however long the past and the buffer behind it."""
    monkeypatch.setattr(attention_module, "_CAST", 1 << 12)
    if way == "plain":
        monkeypatch.setattr(attention_module, "_flash_operator", lambda q: None)
        monkeypatch.setattr(attention_module, "_KEYS", 64)
        monkeypatch.setattr(attention_module, "SCORES", 1 << 13)
    elements = []
    for first in (64, 4_096):
        q, k = torch.randn(1, 64, 4, 8), torch.randn(1, 3 * first, 2, 8, dtype=dtype)
        with Largest(q, k) as largest:
            causal_attention(q, k, k, torch.tensor([first]))
        elements.append(largest.elements)
    assert elements[1] <= 1 << 13
    assert elements[1] <= max(2 * elements[0], 1 << 12)


# --- over whole sequences -----------------------------------------------------------------------------------------


def naive_full_attention(q, k, v, lengths: list[int]) -> torch.Tensor:
    """Every query of a row on the row's own keys, one score after the other."""
    y, group = torch.zeros_like(q), q.shape[2] // k.shape[2]
    for row, length in enumerate(lengths):
        for t in range(q.shape[1]):
            for head in range(q.shape[2]):
                scores = [float(q[row, t, head] @ k[row, s, head // group]) / q.shape[3] ** 0.5 for s in range(length)]
                total = sum(math.exp(score) for score in scores)
                for s, score in enumerate(scores):
                    y[row, t, head] += math.exp(score) / total * v[row, s, head // group]
    return y


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 9])
def test_full_attention_sees_the_whole_sequence(kv_heads, length):
    q, k, v = randn(2, length, 4, 6), randn(2, length, kv_heads, 6, seed=1), randn(2, length, kv_heads, 6, seed=2)
    expected = naive_full_attention(q, k, v, [length, length])
    torch.testing.assert_close(full_attention(q, k, v), expected, rtol=1e-11, atol=1e-12)
    all_of_them = torch.tensor([length, length])
    torch.testing.assert_close(full_attention(q, k, v, all_of_them), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_full_attention_of_rows_of_unequal_length(kv_heads):
    q, k, v = randn(3, 9, 4, 6), randn(3, 9, kv_heads, 6, seed=1), randn(3, 9, kv_heads, 6, seed=2)
    lengths = [9, 1, 5]
    expected = naive_full_attention(q, k, v, lengths)
    for row, length in enumerate(lengths):
        k[row, length:], v[row, length:] = 1e6, -1e6
    y = full_attention(q, k, v, torch.tensor(lengths))
    for row, length in enumerate(lengths):
        torch.testing.assert_close(y[row, :length], expected[row, :length], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("lengths", [None, [5, 2]])
def test_gradients_of_full_attention(lengths):
    inputs = tuple(t.requires_grad_() for t in (randn(2, 5, 2, 4), randn(2, 5, 1, 4), randn(2, 5, 1, 4, seed=1)))
    rows = None if lengths is None else torch.tensor(lengths)
    assert torch.autograd.gradcheck(lambda q, k, v: full_attention(q, k, v, rows), inputs)


def test_full_attention_in_bfloat16():
    q, k, v = (randn(2, 40, 2, 8, seed=seed).bfloat16() for seed in range(3))
    expected = naive_full_attention(q.double(), k.double(), v.double(), [40, 7])
    y = full_attention(q, k, v, torch.tensor([40, 7]))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double()[0], expected[0], rtol=2**-7, atol=2**-7)
    torch.testing.assert_close(y.double()[1, :7], expected[1, :7], rtol=2**-7, atol=2**-7)


# --- rotary positions ---------------------------------------------------------------------------------------------


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
