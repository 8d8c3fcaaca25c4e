"""Whether the Triton kernels run here, and the layout of what they write: all that other modules know of them.

Ops have a CUDA implementation that imports the Triton module when it is first called; without Triton the ops
themselves never call it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from crocuta.ops.blocks import compute_dtype
from crocuta.ops.kernels import library, memory

DEVICE = "cuda"
"""The type of device whose tensors go to the Triton kernels."""

MOST_TAPS = 8
"""The longest FIR that the Triton kernels take."""


@library.constant_in_graphs  # a graph need not, and cannot, look at the machine
def why_not() -> str | None:
    """Why the Triton kernels do not run on this machine, or None where they do."""
    return library.why_switched_off() or _missing()


def runs_on(device: torch.device) -> bool:
    """Whether tensors of a device go to the Triton kernels."""
    return device.type == DEVICE and why_not() is None


def implement(ops: torch.library.Library, name: str, module: str, function: str) -> None:
    """Makes a function of ``crocuta.ops.kernels.triton`` the CUDA implementation of an op."""
    ops.impl(name, later(module, function), "CUDA")


def later(module: str, function: str) -> Callable[..., Any]:
    """A function of ``crocuta.ops.kernels.triton``, imported when it is first called."""

    def run(*arguments: Any) -> Any:
        return getattr(importlib.import_module(f"crocuta.ops.kernels.triton.{module}"), function)(*arguments)

    return run


def as_read(u: Tensor) -> Tensor:
    """u in a dtype that the kernels of its device read: any on a GPU, float32 or float64 on a CPU."""
    return u if runs_on(u.device) else u.to(compute_dtype(u.dtype))


def empty(u: Tensor, b: Any, l: Any, d: Any) -> Tensor:  # symbols, while a graph is traced
    """A tensor [b l d] of u's dtype, as the kernels of its device write it.

    On a CPU channels lie side by side. On a GPU time is contiguous, which products of matrices read and write for free.
    """
    return u.new_empty(d, b, l).permute(1, 2, 0) if runs_on(u.device) else memory.empty(u, b, l, d)


@functools.cache
def _missing() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device"
    if torch.version.hip is not None:
        return "not an NVIDIA device"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None
