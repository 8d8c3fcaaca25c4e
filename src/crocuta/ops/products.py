"""Products of matrices on a CPU, by the library that is fast there.

torch multiplies float32 by MKL, which uses AVX-512 on Intel's processors alone: on an AMD EPYC that has it, it takes
twice the time of oneDNN, which comes with torch too. oneDNN hands out tensors of its own, so it gets a few rows at a
time, and what it returns is copied while it is in the cache.
"""

from __future__ import annotations

import functools

import torch
from jaxtyping import Float
from torch import Tensor

from crocuta.ops.kernels.library import constant_in_graphs, library
from crocuta.ops.turns import turns

WORTH = 1 << 21
"""Multiplications from which oneDNN's longer way to the first of them pays."""
_ROWS = 512


def multiply(
    a: Float[Tensor, "m k"], b: Float[Tensor, "k n"], *, out: Float[Tensor, "m n"], bias: Tensor | None = None
) -> Float[Tensor, "m n"]:
    """a b + bias, written to ``out``; of any strides, without gradients."""
    if faster_by_onednn(a, b):
        return multiply_by_onednn(a, b, out=out, bias=bias)
    return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)


def multiply_by_onednn(a: Tensor, b: Tensor, *, out: Tensor, bias: Tensor | None = None) -> Tensor:
    """``multiply`` in float32, whatever the machine."""
    if _lies_transposed(a):
        _sum_of_turns(a, b, out, begun=False)
        return out if bias is None else out.add_(bias)
    for rows in turns(len(a), _ROWS):
        out[rows] = _onednn(a[rows], b, bias)
    return out


def product(a: Float[Tensor, "m k"], b: Float[Tensor, "k n"]) -> Float[Tensor, "m n"]:
    """``multiply`` into a new tensor."""
    return multiply(a, b, out=a.new_empty(len(a), b.shape[1]))


def accumulate(a: Float[Tensor, "m k"], b: Float[Tensor, "k n"], *, out: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
    """out += a b, of any strides, without gradients."""
    if not faster_by_onednn(a, b):
        return out.addmm_(a, b)
    if _lies_transposed(a):
        _sum_of_turns(a, b, out, begun=True)
    else:
        for rows in turns(len(a), _ROWS):
            out[rows] += _onednn(a[rows], b, None)
    return out


def faster_by_onednn(a: Float[Tensor, "*m k"], b: Float[Tensor, "k n"]) -> bool:
    """Whether MKL would be slow for a b, float32 on this CPU, and there is enough to multiply."""
    if a.dtype != torch.float32 or b.dtype != torch.float32 or a.device.type != "cpu":
        return False
    return a.numel() * b.shape[1] >= WORTH and onednn_is_faster()


@constant_in_graphs
def onednn_is_faster() -> bool:
    """Whether this CPU has AVX-512, is not Intel's, and torch has oneDNN, switched on."""
    opened = library()
    if opened is None or opened.isa != "avx512" or opened.intel:
        return False
    return bool(torch.backends.mkldnn.enabled) and _has_onednn()


@functools.cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _lies_transposed(a: Tensor) -> bool:
    """Whether few rows of ``a`` are all over its memory, as in the gradient of a weight, whose sum is over tokens."""
    return a.stride(1) != 1 and a.stride(0) == 1


def _sum_of_turns(a: Tensor, b: Tensor, out: Tensor, *, begun: bool) -> None:
    for inner in turns(len(b), _ROWS):
        part = _onednn(a[:, inner], b[inner], None)
        if begun:
            out.add_(part)
        else:
            out.copy_(part)
        begun = True


def _onednn(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")
