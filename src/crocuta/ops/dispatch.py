"""Which implementation of an op runs, and why not the others. ``TABLE`` is the thing to edit to add one.

What it cannot know is how tensors lie in memory: ``fir``, ``fir_gate`` and ``fft_convolution`` themselves hand
channels-last input to their compiled kernel (``kernels.library.runs_here``), ``fir_gate`` also to the one in Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from crocuta.errors import KernelUnavailableError
from crocuta.ops.kernels import gpu
from crocuta.ops.kernels.library import why_not


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of an op, described without tensors, so that ``inspect`` can ask from a configuration alone."""

    op: str
    length: int
    """New tokens of the call."""
    taps: int = 0
    """Length of the kernel that reaches them."""
    continued: bool = False
    """Whether earlier tokens of the sequence, read by earlier calls, reach them too."""
    sizes: tuple[int, ...] = ()
    """Sides of the matrix that multiplies them."""
    device: str = "cpu"
    """Type of the device that the tensors are on."""
    capability: tuple[int, int] | None = None
    """CUDA compute capability of an NVIDIA device; None on every other device."""
    float64: bool = False
    """Whether sums are due in float64."""


@dataclass(frozen=True)
class Kernel:
    """A named implementation; ``rejects`` gives the reason why it should not take a case, or None."""

    name: str
    rejects: Callable[[Case], str | None]


def _never(case: Case) -> None:  # noqa: ARG001
    return None


def _when(holds: Callable[[Case], bool], reason: str) -> Callable[[Case], str | None]:
    return lambda case: None if holds(case) else reason


def _rejects_compiled(case: Case) -> str | None:
    return why_not() if case.device == "cpu" else "not on a CPU"


def _rejects_triton(case: Case) -> str | None:
    return gpu.why_not() if case.device == gpu.DEVICE else "not on a CUDA device"


def _rejects_triton_operator(case: Case) -> str | None:
    few = case.length <= RECURRENT
    return _rejects_triton(case) or ("a recurrence is faster for few tokens" if few else None)


def _rejects_fused_transform(case: Case) -> str | None:
    return "earlier tokens reach these" if case.continued else _rejects_compiled(case)


def _rejects_scaled_mm(case: Case) -> str | None:
    if case.capability is None:
        return "not on an NVIDIA device"
    if case.capability < (8, 9):
        return f"compute capability {case.capability[0]}.{case.capability[1]} is below 8.9"
    if any(size % 16 for size in case.sizes):
        return f"sides {case.sizes} are not multiples of 16"
    return "adds up in float32, not in float64" if case.float64 else None


RECURRENT = 4
"""The most tokens at once that modal filters read one after the other."""

# Limits measured on two CPU cores, see docs/decisions.md.
TABLE: dict[str, tuple[Kernel, ...]] = {
    "hyena_modal": (
        Kernel("fused", _rejects_compiled),
        Kernel("triton", _rejects_triton_operator),
        Kernel("composed", _never),
    ),
    "hyena_fir": (Kernel("fused", _rejects_compiled), Kernel("composed", _never)),
    "hyena_long": (Kernel("fused", _rejects_fused_transform), Kernel("composed", _never)),
    "modal": (
        Kernel("recurrent", _when(lambda c: c.length <= RECURRENT, "more than 4 tokens: another is faster")),
        Kernel("compiled", _rejects_compiled),
        Kernel("triton", _rejects_triton),
        Kernel("chunked", _never),
    ),
    "fir": (
        Kernel("toeplitz", _when(lambda c: c.taps <= 512, "more than 512 taps: a transform is faster")),
        Kernel("fft", _when(lambda c: not c.continued, "earlier tokens reach these")),
        Kernel("online", _never),
    ),
    "long_convolution": (
        Kernel("fft", _when(lambda c: not c.continued, "earlier tokens reach these")),
        Kernel("online", _never),
    ),
    "fp8_linear": (Kernel("scaled_mm", _rejects_scaled_mm), Kernel("dequantised", _never)),
}


def choose(case: Case) -> Kernel:
    """The first kernel of the table that does not reject the case."""
    for kernel in TABLE[case.op]:
        if kernel.rejects(case) is None:
            return kernel
    raise KernelUnavailableError(f"no kernel of {case.op} can run", given=case, expected="; ".join(reasons(case)))


def reasons(case: Case) -> list[str]:
    """A line a kernel: its name, and that it takes the case or why it does not."""
    return [f"{kernel.name}: {kernel.rejects(case) or 'takes it'}" for kernel in TABLE[case.op]]
