"""Do the layers learn? Every task with every model, trained in one run from one seed, against stated bounds.

    make quality                                        # the small size: under an hour on two cores
    python quality/run.py --tasks selective-copying --models hyena,striped
    python quality/run.py --size large --device cuda    # MAD's own sizes and sweep
    python quality/run.py --smoke                       # seconds; its figures mean nothing

All models of a task have the same number of parameters within 5 %, the same updates, batches and schedule. The result
is written as JSON with the machine and the commit, and printed as a table; ``--document`` also puts the table into
docs/quality.md. The script ends with 1 if a bound is missed, or if a row with a bound was not run for lack of data.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "benchmarks")]

import torch  # noqa: E402
from _timing import manifest, write_result  # noqa: E402
from models import KINDS  # noqa: E402
from real import MissingDataError  # noqa: E402
from recipes import BOUNDS, SIZES, Bound, Plan  # noqa: E402
from report import document, markdown  # noqa: E402
from rows import Row  # noqa: E402
from training import Recipe, run  # noqa: E402


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; ``tasks`` and ``models`` as lists of known names, else the parser ends the program."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=("small", "large"), default="small")
    parser.add_argument("--smoke", action="store_true", help="a few updates of tiny models")
    parser.add_argument("--tasks", help="some rows, with commas between")
    parser.add_argument("--models", help=f"some of {', '.join(KINDS)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--output", type=Path, default=HERE / "results", help="folder of the result file")
    parser.add_argument("--document", action="store_true", help="put the table into docs/quality.md")
    options = parser.parse_args(argv)
    if options.smoke:
        options.size = "smoke"
    known = {"tasks": list(SIZES[options.size]()), "models": list(KINDS)}
    for name, all_names in known.items():
        chosen = getattr(options, name)
        setattr(options, name, all_names if chosen is None else chosen.split(","))
        if unknown := [item for item in getattr(options, name) if item not in all_names]:
            parser.error(f"unknown {name} {', '.join(unknown)}; known: {', '.join(all_names)}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    started = time.perf_counter()
    plans = SIZES[options.size]()
    rows, left_out = make_rows(plans, options.tasks, options.seed)
    runs = train_all(
        [(name, kind) for name in rows for kind in options.models if kind not in plans[name].without], rows, options
    )
    result = {
        "manifest": manifest(),
        "size": options.size,
        "seed": options.seed,
        "device": options.device,
        "workers": options.workers,
        "seconds": round(time.perf_counter() - started, 1),
        "left_out": left_out,
        "bounds": check(runs, options),
        "runs": runs,
    }
    print(f"\n{markdown(result)}\n")
    print(f"{result['seconds'] / 60:.1f} minutes; {write_result(options.output, options.size, result)}")
    for bound in result["bounds"]:
        reached = "not run" if bound["reached"] is None else f"{100 * bound['reached']:.2f} %"
        verdict = "kept" if bound["kept"] else "MISSED"
        print(f"{bound['row']}, {bound['model']}: {reached}, at least {100 * bound['at_least']:.0f} %: {verdict}")
    if options.document:
        document(result)
    return int(options.size != "smoke" and not all(bound["kept"] for bound in result["bounds"]))


def make_rows(plans: dict[str, Plan], names: Sequence[str], seed: int) -> tuple[dict[str, tuple[Row, Recipe]], Any]:
    """The data of each row; rows without data by name, with the reason, which is printed too."""
    rows: dict[str, tuple[Row, Recipe]] = {}
    left_out: dict[str, str] = {}
    for name in names:
        try:
            rows[name] = plans[name].make(seed), plans[name].recipe
        except MissingDataError as reason:
            left_out[name] = str(reason)
            print(f"{name} is left out: {reason}", flush=True)
    return rows, left_out


def train_all(
    jobs: Sequence[tuple[str, str]], rows: dict[str, tuple[Row, Recipe]], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Every model on every row, in processes of one thread each; the runs in the order of the table.

    The tasks of the most work come first, so that the processes end together.
    """
    by_work = sorted(jobs, key=lambda job: -_work(*rows[job[0]]))
    runs: dict[tuple[str, str], dict[str, Any]] = {}
    with ProcessPoolExecutor(options.workers, get_context("spawn"), initializer=_one_thread) as pool:
        futures: dict[Future[dict[str, Any]], tuple[str, str]] = {}
        for name, kind in by_work:
            row, recipe = rows[name]
            futures[pool.submit(run, row, kind, recipe, seed=options.seed, device=options.device)] = name, kind
        for future in as_completed(futures):
            done = runs[futures[future]] = future.result()
            figures = ", ".join(
                f"{test} {score['bits']:.3f} bits, {100 * score['accuracy']:.1f} % right"
                for test, score in done["tests"].items()
            )
            print(f"{done['row']}, {done['model']}: {figures} ({done['cpu_seconds']:.0f} s)", flush=True)
    return [runs[job] for job in jobs]


def _one_thread() -> None:
    torch.set_num_threads(1)


def _work(row: Row, recipe: Recipe) -> int:
    return recipe.steps * recipe.batch * row.length * recipe.shape.hidden


def check(runs: Sequence[dict[str, Any]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Each bound on a task and a model that were asked for, what was reached, and whether it is kept."""
    reached = {(done["row"], done["model"]): done["tests"] for done in runs}

    def judged(bound: Bound) -> dict[str, Any]:
        tests = reached.get((bound.row, bound.model))
        value = None if tests is None else tests["test"]["accuracy"]
        return vars(bound) | {"reached": value, "kept": value is not None and value >= bound.at_least}

    return [judged(bound) for bound in BOUNDS if bound.row in options.tasks and bound.model in options.models]


if __name__ == "__main__":
    sys.exit(main())
