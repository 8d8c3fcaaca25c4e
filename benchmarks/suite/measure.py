"""One case, from inputs to figures: answers, gate, and only then rounds that alternate between the sides."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from _timing import Ratio, ratio
from safetensors.torch import save_file

from crocuta.errors import CrocutaError
from suite.case import Case, Goal, Side
from suite.gate import Check, judge
from suite.process import Process, Workers, python_of
from suite.task import NotRun, Tensors

ROUND_SECONDS = 0.2
"""A round of one side is at least so long: shorter ones are all clock."""
MOST_REPEATS = 2000

Status = Literal["measured", "red", "failed", "not run"]


@dataclass(frozen=True)
class Options:
    """How all cases of a run are measured."""

    threads: int = 1
    rounds: int | None = None
    """Instead of each case's own."""
    smoke: bool = False


@dataclass(frozen=True)
class Outcome:
    """A goal with what was measured."""

    goal: Goal
    figure: Ratio
    rounds: int

    @property
    def reached(self) -> bool | None:
        return self.goal.reached(self.figure.median)

    @property
    def missed_by(self) -> float | None:
        """How many times further it is to the goal; None where it is reached or there is none."""
        if self.reached is not False:
            return None
        assert self.goal.bound is not None
        bound, found = self.goal.bound, self.figure.median
        return bound / found if self.goal.kind == "times faster" else found / bound


@dataclass
class Result:
    """What became of a case."""

    case: Case
    status: Status
    reason: str = ""
    """Why there are no figures."""
    checks: list[Check] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    """CPU seconds a unit of each side, a number a round."""
    wall: dict[str, list[float]] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)
    load_average: tuple[float, float, float] = field(default_factory=os.getloadavg)
    """Of the machine, when the case began."""
    absent: dict[str, str] = field(default_factory=dict)
    """Sides beside ours that could not run, and why."""
    sizes: dict[str, Any] = field(default_factory=dict)
    gate_sizes: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """All there is to say of the case, for the file and for ``report``, which reads nothing else."""
        case, outcomes = self.case, {outcome.goal: outcome for outcome in self.outcomes}
        checks = [dataclasses.asdict(check) for check in self.checks]
        for check in checks:  # JSON has no infinity
            check["error"] = check["error"] if math.isfinite(check["error"]) else None
        return {
            "name": case.name,
            "item": case.item,
            "what": case.what,
            "allocator": case.allocator,
            "status": self.status,
            "reason": self.reason,
            "goals": [_goal_as_json(goal, outcomes.get(goal)) for goal in case.goals],
            "absent": self.absent,
            "checks": checks,
            "cpu_seconds": self.seconds,
            "wall_seconds": self.wall,
            "peak_bytes": self.peak_bytes,
            "sizes": self.sizes,
            "gate_sizes": self.gate_sizes,
            "load_average": [round(load, 2) for load in self.load_average],
        }


def _goal_as_json(goal: Goal, outcome: Outcome | None) -> dict[str, Any]:
    plain = dataclasses.asdict(goal)
    if outcome is None:
        return {**plain, "figure": None, "reached": None}
    found = {"figure": dataclasses.asdict(outcome.figure), "rounds": outcome.rounds}
    return {**plain, **found, "reached": outcome.reached, "missed_by": outcome.missed_by}


def measure(case: Case, workers: Workers, folder: Path, options: Options) -> Result:
    """Run one case; whatever goes wrong is in the result, never a silence."""
    sizes = {**case.sizes, **(case.smoke if options.smoke else {})}
    result = Result(case, "failed", sizes=sizes)
    try:
        _measure(case, workers, folder, options, result)
    except NotRun as reason:
        result.status, result.reason = "not run", str(reason)
    except Exception as error:  # a run of an hour must not end with one case
        named = isinstance(error, CrocutaError)
        result.status, result.reason = "failed", str(error) if named else f"{type(error).__name__}: {error}"
    if result.status != "measured":
        result.seconds, result.wall, result.peak_bytes, result.outcomes = {}, {}, {}, []
    return result


def _measure(case: Case, workers: Workers, folder: Path, options: Options, result: Result) -> None:
    run = _Run(case, workers, folder, options, result)
    run.check_environments()
    with contextlib.ExitStack() as stack:
        processes = run.start(stack)
        result.checks = run.judge(processes)
        if not all(check.holds for check in result.checks):
            result.status, result.reason = "red", _faults(result.checks)
            return
        if not case.memory:
            run.time(processes)
    if case.memory:
        run.memory(list(processes))
    result.outcomes = [
        Outcome(goal, figure, len(result.seconds.get(case.ours.name, [0])))
        for goal in case.goals
        if goal.against in processes
        for figure in [_figure(goal, case, result)]
    ]
    result.status = "measured"


def _faults(checks: Sequence[Check]) -> str:
    faults = [f"{c.answer} of {c.side} {c.error:.1e} > {c.bound:.0e}" for c in checks if not c.holds]
    return "wrong answers: " + ", ".join(faults[:4]) + (f" and {len(faults) - 4} more" if len(faults) > 4 else "")


def _figure(goal: Goal, case: Case, result: Result) -> Ratio:
    if goal.kind == "times the memory":
        share = result.peak_bytes[case.ours.name] / result.peak_bytes[goal.against]
        return Ratio(share, share, share)
    ours, theirs = result.seconds[case.ours.name], result.seconds[goal.against]
    return ratio(theirs, ours) if goal.kind == "times faster" else ratio(ours, theirs)


@dataclass
class _Run:
    """What the steps of one case share."""

    case: Case
    workers: Workers
    folder: Path
    options: Options
    result: Result

    def check_environments(self) -> None:
        """NotRun, before anything is started, where no side but ours has its environment."""
        reasons = []
        for side in self.case.sides:
            try:
                python_of(side.environment)
            except NotRun as reason:
                reasons.append(str(reason))
        if reasons and len(reasons) >= len(self.case.sides) - 1:
            raise NotRun(reasons[0])

    def start(self, stack: contextlib.ExitStack) -> dict[str, Process]:
        """A process a side. Ours must run; of the others at least one."""
        processes: dict[str, Process] = {}
        for place, side in enumerate(self.case.sides):
            try:
                processes[side.name] = stack.enter_context(self.workers.of(side, place, self.case.allocator))
                self._load(processes[side.name], side, self._gate_sizes())
            except NotRun as reason:
                if place == 0 or len(self.case.sides) == 2:
                    raise
                processes.pop(side.name, None)
                self.result.absent[side.name] = str(reason)
        if len(processes) == 1 and len(self.case.sides) > 1:
            raise NotRun("; ".join(f"{name}: {why}" for name, why in self.result.absent.items()))
        return processes

    def judge(self, processes: dict[str, Process]) -> list[Check]:
        gate, sizes = self.case.gate, self._gate_sizes()
        self.result.gate_sizes = sizes if sizes != self.result.sizes else {}
        answers = {name: process.answers() for name, process in processes.items()}
        common = self._truth(sizes) if gate.truth or gate.reference else answers[self.case.ours.name]
        checks: list[Check] = []
        for name, given in answers.items():
            side = self.case.side(name)
            truth = common if side.reference is None else self._answers_of(side.reference, sizes)
            required = [each for each in gate.bounds if "*" not in each] if side is self.case.ours else []
            checks += judge(name, given, truth, {**gate.bounds, **side.bounds}, required)
        if sizes != self.result.sizes and not self.case.memory:
            for name, process in processes.items():
                self._load(process, self.case.side(name), self.result.sizes)
        return checks

    def time(self, processes: dict[str, Process]) -> None:
        """Rounds; the order is reversed each round, so that whatever drifts meets all sides alike."""
        seconds = self.result.seconds = {name: [] for name in processes}
        wall = self.result.wall = {name: [] for name in processes}
        repeats = {name: self._repeats(process) for name, process in processes.items()}
        names, spent = list(processes), 0.0
        least = self.options.rounds or (2 if self.options.smoke else self.case.least_rounds)
        rounds = self.options.rounds or (2 if self.options.smoke else self.case.rounds)
        for done in range(rounds):
            if done >= least and spent > self.case.seconds:
                break
            for name in names:
                reply = processes[name].request("time", repeats=repeats[name])
                seconds[name].append(reply["cpu"])
                wall[name].append(reply["wall"])
                spent += reply["round"]
            names.reverse()

    def memory(self, names: Sequence[str]) -> None:
        """Each side once more, in a process that has done nothing else."""
        tiny = {**self.case.sizes, **self.case.smoke}
        tiny_inputs, inputs = self._write_inputs(tiny), self._write_inputs(self.result.sizes)
        fresh = Workers(self.folder, self.workers.threads, keep=False)
        for name in names:
            side = self.case.side(name)
            with fresh.of(side, allocator=self.case.allocator) as process:
                reply = process.request(
                    "memory",
                    task=side.task,
                    threads=self.workers.threads,
                    settings={**self.result.sizes, **side.settings},
                    inputs=str(inputs),
                    tiny={**tiny, **side.settings},
                    tiny_inputs=str(tiny_inputs),
                )
            self.result.peak_bytes[name] = reply["peak"]

    def _repeats(self, process: Process) -> int:
        """Runs in a round; the first run warms up, the second is timed unless the first was long enough to tell."""
        taken = process.request("time", repeats=1)["round"]
        if taken < ROUND_SECONDS:
            taken = process.request("time", repeats=1)["round"]
        shortest = 0.02 if self.options.smoke else ROUND_SECONDS
        return max(1, min(MOST_REPEATS, math.ceil(shortest / max(taken, 1e-6))))

    def _gate_sizes(self) -> dict[str, Any]:
        return self.result.sizes if self.options.smoke else {**self.result.sizes, **self.case.gate.sizes}

    def _load(self, process: Process, side: Side, sizes: dict[str, Any]) -> None:
        settings, inputs = {**sizes, **side.settings}, str(self._write_inputs(sizes))
        process.request("load", task=side.task, settings=settings, inputs=inputs, threads=self.workers.threads)

    def _write_inputs(self, sizes: dict[str, Any]) -> Path:
        """The file of a case's inputs, made once for each set of sizes."""
        key = "-".join(f"{name}{value}" for name, value in sorted(sizes.items()))
        path = self.folder / f"{self.case.name.replace('/', '_')}-{abs(hash(key)):x}.safetensors"
        if not path.exists():
            tensors = _called(self.case.inputs)(sizes)
            save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path)
            gc.collect()
        return path

    def _truth(self, sizes: dict[str, Any]) -> Tensors:
        gate = self.case.gate
        if gate.reference is not None:
            return self._answers_of(gate.reference, sizes)
        assert gate.truth is not None
        return _called(gate.truth)(_called(self.case.inputs)(sizes), sizes)

    def _answers_of(self, side: Side, sizes: dict[str, Any]) -> Tensors:
        """What a side answers that is not timed, from a process that then ends (or that is kept apart)."""
        with self.workers.of(side, place=99) as process:
            self._load(process, side, sizes)
            return process.answers()


def _called(name: str) -> Callable[..., Tensors]:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(f"suite.{module}"), function)
