"""Label names and their numbers, the same for the same names whatever order they were read in."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crocuta.data.files import replace_file
from crocuta.data.labelled import Example
from crocuta.data.splits import SPLITS, Splits
from crocuta.errors import InputError, SequenceFormatError

LABELS_FILE = "labels.json"
_MAX_BYTES = 8 << 20


@dataclass(frozen=True)
class LabelMap:
    """``names[i]`` is label i. Names are sorted: whole numbers by value, and otherwise by their code points."""

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(set(self.names)) != len(self.names) or len(self.names) < 2:
            given = ", ".join(map(repr, self.names))[:200] or "none"
            raise InputError("classes are missing", given=given, expected="at least two different names")

    @classmethod
    def of(cls, labels: Iterable[str]) -> LabelMap:
        """The map of the names that occur in ``labels``. Raises InputError for fewer than two."""
        names = set(labels)
        are_numbers = all(name.removeprefix("-").isdecimal() and str(int(name)) == name for name in names)
        return cls(tuple(sorted(names, key=int) if are_numbers else sorted(names)))

    def index(self, name: str) -> int:
        """The number of a label. Raises InputError for an unknown one."""
        try:
            return self.names.index(name)
        except ValueError:
            known = ", ".join(map(repr, self.names))[:200]
            raise InputError("unknown label", given=repr(name), expected=f"one of {known}") from None

    def save(self, folder: str | Path) -> None:
        """Write ``labels.json`` into ``folder``: {"labels": [...]}, whole or not at all."""
        with replace_file(Path(folder) / LABELS_FILE) as stream:
            stream.write((json.dumps({"labels": self.names}, indent=2, ensure_ascii=False) + "\n").encode())

    @classmethod
    def load(cls, folder: str | Path) -> LabelMap:
        """What ``save`` wrote. Raises SequenceFormatError for a missing or broken file."""
        path = Path(folder) / LABELS_FILE
        try:
            with open(path, "rb") as stream:
                value: Any = json.loads(stream.read(_MAX_BYTES).decode("utf-8"))
            names = value["labels"]
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise TypeError("labels must be a list of names")
        except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
            raise SequenceFormatError(
                f"cannot read {path}", given=repr(error)[:120], expected="saved labels"
            ) from error
        return cls(tuple(names))


def label_map(splits: Splits) -> LabelMap:
    """The map of the training labels, after checking that the other splits know no others.

    Raises:
        InputError: fewer than two classes in training, or a label that only another split has; names the example.
    """
    found = LabelMap.of(name for example in splits.train for name in names_of(example))
    for split in SPLITS[1:]:
        for example in splits[split]:
            for name in names_of(example):
                if name not in found.names:
                    raise InputError(
                        f"{example.where}: the label does not occur in training",
                        given=f"{name!r} in {split}",
                        expected=f"one of {', '.join(map(repr, found.names))[:200]}",
                    )
    return found


def names_of(example: Example) -> tuple[str, ...]:
    """The label names of an example, without the tokens that have none."""
    if isinstance(example.label, str):
        return (example.label,)
    return tuple(name for name in example.label if isinstance(name, str))
