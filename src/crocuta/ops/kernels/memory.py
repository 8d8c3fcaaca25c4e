"""Memory of large results on a CPU, kept for the next ones (cpp/memory.cpp).

torch gives the memory of a large tensor back to the system when the tensor is gone, and the next one gets fresh pages,
each with a fault that sets it to zero: 8 MB cost 1 to 25 ms, more than most kernels. What kernels and products write
here stays with the process instead: never more, together with what is in use, than was in use at one time, and the
system may take it when it is short of memory.
"""

from __future__ import annotations

import ctypes
import functools
import math
from typing import Any

import torch
from torch import Tensor

from crocuta.ops.kernels.library import library

LARGE = 1 << 21
"""Bytes from which a tensor is worth it: a large page."""
_PLAIN = (Tensor, torch.nn.Parameter)
_CODES = {torch.float32: (2, 32), torch.float64: (2, 64), torch.bfloat16: (4, 16), torch.uint8: (1, 8)}
"""The kind and the bits of a number as DLPack has them."""


def empty(like: Tensor, *shape: Any, dtype: torch.dtype | None = None) -> Tensor:
    """``like.new_empty(shape)``; in kept memory where it is large, on a CPU, and there is the library."""
    dtype = like.dtype if dtype is None else dtype
    plain = type(like) in _PLAIN  # first of all: what traces a graph has symbols for sizes, and compares none
    if plain and math.prod(shape) * dtype.itemsize >= LARGE and like.device.type == "cpu" and dtype in _CODES:
        opened = library()
        if opened is not None and not _filled():
            array = opened.memory_array(*_CODES[dtype], len(shape), (ctypes.c_int64 * len(shape))(*shape))
            if array:  # else torch says best how much memory there is not
                return torch.utils.dlpack.from_dlpack(_capsule()(array, b"dltensor", None))
    return like.new_empty(shape, dtype=dtype)


def release() -> int:
    """Give what no tensor uses back to the system; how many bytes that were."""
    opened = library()
    return 0 if opened is None else opened.memory_release()


def _filled() -> bool:
    """Whether new tensors are to hold NaN."""
    return torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]


@functools.cache
def _capsule():
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return new
