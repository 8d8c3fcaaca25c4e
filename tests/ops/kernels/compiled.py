"""What the tests of compiled kernels share: when to skip, memory full of NaN, every instruction set."""

import contextlib
from collections.abc import Iterator

import pytest
import torch

from crocuta.ops.kernels.library import INSTRUCTION_SETS, library, limited_to, why_not

needs_library = pytest.mark.skipif(library() is None, reason=why_not() or "")

_best = library()
ISAS = [] if _best is None else list(INSTRUCTION_SETS[: INSTRUCTION_SETS.index(_best.isa) + 1])
"""What this machine runs."""

each_isa = pytest.mark.parametrize("isa", ISAS or ["none"])


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """New memory of torch's is full of NaN: an output that is not written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def on(isa: str) -> contextlib.AbstractContextManager[None]:
    """That instruction set for a while."""
    return limited_to(isa)


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """‖value - truth‖ / ‖truth‖ in float64; 0 for two empty tensors, NaN where a value is NaN."""
    assert value.shape == truth.shape
    value, truth = value.detach(), truth.detach()
    difference = (value.double() - truth.double()).norm()
    return float(difference / truth.double().norm().clamp(min=1e-30))
