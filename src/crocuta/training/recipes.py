"""Reading a run's description: one YAML or JSON file, then ``key=value`` overrides."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crocuta.checkpoints.strict import strict_json, strict_yaml
from crocuta.data.splits import SPLITS
from crocuta.errors import ConfigError, InputError
from crocuta.schema import decode, replace_path
from crocuta.training.config import TrainConfig
from crocuta.training.finetune_config import FineTuneConfig


def read_train_config(path: str | Path | None, overrides: Sequence[str] = ()) -> TrainConfig:
    """The run that the file and the overrides describe.

    Paths in the file are relative to the file, paths in overrides to the working folder. An override's value is
    read as JSON where it is JSON (``steps=10``, ``data.files=["a.fa"]``), else as text (``device=cuda``).

    Raises:
        InputError: the file does not exist. ConfigError: it is broken, or describes no run. MissingExtraError: a
        YAML file without PyYAML installed.
    """
    return decode(TrainConfig, _read(path, overrides))


def read_recipe(path: str | Path | None, overrides: Sequence[str] = ()) -> TrainConfig | FineTuneConfig:
    """``read_train_config`` for both kinds of description: one with a ``task`` is a fine-tune. Raises the same."""
    value = _read(path, overrides)
    return decode(FineTuneConfig, value) if "task" in value else decode(TrainConfig, value)


def _read(path: str | Path | None, overrides: Sequence[str]) -> dict[str, Any]:
    value = {} if path is None else _read_file(Path(path))
    if path is not None:
        _make_paths_absolute(value, Path(path).resolve().parent)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError("an override must look like key=value", given=repr(override))
        replace_path(value, key, _parse(text))
    return value


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _read_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}", given=error, fix="check the path") from error
    value = _read_json(path, text) if path.suffix == ".json" else _read_yaml(path, text)
    if not isinstance(value, dict):
        raise ConfigError(f"{path} does not describe a run", given=type(value).__name__, expected="a mapping")
    return value


def _read_json(path: Path, text: str) -> Any:
    try:
        return strict_json(text.encode())
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON", given=error) from error


def _read_yaml(path: Path, text: str) -> Any:
    try:
        return strict_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{path} is not YAML", given=error) from error


def _make_paths_absolute(value: dict[str, Any], folder: Path) -> None:
    data, model, tokenizer = (value.get(key) for key in ("data", "model", "tokenizer"))
    parts = data if isinstance(data, dict) else {}
    for owner in (parts, parts.get("splits")):
        for key in ("files", *SPLITS):
            if isinstance(owner, dict) and isinstance(owner.get(key), list):
                owner[key] = [
                    str(folder / item) if isinstance(item, str) and item != "-" else item for item in owner[key]
                ]
    for owner, key in ((model, "load"), (tokenizer, "file"), (parts.get("format"), "table")):
        if isinstance(owner, dict) and isinstance(owner.get(key), str):
            owner[key] = str(folder / owner[key])
