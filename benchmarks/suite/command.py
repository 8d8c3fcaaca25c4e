"""The command: options, the order of cases, and what is written where."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _timing import RESULTS, manifest, write_result

from crocuta.errors import InputError
from suite import report
from suite.case import Case
from suite.measure import Options, Result, measure
from suite.page import document
from suite.process import Workers
from suite.registry import CASES, selected


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Ours against the published peers, correctness first.")
    parser.add_argument("--cases", help="globs of case names or items of the P-list, comma-separated; default all")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, a minute or two; the ratios mean nothing")
    parser.add_argument("--rounds", type=int, help="instead of each case's own number")
    parser.add_argument("--document", action="store_true", help="write tables and plots into docs/benchmarks.md")
    parser.add_argument("--threads", type=int, default=1, help="default 1; then CPU time means something")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON file")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    options = parser.parse_args(arguments)
    for name, given in (("rounds", options.rounds), ("threads", options.threads)):
        if given is not None and given < 1:
            parser.error(f"--{name} must be at least 1: got {given}")
    if not selected(options.cases):
        parser.error(f"no case fits {options.cases!r}; --list names them")
    if options.document and options.smoke:
        parser.error("--document wants real sizes: leave out --smoke")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where every case was measured, or not run for a reason that is told; 1 where one failed or answered wrongly."""
    options = parse(arguments)
    cases = selected(options.cases)
    if options.list:
        print("\n".join(f"{case.item or '':<4} {case.name}" for case in cases))
        return 0
    torch.set_num_threads(options.threads)
    how = Options(threads=options.threads, rounds=options.rounds, smoke=options.smoke)
    about, kept = kept_from(how, options.output)
    print(f"{len(cases)} cases, {how.threads} thread{'s' if how.threads > 1 else ''}, process-CPU time")
    results = run(cases, how)
    plain = [result.as_json() for result in results]
    tables = (report.results_table(plain, smoke=how.smoke), report.errors_table(plain), report.seconds_table(plain))
    print("\n" + "\n\n".join((*tables, report.crossover(plain), report.summary(plain))))
    whole = merged(about, kept, plain, how.smoke)
    print(f"written: {write_result(options.output, name_of(how), whole)}")
    if options.document:
        print("\n".join(f"written: {path}" for path in document(whole)))
    return int(any(result.status in ("red", "failed") for result in results))


def run(cases: Sequence[Case], how: Options) -> list[Result]:
    """One case after the other, each with a folder of its own that goes when it is done."""
    folder = Path(tempfile.mkdtemp(prefix="crocuta-bench-"))
    workers = Workers(folder, how.threads, keep=how.smoke)
    results = []
    try:
        for case in cases:
            clock = time.perf_counter()
            room = Path(tempfile.mkdtemp(dir=folder))
            results.append(measure(case, workers, room, how))
            shutil.rmtree(room)
            print(f"  {case.name}: {_short(results[-1])} ({time.perf_counter() - clock:.0f} s)", file=sys.stderr)
    finally:
        workers.close()
        shutil.rmtree(folder, ignore_errors=True)
    return results


def _short(result: Result) -> str:
    if result.status != "measured":
        return f"{result.status}: {result.reason}"
    goals = [goal for goal in result.as_json()["goals"] if goal["figure"] is not None]
    return ", ".join(f"{goal['against']} {report.figure(goal)}" for goal in goals)


# --- the file ---


def name_of(how: Options) -> str:
    return "suite-smoke" if how.smoke else "suite"


def kept_from(how: Options, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """This run's manifest, and the cases by name of an earlier run of the same day and the same committed code.

    A whole run takes an hour or two, and one case is often run again. Read before anything is measured: an InputError
    then costs nothing.
    """
    about = manifest() | {"threads": how.threads}
    path = folder / f"{name_of(how)}-{about['date'][:10]}.json"
    if about["uncommitted_changes"] or not path.exists():  # nobody knows whether uncommitted code is the same
        return about, {}
    try:
        before = json.loads(path.read_text())
        same = all(before["manifest"][key] == about[key] for key in ("commit", "uncommitted_changes", "threads", "cpu"))
        return about, {case["name"]: case for case in before["cases"]} if same else {}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        fix = "move it away"
        what = f"{path} is no result of this suite"
        raise InputError(what, given=f"{type(error).__name__}: {error}", fix=fix) from None


def merged(about: dict[str, Any], kept: dict[str, Any], plain: Sequence[dict[str, Any]], smoke: bool) -> dict[str, Any]:
    """What goes into the file: these cases, and those that were kept, in the order of the registry."""
    by_name = kept | {case["name"]: case for case in plain}
    order = {case.name: place for place, case in enumerate(CASES)}
    cases = sorted(by_name.values(), key=lambda case: order.get(case["name"], len(order)))
    return {"manifest": about, "smoke": smoke, "summary": report.summary(cases), "cases": cases}
