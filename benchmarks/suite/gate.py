"""Are the answers right? Before this is settled nobody looks at a clock."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from suite.task import Tensors


@dataclass(frozen=True)
class Check:
    """One answer of one side against the truth."""

    side: str
    answer: str
    error: float
    """‖a - b‖ / ‖b‖ in float64; inf for other shapes, missing answers and numbers that are not finite."""
    bound: float

    @property
    def holds(self) -> bool:
        return self.error <= self.bound


def judge(
    side: str, answers: Tensors, truth: Tensors, bounds: Mapping[str, float], required: Iterable[str] = ()
) -> list[Check]:
    """One check for each answer that the side gave, and a missed one for each ``required`` answer that it did not.

    An answer without a bound has the bound 0: nothing goes unchecked.
    """
    missing = [Check(side, name, math.inf, bound_of(name, bounds)) for name in required if name not in answers]
    if not answers and not missing:
        return [Check(side, "any answer", math.inf, 0.0)]
    return missing + [
        Check(side, name, _error(given, truth.get(name)), bound_of(name, bounds))
        for name, given in sorted(answers.items())
    ]


def bound_of(name: str, bounds: Mapping[str, float]) -> float:
    """The bound of the answer's own name, or else of the first pattern that fits it ("d*": every gradient)."""
    if name in bounds:
        return bounds[name]
    return next((bound for pattern, bound in bounds.items() if fnmatchcase(name, pattern)), 0.0)


def _error(given: Tensor, truth: Tensor | None) -> float:
    if truth is None or given.shape != truth.shape:
        return math.inf
    if given.is_complex() or truth.is_complex():
        given, truth = torch.view_as_real(given), torch.view_as_real(truth)
    difference = (given.double() - truth.double()).norm()
    size = truth.double().norm()
    error = float(difference / size) if size > 0 else float(difference)
    return error if math.isfinite(error) else math.inf
