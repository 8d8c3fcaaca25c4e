"""What a worker runs: the one thing that ours and the peers' adapters have in common. Imports torch only."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

Tensors: TypeAlias = dict[str, Tensor]

Settings: TypeAlias = Mapping[str, Any]
"""Sizes of a case and choices of a side: what JSON can hold."""


@dataclass(frozen=True)
class Task:
    """One side of a case, ready to run: weights loaded, nothing computed ahead that the work includes."""

    run: Callable[[], object]
    """The work that is timed."""
    answers: Callable[[], Tensors]
    """What the work gives, by name, for the gate."""
    units: int = 1
    """Units of work in one run (tokens of a generation): figures are seconds a unit."""
    clock: Callable[[], float] = time.process_time
    """CPU seconds so far; another clock where the work happens in children of the process."""


MakeTask: TypeAlias = Callable[[Tensors, Settings], Task]
"""An adapter: (inputs, settings) -> task. It gets the tensors of the case for itself and may change them."""


class NotRun(Exception):  # noqa: N818
    """What a case asks for is not there; the text says what. The case is reported as not run, never as failed."""
