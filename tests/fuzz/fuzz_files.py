"""Fuzzing of everything that reads checkpoints: changed files give our errors, in little time and memory.

    python tests/fuzz/fuzz_files.py --format evo2 --count 20000
    python tests/fuzz/fuzz_files.py --format all --count 200000 --keep failures

Each case is made from its number and its format alone, so a failing one is found again with ``--start NUMBER --count
1``. A process does the reading; if it dies or hangs the case is a failure and another process goes on. A case fails by

* any exception outside our family of errors about files (or any crash),
* more than 2 seconds of processor time, or 60 of waiting,
* memory growing by more than twice the size of the files and 64 MiB,
* running code or starting a process, as an audit hook sees it,
* being read without an error although the format has checksums of everything.

``--seeds FOLDER`` starts from another checkpoint of the format.
The result is printed as JSON, and the exit status is 1 if there are failures.
"""

import argparse
import collections
import json
import os
import random
import resource
import select
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAX_SECONDS, MAX_WAIT, SLACK = 2.0, 60.0, 64 << 20
LEAST_ADDRESS_SPACE = 2 << 30
CODECS = ("raw-unicode-escape", "utf-8-sig", *(f"utf-{width}{end}" for width in (16, 32) for end in ("", "-be", "-le")))
"""Imported by Python itself where a text is first taken to be in one of them."""
EXPECTED = ("WeightsFormatError", "ConfigError", "InputError", "TokenizerError")
CODE_EVENTS = (
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "subprocess.",
    "socket.",
    "ctypes.",
    "exec",
    "compile",
    "import",
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--format", default="all", help="formats, with commas between; 'all', or 'control'")
    parser.add_argument("--count", type=int, default=1000, help="cases of each format")
    parser.add_argument("--start", type=int, default=0, help="the first case")
    parser.add_argument("--seeds", type=Path, help="a checkpoint folder to start from, in place of the built-in one")
    parser.add_argument("--keep", type=Path, help="a folder for the files of failing cases")
    parser.add_argument("--skip", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


# --- the process that reads ---------------------------------------------------------------------------------


def memory(key: str) -> int:
    return int(Path("/proc/self/status").read_text().partition(f"{key}:")[2].split()[0]) * 1024


def watch() -> list[str]:
    """A list that grows with every event by which code is run."""
    events: list[str] = []
    sys.addaudithook(
        lambda event, details: events.append(f"{event} {details}"[:200]) if event.startswith(CODE_EVENTS) else None
    )
    return events


def judge(name: str, seconds: float, growth: int, allowed: int, events: list[str]) -> str | None:
    """Why a case is a failure, if it is."""
    if name not in ("accepted", *EXPECTED):
        return "error"
    if seconds > MAX_SECONDS:
        return "time"
    if growth > allowed:
        return "memory"
    return "code" if events else None


def attempt(use: Any, folder: Path, allowed: int, events: list[str]) -> dict[str, Any]:
    """What came of one case."""
    name, message = "accepted", ""
    del events[:]
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of memory
    before, start = memory("VmRSS"), time.process_time()
    try:
        use(folder)
    except BaseException as error:  # panics of extensions are no Exceptions
        if isinstance(error, KeyboardInterrupt):
            raise
        name, message = type(error).__name__, str(error)[:300]
    seconds, growth = time.process_time() - start, memory("VmHWM") - before
    failure = judge(name, seconds, growth, allowed, events)
    result = {"outcome": name, "failure": failure, "seconds": round(seconds, 3), "growth": growth}
    return {**result, "message": message, "events": events[:3]} if failure else result


def work(options: argparse.Namespace) -> None:
    """Read case after case of format after format, one line of JSON for each."""
    from seeds import CONTROL, TARGETS, files_of

    targets = {name: {**TARGETS, "control": CONTROL}[name] for name in options.format.split(",")}
    for codec in CODECS:
        "".encode(codec)
    seeds = {name: files_of(options.seeds) if options.seeds else target.seed() for name, target in targets.items()}
    with tempfile.TemporaryDirectory() as place:
        for name, target in targets.items():
            write(Path(place) / name, seeds[name])
            try:
                target.use(Path(place) / name)  # what is imported at first use is imported here
            except Exception as error:
                raise SystemExit(f"UNSOUND: {name}: {error}") from error
        events = watch()
        size = max(sum(map(len, seed.values())) for seed in seeds.values())
        limit = memory("VmSize") + max(LEAST_ADDRESS_SPACE, 4 * size)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        cases = [(name, options.start + index) for name in targets for index in range(options.count)]
        for name, index in cases[options.skip :]:
            result = run_case(name, index, targets[name], seeds[name], Path(place) / name, events, options.keep)
            sys.stdout.write(json.dumps(result) + "\n")
            sys.stdout.flush()


def run_case(
    name: str, index: int, target: Any, seed: dict[str, bytes], folder: Path, events: list[str], kept: Path | None
) -> dict[str, Any]:
    """Change the files, read them, put the sound ones back."""
    from mutations import mutate

    changed, how = mutate(random.Random(f"{name} {index}"), seed)
    write(folder, changed)
    total = sum(map(len, {**seed, **changed}.values()))
    result = attempt(target.use, folder, 2 * total + SLACK, events)
    if target.sealed and result["outcome"] == "accepted" and any(seed[key] != changed[key] for key in changed):
        result["failure"] = "silent"
    if result["failure"] and kept:
        write(kept / f"{name}-{index}", {**seed, **changed})
    write(folder, {key: seed[key] for key in changed})
    return {"format": name, "index": index, "how": how, **result}


def write(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


# --- the process that watches -------------------------------------------------------------------------------


@dataclass
class Summary:
    """What came of the cases of one format so far."""

    cases: int = 0
    outcomes: collections.Counter[str] = field(default_factory=collections.Counter)
    slowest_seconds: float = 0.0
    largest_growth_mib: float = 0.0
    failures: list[dict[str, Any]] = field(default_factory=list)

    def add(self, result: dict[str, Any]) -> None:
        self.cases += 1
        self.outcomes[result["outcome"]] += 1
        self.slowest_seconds = max(self.slowest_seconds, result.get("seconds", 0.0))
        self.largest_growth_mib = max(self.largest_growth_mib, round(result.get("growth", 0) / (1 << 20), 1))
        if result["failure"]:
            self.failures.append(result)


def fuzz(options: argparse.Namespace) -> dict[str, Summary]:
    """What came of every case; one in which the process died or hung is a failure, and another process goes on."""
    cases = [(name, options.start + index) for name in options.format.split(",") for index in range(options.count)]
    summaries = {name: Summary() for name, _ in cases}

    def done() -> int:
        return sum(summary.cases for summary in summaries.values())

    while done() < len(cases):
        end, said = run_worker(options, done(), summaries)
        if "UNSOUND" in said:
            raise SystemExit(f"the sound files cannot be read:\n{said}")
        if done() < len(cases):
            name, index = cases[done()]
            summaries[name].add({"format": name, "index": index, "outcome": end, "failure": end, "message": said})
    return summaries


def run_worker(options: argparse.Namespace, skip: int, summaries: dict[str, Summary]) -> tuple[str, str]:
    """Add the results of one process; how it ended, and the last of what it said."""
    command = [sys.executable, __file__, "--worker", f"--skip={skip}"]
    command += [f"--{name}={getattr(options, name)}" for name in ("format", "start", "count")]
    command += [f"--{name}={getattr(options, name)}" for name in ("seeds", "keep") if getattr(options, name)]
    with tempfile.TemporaryFile() as errors:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environment)
        assert process.stdout
        rest, end = b"", ""
        while not end:
            ready, _, _ = select.select([process.stdout], [], [], MAX_WAIT)
            piece = os.read(process.stdout.fileno(), 1 << 16) if ready else b""
            *lines, rest = (rest + piece).split(b"\n")
            for result in map(json.loads, lines):
                summaries[result["format"]].add(result)
            if not piece:
                end = "ended" if ready else "hung"
        if end == "hung":
            process.kill()
        status = process.wait()
        process.stdout.close()
        errors.seek(0)
        said = errors.read().decode(errors="replace")[-2000:]
    return end if end == "hung" else f"died with status {status}", said


def main() -> None:
    options = arguments()
    if options.worker:
        work(options)
        return
    from seeds import TARGETS

    if options.format == "all":
        options.format = ",".join(TARGETS)
    began = time.monotonic()
    summaries = fuzz(options)
    report = {name: vars(summary) for name, summary in summaries.items()}
    sys.stdout.write(json.dumps({"seconds": round(time.monotonic() - began, 1), "formats": report}, indent=2) + "\n")
    sys.exit(any(summary.failures for summary in summaries.values()))


if __name__ == "__main__":
    main()
