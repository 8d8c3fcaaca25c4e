"""The process of one side: requests and replies are lines of JSON, tensors travel in safetensors files.

    {"do": "load", "task": "ours.operators:modal_prefill", "settings": {..}, "inputs": "path", "threads": 1}
    {"do": "answer", "path": "path"}      -> {"names": [..]}
    {"do": "time", "repeats": 3}          -> {"cpu": seconds a unit, "wall": the same, "round": CPU seconds of it all}
    {"do": "memory", "tiny": {..}, "tiny_inputs": "path", ..as load}    -> {"peak": bytes beyond what code takes}
    {"do": "quit"}

A reply has "error" and "trace" where the request failed, or "not_run" with a reason. Runs in either environment, so
it imports nothing but torch, safetensors and the module of the task.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any, TextIO

sys.path[0] = str(Path(__file__).resolve().parents[1])  # as a script it would find its neighbours, not the package

import torch  # noqa: E402
from _timing import peak_resident_bytes, resident_bytes  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from suite.task import NotRun, Task  # noqa: E402


class Worker:
    """Holds at most one task."""

    def __init__(self) -> None:
        self._task: Task | None = None

    def handle(self, request: dict[str, Any]) -> dict[str, Any]:
        match request["do"]:
            case "load":
                self._task = None
                gc.collect()
                torch.set_num_threads(request["threads"])
                self._task = make_task(request["task"], request["settings"], request["inputs"])
                return {}
            case "answer":
                answers = self._loaded().answers()
                save_file(
                    {name: tensor.detach().contiguous().clone() for name, tensor in answers.items()}, request["path"]
                )
                return {"names": sorted(answers)}
            case "time":
                return timed(self._loaded(), request["repeats"])
            case "memory":
                torch.set_num_threads(request["threads"])
                return {"peak": memory_of(request)}
            case other:
                raise ValueError(f"unknown request {other!r}")

    def _loaded(self) -> Task:
        if self._task is None:
            raise ValueError("no task is loaded")
        return self._task


def make_task(name: str, settings: dict[str, Any], inputs: str) -> Task:
    """The task that ``module:function`` makes."""
    module, _, function = name.partition(":")
    made = getattr(importlib.import_module(f"suite.{module}"), function)(load_file(inputs), settings)
    if not isinstance(made, Task):
        raise TypeError(f"{name} made a {type(made).__name__}, not a Task")
    return made


def timed(task: Task, repeats: int) -> dict[str, Any]:
    cpu, wall = task.clock(), time.perf_counter()
    for _ in range(repeats):
        task.run()
    cpu, wall = task.clock() - cpu, time.perf_counter() - wall
    count = repeats * task.units
    return {"cpu": cpu / count, "wall": wall / count, "round": cpu}


def memory_of(request: dict[str, Any]) -> int:
    """Peak resident bytes of one run, weights included, less what the code takes.

    What code takes is what a tiny run leaves behind: torch loads parts of itself on first use.
    """
    make_task(request["task"], request["tiny"], request["tiny_inputs"]).run()
    gc.collect()
    before = resident_bytes()
    make_task(request["task"], request["settings"], request["inputs"]).run()
    return peak_resident_bytes() - before


def serve(requests: TextIO, replies: TextIO) -> None:
    worker = Worker()
    for line in requests:
        request = json.loads(line)
        if request["do"] == "quit":
            return
        try:
            reply = worker.handle(request)
        except NotRun as reason:
            reply = {"not_run": str(reason)}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def main() -> None:
    # What a library prints must not stand between the replies: they keep the pipe, and its number goes to stderr.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.stdin, replies)


if __name__ == "__main__":
    main()
