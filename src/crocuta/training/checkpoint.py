"""Training checkpoints that survive kill -9, a full disk and flipped bits.

A checkpoint is a sealed folder ``step-00000100``: a safetensors file for each group of tensors, and a state.json.
It is reported only once its name is on the disk; an older one is removed only after its successors have been
verified. The newest one is found by looking, not by following a pointer that could lie.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from torch import Tensor

from crocuta.checkpoints import commit
from crocuta.checkpoints.files import read_tensors, write_tensors
from crocuta.checkpoints.strict import read_small, strict_json
from crocuta.errors import CheckpointError, CrocutaError, InputError

logger = logging.getLogger(__name__)

STATE_FILE: Final = "state.json"
LOCK_FILE: Final = "trainer.lock"
_STEP_FOLDER = re.compile(r"step-(\d{8,18})(?:-(\d{1,6}))?")
_GROUP = re.compile(r"[A-Za-z0-9_-]{1,64}")
_HEADER = {"format": "crocuta-training", "version": 1}


@dataclass(frozen=True)
class Restored:
    """A checkpoint that was read: ``tensors[group][name]`` on the CPU, and ``state`` as JSON values."""

    step: int
    path: Path
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


class TrainingCheckpoints:
    """The checkpoints in ``folder``, owned by one trainer at a time; the newest ``keep`` good ones stay.

    Made if absent; what a dead trainer left unfinished is removed. Close it, or use ``with``, to let the next
    trainer in; the end of the process, however it comes, does the same.

    Raises:
        InputError: ``keep`` is below 2 (one more than none would leave nothing to fall back on).
        CheckpointError: another trainer holds the folder, or it cannot be written.
    """

    def __init__(self, folder: Path, keep: int = 2):
        if keep < 2:
            raise InputError("too few checkpoints to keep", given=keep, expected=">= 2", fix="a bad one needs a spare")
        self.folder = Path(folder).resolve()
        self.keep = keep
        commit.make_folders(self.folder)
        self._lock = _FolderLock(self.folder / LOCK_FILE)
        commit.remove_unfinished(self.folder, "step-")

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
        """Write a checkpoint of ``step`` and return its folder, which no crash can take away any more.

        Saving a step again adds a newer folder for it. Tensors are written as they are now, bit for bit.

        Raises:
            InputError: a group name, tensor or state value that the files cannot hold.
            CheckpointError: the disk refused; earlier checkpoints are untouched, nothing half-done stays.
        """
        for group in tensors:
            if not _GROUP.fullmatch(group):
                raise InputError("name of a group of tensors", given=repr(group), expected=_GROUP.pattern)
        _check_plain(dict(state), "state")
        text = json.dumps({**_HEADER, "step": step, "state": dict(state)}, allow_nan=False, indent=1) + "\n"

        def write(folder: Path) -> None:
            for group, named in tensors.items():
                write_tensors(folder / f"{group}.safetensors", named)
            commit.replace_file(folder / STATE_FILE, text.encode())

        target = self._new_folder(step)
        commit.write_folder(target, write)
        self._prune(target)
        return target

    def latest(self) -> Restored | None:
        """The newest checkpoint that verifies, or None where there is none at all; see ``read_latest``."""
        return read_latest(self.folder)

    def close(self) -> None:
        """Let the next trainer in."""
        self._lock.release()

    def __enter__(self) -> TrainingCheckpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _new_folder(self, step: int) -> Path:
        if not 0 <= step < 10**18:
            raise InputError("impossible step", given=step, expected="0 <= step < 10^18")
        repeats = [repeat for found, repeat, _ in _candidates(self.folder) if found == step]
        return self.folder / (f"step-{step:08d}" + (f"-{max(repeats) + 1}" if repeats else ""))

    def _prune(self, newest: Path) -> None:
        """Remove verified checkpoints beyond ``keep`` verified ones; bad ones neither count nor go."""
        good = 1  # the newest: it was hashed a moment ago
        for path in [path for _, _, path in _candidates(self.folder) if path != newest]:
            try:
                commit.verify_folder(path)
                good += 1
                if good > self.keep:
                    doomed = commit.temporary_path(path)
                    commit.disk.rename(path, doomed)  # first, so that no half of a checkpoint has a good name
                    commit.disk.sync_path(self.folder)
                    commit.disk.remove_tree(doomed)
            except (CheckpointError, OSError) as error:
                logger.info("keeping %s as it is: %s", path, error)


def read_latest(folder: Path) -> Restored | None:
    """The newest checkpoint in ``folder`` whose every byte verifies, or None where there is none at all.

    A bad one is passed over with a warning in the log that says which and why. Takes no lock.

    Raises:
        CheckpointError: there are checkpoints and none of them is good.
    """
    failures = []
    for step, _, path in _candidates(folder):
        try:
            return _read(path, step)
        except CrocutaError as error:
            failures.append(f"{path.name}: {error}")
            logger.warning("passing over a bad checkpoint, %s", failures[-1])
    if failures:
        given = " | ".join(failures[:3]) + (f" | and {len(failures) - 3} more" if len(failures) > 3 else "")
        fix = "restore one from a copy, or start in a new folder"
        raise CheckpointError(f"no checkpoint in {folder} can be read", given=given, fix=fix)
    return None


def _candidates(folder: Path) -> list[tuple[int, int, Path]]:
    """(step, repeat, path) of everything that is named like a checkpoint, newest first."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"cannot read {folder}", given=error.strerror) from error
    matches = [match for match in map(_STEP_FOLDER.fullmatch, names) if match]
    return sorted(((int(m[1]), int(m[2] or 1), Path(folder) / m[0]) for m in matches), reverse=True)


def _read(path: Path, step: int) -> Restored:
    names = commit.verify_folder(path)
    try:
        content = strict_json(read_small(path / STATE_FILE, CheckpointError))
        found = {key: content[key] for key in (*_HEADER, "step")}
        state = content["state"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / STATE_FILE} cannot be read", given=repr(error)[:200]) from error
    if found != {**_HEADER, "step": step}:
        raise CheckpointError(
            f"{path / STATE_FILE} is of another kind", given=found, expected={**_HEADER, "step": step}
        )
    groups = [name.removesuffix(".safetensors") for name in names if name.endswith(".safetensors")]
    return Restored(step, path, {group: read_tensors(path / f"{group}.safetensors") for group in groups}, state)


def _check_plain(value: Any, where: str) -> None:
    """Refuse what would come back from JSON as something else (tuples come back as lists)."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise InputError(f"key of {where}", given=f"{key!r} ({type(key).__name__})", expected="a string")
            _check_plain(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_plain(item, f"{where}[{index}]")
    elif type(value) not in (str, int, bool, float, type(None)) or (type(value) is float and not math.isfinite(value)):
        given = f"{value!r} ({type(value).__name__})"
        raise InputError(f"{where} is no JSON value", given=given, expected="text, a finite number, true, false, null")


# --- one trainer a folder ------------------------------------------------------------------------------------


_held: set[Path] = set()


class _FolderLock:
    """A lock that the system drops when the process dies, so that it is never stale and never lost.

    The file names its holder (pid and start time), for the one who is refused. A POSIX record lock: processes
    forked for loading data do not inherit it, so they cannot keep it alive after the trainer's death.
    """

    def __init__(self, path: Path):
        import fcntl  # not on Windows

        if path in _held:  # the system would grant it again to the same process
            raise self._refusal(path, "this process")
        with commit.reporting_writes(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = os.read(descriptor, 200).decode("utf-8", "replace")
            os.close(descriptor)
            raise self._refusal(path, holder) from None
        except OSError as error:  # some network file systems
            logger.warning("no locks on this file system (%s): let only one trainer use %s", error, path.parent)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"pid {os.getpid()}, started {time.strftime('%Y-%m-%d %H:%M:%S')}".encode())
        _held.add(path)
        self.release = weakref.finalize(self, _release, path, descriptor, os.getpid())

    @staticmethod
    def _refusal(path: Path, holder: str) -> CheckpointError:
        fix = "stop it, or use another folder"
        return CheckpointError(f"{path.parent} is in use by another trainer", given=holder, expected="none", fix=fix)


def _release(path: Path, descriptor: int, owner: int) -> None:
    os.close(descriptor)
    if os.getpid() == owner:  # a forked child must not touch its parent's lock
        _held.discard(path)
