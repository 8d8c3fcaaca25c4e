"""A disk whose k-th operation goes wrong, to put in the place of ``crocuta.checkpoints.commit.disk``."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

from crocuta.checkpoints.commit import Disk

MODES = ("crash before", "crash after", "crash within", "no space", "input/output error", "short write")
CRASHES = MODES[:3]
_ERRORS = {"no space": errno.ENOSPC, "input/output error": errno.EIO}
_METHODS = [name for name in vars(Disk) if not name.startswith("_")]


class Crash(BaseException):
    """The process died here: nothing that it would have done later happens."""


class FailingDisk(Disk):
    """Does everything but forcing to the disk, notes every operation, and fails at number ``fail_at``."""

    def __init__(self, fail_at: int | None = None, mode: str = "") -> None:
        self.fail_at, self.mode = fail_at, mode
        self.operations: list[str] = []
        self.crashed = False

    def perform(self, name: str, *arguments: Any) -> Any:
        if name == "close":
            os.close(arguments[0])  # whatever happens, the test itself must not run out of descriptors
        if self.crashed:
            raise Crash
        failing = len(self.operations) == self.fail_at
        self.operations.append(" ".join([name, *(str(a) for a in arguments if isinstance(a, Path))]))
        if failing and self.mode in _ERRORS:
            raise OSError(_ERRORS[self.mode], os.strerror(_ERRORS[self.mode]))
        if failing and self.mode == "short write" and name == "write":
            return os.write(arguments[0], arguments[1][: (len(arguments[1]) + 1) // 2])
        if failing and self.mode == "crash within":
            self._half(name, *arguments)
        if failing and self.mode in ("crash before", "crash within"):
            self._crash()
        result = None
        if name not in ("close", "sync", "sync_path"):
            result = getattr(Disk, name)(self, *arguments)
        if failing and self.mode == "crash after":
            self._crash()
        return result

    def _half(self, name: str, *arguments: Any) -> None:
        if name == "write":
            os.write(arguments[0], arguments[1][: len(arguments[1]) // 2])
        if name == "remove_tree":
            for path in sorted(arguments[0].iterdir())[::2]:
                path.unlink()

    def _crash(self) -> None:
        self.crashed = True
        raise Crash


def _wrap(name: str) -> Any:
    return lambda self, *arguments: self.perform(name, *arguments)


for _name in _METHODS:
    setattr(FailingDisk, _name, _wrap(_name))
