"""What every benchmark shares: alternation of variants, memory, options, the machine, tables, result files."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"


@dataclass
class Timings:
    """Seconds a round of one variant: CPU time of the whole process, and wall-clock time."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)


def alternate(variants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Timings]:
    """Run every variant once a round, in one process; the order is reversed each round.

    Whatever drifts (caches, other work on the machine) then meets all variants alike, so ratios within a round mean
    more than seconds do. The caller warms up.
    """
    timings = {name: Timings() for name in variants}
    names = list(variants)
    for _ in range(rounds):
        for name in names:
            cpu, wall = time.process_time(), time.perf_counter()
            variants[name]()
            timings[name].cpu.append(time.process_time() - cpu)
            timings[name].wall.append(time.perf_counter() - wall)
        names.reverse()
    return timings


@dataclass(frozen=True)
class Ratio:
    """Of two variants, over rounds."""

    median: float
    min: float
    max: float


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Ratio:
    """Numerator over denominator, round by round."""
    each = [a / b for a, b in zip(numerator, denominator, strict=True)]
    return Ratio(statistics.median(each), min(each), max(each))


# --- options ---

S = TypeVar("S")


def sizes_parser(doc: str | None, sizes: Any) -> argparse.ArgumentParser:
    """Options that every script has: each whole number of a dataclass of sizes, threads, smoke and output."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    for size in dataclasses.fields(sizes):
        if isinstance(value := getattr(sizes, size.name), int):
            parser.add_argument(f"--{size.name.replace('_', '-')}", type=int, help=f"default {value}")
    parser.add_argument("--threads", type=int, default=1, help="default 1; then CPU time means something")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, unless given")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result files")
    return parser


def chosen_sizes(options: argparse.Namespace, sizes: S) -> S:
    """``sizes`` with those that were given."""
    names = [size.name for size in dataclasses.fields(sizes)]  # type: ignore[arg-type]
    given = {name: value for name in names if (value := getattr(options, name, None)) is not None}
    return dataclasses.replace(sizes, **given)  # type: ignore[type-var]


# --- memory ---


def resident_bytes() -> int:
    """Resident memory of this process now (Linux; elsewhere its peak, the nearest that the standard library has)."""
    return _status("VmRSS")


def peak_resident_bytes() -> int:
    """Largest resident memory of this process so far."""
    return _status("VmHWM")


def _status(key: str) -> int:
    try:
        # Not ru_maxrss: on Linux a child inherits the peak of the process that started it.
        lines = Path("/proc/self/status").read_text().splitlines()
    except FileNotFoundError:
        import resource

        unit = 1 if platform.system() == "Darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


# --- manifest, table, file ---


def manifest() -> dict[str, Any]:
    """Date, machine, versions, threads, load and commit: what a figure means nothing without."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD") or None,
        "uncommitted_changes": bool(_git("status", "--porcelain", "--", "../src", "*.py")),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=HERE, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table with aligned columns."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
    rule = "| " + " | ".join("-" * width for width in widths) + " |"
    return "\n".join([lines[0], rule, *lines[1:]])


def mebibytes(count: float) -> str:
    """Bytes as MiB for a table."""
    return f"{count / 2**20:,.1f} MiB"


def write_result(folder: Path, name: str, result: Mapping[str, Any], *, smoke: bool = False) -> Path:
    """Write ``result`` as ``NAME[-smoke]-DATE.json`` into ``folder``; a result of the same day is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}{'-smoke' if smoke else ''}-{result['manifest']['date'][:10]}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path
