"""What is printed and what the page says, from the plain objects of the result file: one line a goal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from _timing import mebibytes, table

Plain: TypeAlias = Mapping[str, Any]
"""A case of the result file, as ``Result.as_json`` makes it."""

HEADER = ("item", "case", "against", "figure (least to most)", "goal", "verdict")


def results_table(cases: Sequence[Plain], *, smoke: bool = False) -> str:
    """One row a goal, with the reason where there is no figure, and one a side that could not run."""
    return table(HEADER, [row for case in cases for row in rows(case, smoke=smoke)])


def rows(case: Plain, *, smoke: bool = False) -> list[tuple[str, ...]]:
    what = f"{case['name']}, tiny" if smoke else case["what"]
    found = []
    for goal in case["goals"]:
        item, against = goal["item"] or case["item"] or "", goal["against"]
        if against in case["absent"]:
            found.append((item, what, against, "", aim(goal), f"not run: {case['absent'][against]}"))
        elif goal["figure"] is None:
            found.append((item, what, against, "", aim(goal), f"{_WITHOUT_FIGURES[case['status']]}: {case['reason']}"))
        else:
            found.append((item, what, against, figure(goal), aim(goal), "smoke" if smoke else verdict(goal)))
    return found


_WITHOUT_FIGURES = {"red": "no speed", "not run": "not run", "failed": "failed", "measured": "not measured"}


def figure(goal: Plain) -> str:
    """Median, least and most over rounds; how many rounds where they are few."""
    ratio, rounds = goal["figure"], goal["rounds"]
    if goal["kind"] == "times the memory":
        return f"{number(ratio['median'])} x"
    few = "" if rounds > 2 else f", {rounds} round{'s' if rounds > 1 else ''}"
    return f"{number(ratio['median'])} x ({number(ratio['min'])} to {number(ratio['max'])}{few})"


def number(value: float) -> str:
    """Three digits."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def aim(goal: Plain) -> str:
    """The goal in words."""
    if goal["bound"] is None:
        return "none"
    sign = ">=" if goal["kind"] == "times faster" else "<="
    what = {"times faster": "", "times the cost": " cost", "times the memory": " memory"}[goal["kind"]]
    return f"{sign} {goal['bound']:,g} x{what}"


def verdict(goal: Plain) -> str:
    """Reached, or by which factor it was missed."""
    if goal["reached"] is None:
        return ""
    return "reached" if goal["reached"] else f"missed by a factor of {number(goal['missed_by'])}"


def errors_table(cases: Sequence[Plain]) -> str:
    """The gate: for each side the answer that is nearest to its bound."""
    lines = []
    for case in cases:
        nearest: dict[str, Plain] = {}
        for check in case["checks"]:
            if check["side"] not in nearest or _share(check) > _share(nearest[check["side"]]):
                nearest[check["side"]] = check
        for side, check in nearest.items():
            error = "not finite" if check["error"] is None else f"{check['error']:.1e}"
            lines.append((case["name"], side, check["answer"], error, f"{check['bound']:.0e}", _judged_at(case)))
    return table(("case", "side", "answer nearest to its bound", "error", "bound", "judged at"), lines)


def _share(check: Plain) -> float:
    """Of its bound."""
    if check["error"] is None:
        return math.inf
    return check["error"] / check["bound"] if check["bound"] else check["error"]


def _judged_at(case: Plain) -> str:
    length = case["gate_sizes"].get("length")
    return "" if length is None or length == case["sizes"].get("length") else f"{length:,} tokens"


def seconds_table(cases: Sequence[Plain]) -> str:
    """What one unit of work took each side: median CPU time, or peak memory."""
    lines = []
    for case in cases:
        for side, each in case["cpu_seconds"].items():
            lines.append((case["name"], side, seconds(median(each))))
        lines += [(case["name"], side, mebibytes(peak)) for side, peak in case["peak_bytes"].items()]
    return table(("case", "side", "median CPU time, or peak memory"), lines)


def median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def seconds(value: float) -> str:
    """With the unit that suits it."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-6:.3g} µs"


def summary(cases: Sequence[Plain]) -> str:
    """How many goals were reached, missed and not measured: one line."""
    goals = [goal for case in cases for goal in case["goals"] if goal["bound"] is not None]
    verdicts = [goal["reached"] for goal in goals]
    counts = (verdicts.count(True), verdicts.count(False), verdicts.count(None))
    return "{} goals: {} reached, {} missed, {} not measured".format(len(goals), *counts)


def crossover(cases: Sequence[Plain], prefix: str = "train_transformer/") -> str:
    """From which length on our training step is the faster one: where the ratio is 1, on logarithmic scales."""
    found = sorted(
        (case["sizes"]["length"], case["goals"][0]["figure"]["median"])
        for case in cases
        if case["name"].startswith(prefix) and case["status"] == "measured"
    )
    if len(found) < 2:
        return "The crossover with the Transformer was not measured."
    if found[0][1] >= 1:
        return f"Ours is faster than the Transformer from the shortest length measured on, {found[0][0]:,} tokens."
    for (short, low), (long, high) in zip(found, found[1:]):
        if low < 1 <= high:
            share = -math.log(low) / (math.log(high) - math.log(low))
            return f"The crossover with the Transformer is at about {short * (long / short) ** share:,.0f} tokens."
    return f"Up to {found[-1][0]:,} tokens the Transformer is faster."
