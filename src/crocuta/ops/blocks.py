"""Time cut into blocks, and Toeplitz matrices, so that causal filters become matrix products.

A sequence [b l d] with d = g·r channels in g groups becomes [g, r·b·m, c]: one matrix a group, whose rows are the
m blocks of c consecutive inputs. With time contiguous in memory and c dividing l this is a view.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def own_positions(lengths: Int[Tensor, " b"], length: int, device: torch.device) -> Bool[Tensor, "b l"]:
    """True at the first ``lengths[row]`` of ``length`` positions: what is a row's own, and no padding."""
    return torch.arange(length, device=device) < lengths.to(device)[:, None]


def channels_first(u: Float[Tensor, "b l d"], dtype: torch.dtype) -> Float[Tensor, "d b l"]:
    """The same values with time contiguous, in ``dtype``; free when the memory already is [d b l]."""
    b, l, d = u.shape
    first = u.permute(2, 0, 1).to(dtype)
    if first.is_contiguous():
        return first
    matrix = first.permute(1, 2, 0).reshape(b * l, d)  # matrices are what torch transposes by tiles
    return matrix.t().contiguous().view(d, b, l)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that filters, states and their sums use: never below float32."""
    return torch.promote_types(dtype, torch.float32)


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Turns autocast off inside ``function``: under it a bmm of float32 tensors would be done in bfloat16."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next(a.device.type for a in args if isinstance(a, Tensor))
        if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return run


def pad_to_blocks(u: Float[Tensor, "d b l"], block: int) -> Float[Tensor, "d b m c"]:
    """Cut time into blocks; the last one is filled with zeros."""
    d, b, l = u.shape
    count = -(-l // block)
    if l == count * block:  # F.pad copies even where it adds nothing
        return u.reshape(d, b, count, block)
    return F.pad(u, (0, count * block - l)).view(d, b, count, block)


def toeplitz(taps: Float[Tensor, "g c"]) -> Float[Tensor, "g c c"]:
    """T[i, j] = taps[j - i] for j >= i, else 0, so that (row of inputs) @ T is their causal convolution."""
    c = taps.shape[1]
    padded = F.pad(taps, (c - 1, 0))
    return padded.unfold(1, c, 1).flip(1)


def toeplitz_adjoint(matrix: Float[Tensor, "g c c"]) -> Float[Tensor, "g c"]:
    """Adjoint of ``toeplitz``: the sums of the upper diagonals, read as columns of a skewed view."""
    g, c, _ = matrix.shape
    rows = F.pad(matrix, (0, c))
    return rows.as_strided((g, c, c), (2 * c * c, 2 * c + 1, 1)).sum(1)
