"""What the checks of every configuration share."""

from __future__ import annotations

import math

from crocuta.errors import ConfigError

_LARGEST = 1 << 40
"""More than any size, and little enough that torch can be asked for a few of them."""


def require(holds: bool, what: str, given: object, expected: str) -> None:
    """ConfigError unless ``holds``."""
    if not holds:
        raise ConfigError(what, given=given, expected=expected)


def positive(owner: str, **values: float | int | None) -> None:
    """ConfigError for a value that is not above 0, not finite, or beyond any machine."""
    for name, value in values.items():
        if isinstance(value, int) and value > _LARGEST:
            raise ConfigError(f"{owner}.{name} is impossible", given=str(value)[:20], expected=f"at most {_LARGEST}")
        finite = value is None or isinstance(value, int) or math.isfinite(value)
        require(finite and (value is None or value > 0), f"{owner}.{name} must be positive", value, "> 0")


def share(owner: str, **values: float) -> None:
    """ConfigError for a dropout or another share outside 0 <= value < 1."""
    for name, value in values.items():
        require(0 <= value < 1, f"{owner}.{name} is impossible", value, "0 <= value < 1")
