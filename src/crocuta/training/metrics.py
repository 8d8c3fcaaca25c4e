"""What a run writes about itself: one JSON object a line, and TensorBoard where asked."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from crocuta.checkpoints import commit
from crocuta.errors import MissingExtraError


class Metrics:
    """Appends to metrics.jsonl; what the run will write again is dropped first, so that no line stands twice.

    That is everything after ``resume_step``, and the "final" line, which a run killed while it finished has written.
    """

    def __init__(self, folder: Path, *, resume_step: int | None, tensorboard: bool) -> None:
        path = folder / "metrics.jsonl"
        kept = [] if resume_step is None or not path.exists() else _lines_until(path, resume_step)
        commit.remove_unfinished(folder, path.name)
        commit.replace_file(path, "".join(kept).encode())  # whole or not at all, as a kill may come here, too
        self._file = path.open("a", encoding="utf-8")
        self._board = _board(folder) if tensorboard else None

    def write(self, event: str, step: int, **values: float | int | str | bool | list[str]) -> None:
        """One line {"event", "step", ...}; numbers that are not finite are written as text, never hidden."""
        record = {"event": event, "step": step} | {k: _plain(v) for k, v in values.items()}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, float | int) and not isinstance(value, bool):
                    self._board.add_scalar(f"{event}/{name}", value, step)

    def close(self) -> None:
        """Flush everything to disk."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _lines_until(path: Path, step: int) -> list[str]:
    """Whole lines of steps up to ``step`` but the final one; a line cut off by a crash is dropped."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            record = json.loads(line) if line.endswith("\n") else {"step": math.inf}
            if record["step"] <= step and record["event"] != "final":
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    return kept


def _board(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtraError("tensorboard=true needs TensorBoard", fix="pip install 'crocuta[train]'") from error
    return SummaryWriter(str(folder / "tensorboard"))
