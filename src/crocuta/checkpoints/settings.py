"""The configuration file of a foreign checkpoint: a mapping whose values are checked as they are asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from crocuta.checkpoints.strict import read_small, strict_json, strict_yaml
from crocuta.errors import ConfigError, MissingExtraError, WeightsFormatError

_REQUIRED: Final = object()
MAX_LAYERS: Final = 1_000
MAX_SIZE: Final = 1 << 24
"""Largest width, vocabulary or filter length that is taken for a size and not for damage."""


class Settings:
    """Values by key; a missing key, or null, gives the default. Every error is a ConfigError that names the file."""

    def __init__(self, path: object, values: Mapping[str, Any]):
        self.path, self.values = path, values

    def size(self, key: str, default: Any = _REQUIRED, *, most: int = MAX_SIZE) -> int:
        """A whole number from 1 to ``most``."""
        value = self._get(key, default)
        if type(value) is not int or not 1 <= value <= most:
            raise self.error(key, value, f"a whole number from 1 to {most}")
        return value

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        """A positive finite number."""
        value = self._get(key, default)
        if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
            raise self.error(key, value, "a positive number")
        return float(value)

    def flag(self, key: str, default: Any = _REQUIRED) -> bool:
        value = self._get(key, default)
        if type(value) is not bool:
            raise self.error(key, value, "true or false")
        return value

    def text(self, key: str, default: Any = _REQUIRED) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.error(key, value, "text")
        return value

    def layers(self, key: str, count: int) -> frozenset[int]:
        """The layer numbers below ``count`` that ``key`` lists; published files list some beyond the last."""
        value = self._get(key, [])
        if not isinstance(value, list) or not all(type(item) is int and item >= 0 for item in value):
            raise self.error(key, value, "a list of layer numbers")
        return frozenset(item for item in value if item < count)

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def section(self, key: str) -> Settings:
        """The mapping at ``key``."""
        value = self._get(key, {})
        if not isinstance(value, Mapping):
            raise self.error(key, value, "a mapping")
        return Settings(f"{self.path}: {key}", value)

    def refuse(self, key: str, allowed: Any, because: str) -> None:
        """ConfigError if ``key`` is set to anything but ``allowed``."""
        if self.has(key) and self.values[key] != allowed:
            raise self.error(key, self.values[key], f"{allowed!r}: {because}")

    def error(self, key: str, given: object, expected: str) -> ConfigError:
        return ConfigError(f"{self.path}: {key}", given=_short(given), expected=expected)

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None:
            if default is _REQUIRED:
                raise ConfigError(f"{self.path} lacks {key}")
            return default
        return value


def read_settings(path: Path) -> Settings:
    """The mapping in a JSON or YAML file. Raises WeightsFormatError (unreadable) or ConfigError (not such a file)."""
    data = read_small(path, WeightsFormatError)
    try:
        value = strict_json(data) if path.suffix == ".json" else strict_yaml(data.decode("utf-8"))
    except ValueError as error:
        raise ConfigError(
            f"{path} is not {'JSON' if path.suffix == '.json' else 'YAML'}", given=_short(error)
        ) from error
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{path} must hold a mapping", given=type(value).__name__)
    return Settings(path, value)


def peek_settings(path: Path) -> Mapping[str, Any]:
    """The values in ``path``, for detection: empty if the file is absent or cannot be read."""
    try:
        return read_settings(path).values if path.is_file() else {}
    except (ConfigError, WeightsFormatError, MissingExtraError):
        return {}


def find_yaml(folder: Path) -> Path | None:
    """``config.yml`` of a folder, or else the one file of another name that ends so."""
    for name in ("config.yml", "config.yaml"):
        if (folder / name).is_file():
            return folder / name
    found = sorted(path for suffix in ("yml", "yaml") for path in folder.glob(f"*.{suffix}") if path.is_file())
    return found[0] if len(found) == 1 else None


def _short(value: object) -> str:
    text = str(value) if isinstance(value, Exception) else repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
