"""Labelled examples in three splits, explicit and disjoint: what decides a choice is never what reports the result."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, TypeAlias, get_args

from crocuta.data.labelled import Example, LabelKind, LabelledFormat, read_labelled
from crocuta.errors import ConfigError, InputError

SplitName: TypeAlias = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = get_args(SplitName)
SequenceKey: TypeAlias = Callable[[str], bytes]
"""Two sequences with the same key are the same to the model, and belong in one split."""


@dataclass(frozen=True, kw_only=True)
class FileSplits:
    """Three lists of files. Without test files there is no test result; nothing else takes their place."""

    type: ClassVar[str] = "files"
    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("train", "validation"):
            if not getattr(self, name):
                raise ConfigError(f"data.splits.{name} is empty", expected="at least one file")


@dataclass(frozen=True, kw_only=True)
class ColumnSplits:
    """Files whose examples say train, validation or test themselves (``LabelledFormat.split``)."""

    type: ClassVar[str] = "column"
    files: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.files:
            raise ConfigError("data.splits.files is empty", expected="at least one file")


@dataclass(frozen=True, kw_only=True)
class FractionSplits:
    """Shares of the examples for validation and test, by a hash of the sequence and ``seed``.

    Equal sequences fall in one split, and adding examples moves no other one. Shares are exact only on average. Related
    sequences (neighbours on a genome, homologues) may fall in different splits: where that matters, part them yourself.
    """

    type: ClassVar[str] = "fractions"
    files: tuple[str, ...]
    validation: float = 0.1
    test: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.files:
            raise ConfigError("data.splits.files is empty", expected="at least one file")
        sound = math.isfinite(self.validation + self.test) and self.validation > 0 and self.test >= 0
        if not (sound and self.validation + self.test < 1):
            given = f"validation={self.validation}, test={self.test}"
            raise ConfigError("the shares are impossible", given=given, expected="validation > 0, a sum below 1")


_DEFAULT_FORMAT = LabelledFormat()

SplitConfig: TypeAlias = FileSplits | ColumnSplits | FractionSplits


@dataclass(frozen=True)
class Splits:
    """The examples of each split in the order of the files."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]

    def __getitem__(self, name: SplitName) -> tuple[Example, ...]:
        examples: tuple[Example, ...] = getattr(self, name)
        return examples


def _as_it_stands(sequence: str) -> bytes:
    return sequence.encode("utf-8", errors="surrogatepass")


def files_of(config: SplitConfig) -> tuple[str, ...]:
    """Every file that ``config`` names."""
    match config:
        case FileSplits():
            return config.train + config.validation + config.test
        case ColumnSplits() | FractionSplits():
            return config.files


def read_splits(
    config: SplitConfig,
    kind: LabelKind,
    format: LabelledFormat = _DEFAULT_FORMAT,
    *,
    key: SequenceKey = _as_it_stands,
    allow_shared: bool = False,
) -> Splits:
    """The three splits of ``config``; ``allow_shared`` lets one sequence (by ``key``) stand in several.

    Raises:
        InputError: train or validation is empty; a sequence stands in two splits; an example names a split that does
            not exist, none where it must, or another than it was put in.
        and all that ``read_labelled`` raises.
    """
    match config:
        case FileSplits():
            parts = {name: _read_part(config, name, kind, format) for name in SPLITS}
        case ColumnSplits(files=files):
            parts = _by_column(read_labelled(files, kind, format), format)
        case FractionSplits(files=files):
            parts = _by_hash(read_labelled(files, kind, format), config, key)
    for name in ("train", "validation"):
        if not parts[name]:
            raise InputError(f"the {name} split is empty", expected="at least one example", fix=_how_to_fill(config))
    if not allow_shared:
        _check_disjoint(parts, key)
    return Splits(*(tuple(parts[name]) for name in SPLITS))


def _read_part(config: FileSplits, name: SplitName, kind: LabelKind, format: LabelledFormat) -> list[Example]:
    files = getattr(config, name)
    examples = read_labelled(files, kind, format) if files else []
    for example in examples:
        if example.split not in (None, name):
            raise InputError(
                f"{example.where} is among the files of {name} and names another split",
                given=repr(example.split),
                fix="use splits of type column, or name another field in data.format.split",
            )
    return examples


def _by_column(examples: list[Example], format: LabelledFormat) -> dict[SplitName, list[Example]]:
    parts: dict[SplitName, list[Example]] = {name: [] for name in SPLITS}
    for example in examples:
        found = [name for name in SPLITS if name == example.split]
        if not found:
            given = "none" if example.split is None else repr(example.split)
            what = f"{example.where}: the field {format.split!r} names no split"
            raise InputError(what, given=given, expected="train, validation or test")
        parts[found[0]].append(example)
    return parts


def _by_hash(examples: list[Example], config: FractionSplits, key: SequenceKey) -> dict[SplitName, list[Example]]:
    parts: dict[SplitName, list[Example]] = {name: [] for name in SPLITS}
    for example in examples:
        if example.split is not None:
            raise InputError(
                f"{example.where} names a split, which splits of type fractions would pass over",
                given=repr(example.split),
                fix="use splits of type column, or name another field in data.format.split",
            )
        place = _uniform(key(example.sequence), config.seed)
        name: SplitName = "test" if place < config.test else "train"
        if config.test <= place < config.test + config.validation:
            name = "validation"
        parts[name].append(example)
    return parts


def _uniform(key: bytes, seed: int) -> float:
    """A number in [0, 1) from SHA-256 of the seed and the sequence, the same on every machine."""
    digest = hashlib.sha256(f"{seed}:".encode() + key).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _check_disjoint(parts: dict[SplitName, list[Example]], key: SequenceKey) -> None:
    seen: dict[bytes, tuple[SplitName, Example]] = {}
    for name in SPLITS:
        for example in parts[name]:
            other, first = seen.setdefault(key(example.sequence), (name, example))
            if other != name:
                given = f"{_short(first)} in {other} and {_short(example)} in {name}"
                fix = "remove one, or allow it with data.allow_shared"
                raise InputError("a sequence stands in two splits", given=given, expected="splits apart", fix=fix)


def _short(example: Example) -> str:
    return example.where if example.id == example.where else f"{example.id!r} ({example.where})"


def _how_to_fill(config: SplitConfig) -> str:
    match config:
        case FileSplits():
            return "give it files with examples"
        case ColumnSplits(files=files):
            return f"mark some examples in {Path(files[0]).name}"
        case FractionSplits():
            return "give it a larger share, or more examples"
