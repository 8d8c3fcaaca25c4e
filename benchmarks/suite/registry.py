"""All cases, in the order of the P-list."""

from __future__ import annotations

from fnmatch import fnmatch

from suite.case import Case
from suite.cases import decoding, growth, models, operators, practice

P_ITEMS = tuple(f"P{number}" for number in range(1, 15))
"""What the suite must measure; see docs/benchmarks.md."""


def _in_order(cases: list[Case]) -> tuple[Case, ...]:
    """By item, those without one last; as listed among equals."""
    return tuple(sorted(cases, key=lambda case: P_ITEMS.index(case.item) if case.item else len(P_ITEMS)))


CASES = _in_order([*operators.CASES, *models.CASES, *decoding.CASES, *growth.CASES, *practice.CASES])


def selected(pattern: str | None) -> list[Case]:
    """Cases whose name or item fits one of the comma-separated globs."""
    if pattern is None:
        return list(CASES)
    wanted = [part.strip() for part in pattern.split(",")]
    return [case for case in CASES if any(fnmatch(case.name, one) or case.item == one for one in wanted)]
