"""What the launchers share: layouts, and how precisely matrices are multiplied."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor


def columns_of(u: Tensor) -> Tensor:
    """[b l d] with time contiguous; a tensor that is laid out so stays as it is."""
    return u if u.stride(1) == 1 else u.permute(2, 0, 1).contiguous().permute(1, 2, 0)


def sums_of(dtype: torch.dtype) -> tl.dtype:
    """The dtype of sums and states."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def precision(dtype: torch.dtype) -> str:
    """How operands are multiplied: as they are, or for inputs of 16 bits as sums of two bfloat16, on tensor cores.

    Two bfloat16 keep 16 bits of a power or of a state: they round 256 times less than bfloat16 inputs and outputs do.
    TF32, which would keep 11 bits of float32 inputs, is never used.
    """
    return "ieee" if dtype in (torch.float32, torch.float64) else "bf16x3"
