"""The words of the suite: a case is one item of work, with its sides, its gate and its goals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

OURS, PEERS = "ours", "peers"
"""The two environments: ``.venv`` of the library, ``.venv-peers`` of the others."""

Allocator = Literal["default", "tuned"]


@dataclass(frozen=True, kw_only=True)
class Side:
    """One way to do the work of a case, in a process of its own."""

    name: str
    task: str
    """``module:function`` below ``suite``; the function makes a ``Task`` of the inputs and settings."""
    environment: Literal["ours", "peers"] = PEERS
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Choices of this side, over those of the case."""
    bounds: Mapping[str, float] = field(default_factory=dict)
    """Error bounds of this side's answers, over those of the gate."""
    reference: Side | None = None
    """What gives the truth for this side alone, where it computes another function than ours."""


@dataclass(frozen=True, kw_only=True)
class Gate:
    """What must hold before any speed is reported: ‖a - truth‖ / ‖truth‖ of every answer within its bound.

    Ours must give every answer that has a bound; a peer may give fewer (no state), but one at least.
    """

    bounds: Mapping[str, float]
    truth: str | None = None
    """``module:function`` below ``suite``, from the formula in float64; None: ``reference``, or else our answers."""
    reference: Side | None = None
    """A side in float64 that gives the truth."""
    sizes: Mapping[str, Any] = field(default_factory=dict)
    """Smaller sizes for the comparison, where the case's own would take hours; the report says so."""


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A ratio between our side and another one."""

    against: str
    """Name of the other side."""
    bound: float | None
    """None: there is no goal, the ratio is reported."""
    kind: Literal["times faster", "times the cost", "times the memory"] = "times faster"
    """``times faster``: theirs / ours, at least ``bound``. The others: ours / theirs, at most ``bound``."""
    item: str | None = None
    """Its item of the P-list, if it is not the case's."""

    def reached(self, figure: float) -> bool | None:
        """None where there is no goal."""
        if self.bound is None:
            return None
        return figure >= self.bound if self.kind == "times faster" else figure <= self.bound


@dataclass(frozen=True, kw_only=True)
class Case:
    """One item of work."""

    name: str
    item: str | None
    """Of the P-list: "P1" .. "P14"; None for the cases without a goal."""
    what: str
    """A sentence for the table."""
    inputs: str
    """``module:function`` below ``suite``: sizes to tensors, in the parent, alike for all sides."""
    sides: tuple[Side, ...]
    """Ours first."""
    gate: Gate
    goals: tuple[Goal, ...]
    sizes: Mapping[str, Any] = field(default_factory=dict)
    smoke: Mapping[str, Any] = field(default_factory=dict)
    """Sizes that take milliseconds; the ratios mean nothing."""
    rounds: int = 5
    least_rounds: int = 3
    """1 only where one round takes minutes."""
    seconds: float = 120.0
    """CPU time after which no round is begun beyond ``least_rounds``."""
    memory: bool = False
    """Peak memory of each side in a fresh process, instead of time."""
    allocator: Allocator = "default"
    """tuned: glibc keeps and reuses freed pages, so that nobody pays for page faults."""

    @property
    def ours(self) -> Side:
        return self.sides[0]

    def side(self, name: str) -> Side:
        return next(side for side in self.sides if side.name == name)
