"""What a person sees while a model trains: a live panel on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from dataclasses import dataclass

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table


@dataclass
class Status:
    """The numbers on show."""

    step: int
    steps: int
    fraction: float
    loss_bits: float
    held_out_bits: float | None
    tokens_per_second: float
    seconds_left: float
    masked: bool = False
    """Whether both figures are of hidden tokens."""


class Display:
    """A live display on stderr; use with ``with``. On anything but a terminal it prints a line every 10 seconds."""

    INTERVAL = 10.0

    def __init__(self, title: str) -> None:
        self.console = Console(stderr=True)
        self._title = title
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=40), TextColumn("{task.percentage:>3.0f}%")
        )
        self._task = self._bar.add_task(title, total=1.0)
        self._live = (
            Live(console=self.console, refresh_per_second=4, transient=False) if self.console.is_terminal else None
        )
        self._last = float("-inf")

    def __enter__(self) -> Display:
        if self._live is not None:
            self._live.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def show(self, status: Status, *, final: bool = False) -> None:
        """Bring the display up to date."""
        if self._live is not None:
            self._bar.update(self._task, completed=status.fraction)
            self._live.update(Group(self._bar, _table(status)))
            return
        now = time.monotonic()
        if final or now - self._last >= self.INTERVAL:
            self._last = now
            self.say(_line(status))


def _fields(status: Status) -> dict[str, str]:
    loss, held_out = ("masked token",) * 2 if status.masked else ("token", "byte")
    return {
        "step": f"{status.step}/{status.steps}",
        f"loss (bits/{loss})": f"{status.loss_bits:.3f}",
        f"held-out (bits/{held_out})": "-" if status.held_out_bits is None else f"{status.held_out_bits:.3f}",
        "tokens/s": f"{status.tokens_per_second:,.0f}",
        "time left": duration(status.seconds_left),
    }


def _table(status: Status) -> Table:
    fields = _fields(status)
    table = Table(*fields, box=None, pad_edge=False)
    table.add_row(*fields.values())
    return table


def _line(status: Status) -> str:
    return "  ".join(f"{name} {value}" for name, value in _fields(status).items())


def duration(seconds: float) -> str:
    """m:ss."""
    whole = max(0, round(seconds))
    return f"{whole // 60}:{whole % 60:02d}"
