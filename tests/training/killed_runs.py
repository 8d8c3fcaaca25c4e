"""Runs one training to its end, and again under SIGKILL, SIGTERM and SIGINT at random moments; prints what came of it.

    python killed_runs.py FOLDER KILLS SEED

Every attempt is a fork of this process, which has imported all but never computed, so that none waits for imports.
A JSON object on standard output says what was seen; the runs stay in FOLDER.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from tiny_run import tiny_run, write_text

from crocuta.training.checkpoint import TrainingCheckpoints, read_latest
from crocuta.training.config import TrainConfig
from crocuta.training.loop import train

STOPPED = 3


def attempt(config: TrainConfig, run: Path, reports: Path) -> int:
    """Start or resume in a child process; it notes each checkpoint in ``reports`` once it is said to be written."""
    child = os.fork()
    if child:
        return child
    try:
        save = TrainingCheckpoints.save

        def reporting(self, step, tensors, state):
            path = save(self, step, tensors, state)
            with reports.open("a") as file:
                file.write(f"{step}\n")
            return path

        TrainingCheckpoints.save = reporting  # type: ignore[method-assign]
        outcome = train(config, run, resume=(run / "train.json").exists())
        os._exit(0 if outcome.finished else STOPPED)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def wait(child: int, seconds: float = 60.0, until: Callable[[], bool] = lambda: False) -> int | None:
    """The exit code of the child, or None if it still runs after so long, or when ``until`` has come true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not until():
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    return None


def last(reports: Path) -> int:
    lines = reports.read_text().split() if reports.exists() else []
    return max(map(int, lines), default=-1)


def newest(run: Path) -> int:
    restored = read_latest(run / "checkpoints")
    return -1 if restored is None else restored.step


def main(folder: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    torch.optim.AdamW([torch.zeros(1)])  # its import of the compiler takes longer than the whole run
    draw = random.Random(seed)
    config = tiny_run(write_text(folder / "text.txt"), steps=80)
    began = time.monotonic()
    assert wait(attempt(config, folder / "whole", folder / "whole.reports")) == 0
    whole = time.monotonic() - began

    run, reports = folder / "killed", folder / "killed.reports"
    lost, newest_steps, failed, finished_early = [], [], [], 0
    for number in range(kills):
        while True:
            before = last(reports)
            child = attempt(config, run, reports)
            if number % 2 and not finished_early:  # every second one gets further first, however slow the machine is
                code = wait(child, until=lambda: last(reports) > before)  # noqa: B023
            else:
                code = None
            code = wait(child, draw.uniform(0, 2.5 * whole / kills)) if code is None else code
            if code is None:
                break
            failed += [code] if code else []
            finished_early += code == 0
        os.kill(child, signal.SIGKILL)
        code = wait(child)
        failed += [] if code in (-signal.SIGKILL, 0) else [code]
        newest_steps.append(newest(run))
        if newest_steps[-1] < last(reports):
            lost.append([newest_steps[-1], last(reports)])
    failed += [code for code in [wait(attempt(config, run, reports))] if code]

    stopped, stops = folder / "stopped", []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        child = attempt(config, stopped, folder / "stopped.reports")
        before, goal = last(folder / "stopped.reports"), draw.randint(1, 3)
        end = time.monotonic() + 60
        while last(folder / "stopped.reports") < before + 4 * goal and time.monotonic() < end:
            time.sleep(0.001)  # some way into the loop, wherever that is
        os.kill(child, number)
        code = wait(child)
        stops.append({"code": code, "newest": newest(stopped), "reported": last(folder / "stopped.reports")})
    failed += [code for code in [wait(attempt(config, stopped, folder / "stopped.reports"))] if code]
    report = {
        "seconds": whole,
        "lost": lost,
        "newest": newest_steps,
        "failed": failed,
        "finished_early": finished_early,
        "stops": stops,
    }
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
