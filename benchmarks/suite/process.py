"""A side's process, as the parent sees it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from crocuta.errors import CrocutaError
from suite.case import OURS, PEERS, Allocator, Side
from suite.peers import install
from suite.task import NotRun, Tensors

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

TUNED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_TOP_PAD_": "268435456"}
"""glibc keeps what is freed and grows by 256 MiB, so that large tensors cost no page faults the second time."""


class WorkerError(CrocutaError, RuntimeError):
    """A worker that failed, died or answered with something that is no reply."""


def python_of(environment: str) -> str:
    """The interpreter of an environment. Raises NotRun where the peers' is not installed."""
    if environment == OURS:
        return sys.executable
    assert environment == PEERS
    stamp = ROOT / ".venv-peers" / ".installed"
    if not stamp.exists() or stamp.read_text() != install.key():
        raise NotRun("the peers are not installed at their pins (python benchmarks/suite/peers/install.py)")
    return str(ROOT / ".venv-peers" / "bin" / "python")


class Process:
    """One worker; ``request`` waits for the reply. What it prints goes to ``log``."""

    def __init__(self, command: list[str], folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self._log = open(folder / "log", "a+")  # noqa: SIM115
        self._child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=folder,
            env=environment,
        )

    def request(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Raises WorkerError for a failure on the other side, NotRun for what is not there."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        try:
            self._child.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._child.stdin.flush()
            line = self._child.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            status = self._child.wait()
            raise WorkerError(f"the worker ended during {do!r}", given=f"exit status {status}: {self._last_words()}")
        try:
            reply = json.loads(line)
        except json.JSONDecodeError:
            raise WorkerError(f"the worker's reply to {do!r} is no JSON", given=line[:200].strip()) from None
        if not isinstance(reply, dict):
            raise WorkerError(f"the worker's reply to {do!r} is no object", given=line[:200].strip())
        if "not_run" in reply:
            raise NotRun(reply["not_run"])
        if "error" in reply:
            raise WorkerError(f"the worker failed to {do}", given=reply["error"], fix=_place(reply.get("trace", "")))
        return reply

    def answers(self) -> Tensors:
        path = self.folder / "answers.safetensors"
        self.request("answer", path=str(path))
        return load_file(path)

    def close(self) -> None:
        """Ends the process, which may have ended before."""
        with contextlib.suppress(BrokenPipeError, ValueError):
            assert self._child.stdin is not None
            self._child.stdin.write('{"do": "quit"}\n')
            self._child.stdin.close()
        try:
            self._child.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        assert self._child.stdout is not None
        self._child.stdout.close()
        self._log.close()

    def _last_words(self) -> str:
        self._log.seek(0)
        return " | ".join(self._log.read().strip().splitlines()[-3:]) or "it said nothing"


def _place(trace: str) -> str | None:
    """The innermost line of a traceback."""
    places = [line.strip() for line in trace.splitlines() if line.lstrip().startswith("File ")]
    return places[-1] if places else None


class Workers:
    """Processes by environment, allocator and place among a case's sides; kept between cases where asked to."""

    def __init__(self, folder: Path, threads: int, *, keep: bool) -> None:
        self.threads = threads
        self._folder, self._keep = folder, keep
        self._kept: dict[tuple[str, str, int], Process] = {}

    @contextlib.contextmanager
    def of(self, side: Side, place: int = 0, allocator: Allocator = "default") -> Iterator[Process]:
        """A process for a side. Raises NotRun where its environment is not installed."""
        key = (side.environment, allocator, place)
        process = self._kept.pop(key, None) or self._start(side.environment, allocator)
        try:
            yield process
        except BaseException:
            process.close()
            raise
        if self._keep:
            self._kept[key] = process
        else:
            process.close()

    def close(self) -> None:
        for process in self._kept.values():
            process.close()
        self._kept.clear()

    def _start(self, environment: str, allocator: Allocator) -> Process:
        command = [python_of(environment), str(HERE / "worker.py")]
        folder = Path(tempfile.mkdtemp(prefix="worker-", dir=self._folder))
        # One setting of threads for every library that has its own; what the caller's shell holds must not differ.
        counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(self.threads))
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "PYTHON"))}
        quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
        return Process(command, folder, kept | counts | quiet | (TUNED if allocator == "tuned" else {}))
