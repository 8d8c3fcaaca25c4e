"""What a model remembers of the tokens it has read, as batch-first tensors: one row is one sequence.

Rows may have different lengths; left padding is never used. A state can be copied, its rows selected or
overwritten (admission and removal of sequences), counted in bytes, and saved. ``extend`` of the owning module
updates it in place.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from crocuta.errors import StateError


class State:
    """Base of all states: dataclasses whose fields are batch-first tensors, states, or lists of states."""

    def named_tensors(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """Every tensor under its dotted name; the first axis of each is the batch."""
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                yield prefix + field.name, value
            elif isinstance(value, State):
                yield from value.named_tensors(f"{prefix}{field.name}.")
            elif isinstance(value, list):
                for i, item in enumerate(value):
                    yield from item.named_tensors(f"{prefix}{field.name}.{i}.")

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for _, tensor in self.named_tensors())

    @property
    def batch(self) -> int:
        """Number of rows."""
        return next(self.named_tensors())[1].shape[0]

    def kind(self) -> tuple[object, ...]:
        """What two states must have in common to exchange rows, but for the shapes of their tensors."""
        return (type(self), *(name for name, _ in self.named_tensors()))

    def copy(self) -> Self:
        """An independent state with the same contents."""
        return self._mapped(torch.clone)

    def select(self, rows: Sequence[int] | Tensor) -> Self:
        """A new state made of the given rows, in the given order; a row may be given more than once."""
        index = self._index(rows)
        return self._mapped(lambda tensor: tensor.index_select(0, index.to(tensor.device)))

    def write(self, rows: Sequence[int] | Tensor, source: Self) -> None:
        """Overwrite the given rows, in order, with the rows of ``source``, a state of the same model and max_length."""
        index = self._index(rows)
        if self.kind() != source.kind():
            raise StateError("the rows to write belong to another model", fix="make both states with the same model")
        if len(index.unique()) != len(index) or len(index) != source.batch:
            raise StateError(
                "rows to write must be distinct and as many as the source has",
                given=f"rows {index.tolist()} and a source of {source.batch} rows",
            )
        pairs = list(zip(self.named_tensors(), source.named_tensors(), strict=True))
        for (name, mine), (_, theirs) in pairs:
            if mine.shape[1:] != theirs.shape[1:]:
                raise StateError(
                    f"states differ in {name!r}",
                    given=tuple(theirs.shape[1:]),
                    expected=tuple(mine.shape[1:]),
                    fix="make both with the same model and max_length",
                )
        for (_, mine), (_, theirs) in pairs:
            mine.index_copy_(0, index.to(mine.device), theirs.to(mine.device, mine.dtype))

    def _index(self, rows: Sequence[int] | Tensor) -> Tensor:
        index = torch.as_tensor(rows, dtype=torch.int64).cpu()
        if index.ndim != 1 or not bool(((index >= 0) & (index < self.batch)).all()):
            raise StateError(
                "no such rows in the state",
                given=index.tolist(),
                expected=f"a list of numbers from 0 to {self.batch - 1}",
            )
        return index

    def _mapped(self, fn: Callable[[Tensor], Tensor]) -> Self:
        changed: dict[str, Any] = {}
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changed[field.name] = fn(value)
            elif isinstance(value, State):
                changed[field.name] = value._mapped(fn)
            elif isinstance(value, list):
                changed[field.name] = [item._mapped(fn) for item in value]
        return dataclasses.replace(self, **changed)  # type: ignore[type-var]


@dataclass
class FIRState(State):
    """The last k - 1 inputs of a finite filter, oldest first, [b k-1 d]; zeros before the start."""

    tail: Tensor


@dataclass
class ModalState(State):
    """The modes of a modal filter, float32, [b d n 2] (re, im) or [b d n]."""

    modes: Tensor


@dataclass
class HistoryState(State):
    """All inputs of a filter without recurrence, float32, [b d p]; ``lengths`` [b] of them are valid."""

    inputs: Tensor
    lengths: Tensor


@dataclass
class AttentionState(State):
    """Rotated keys and values [b p m c]; ``lengths`` [b] of them are valid."""

    keys: Tensor
    values: Tensor
    lengths: Tensor


@dataclass
class HyenaState(State):
    """The short filter's inputs and the long filter's state."""

    short: FIRState
    long: State


@dataclass
class ModelState(State):
    """One state a block, and how many tokens each row has read (``lengths``, int64 on the CPU).

    ``model`` is the fingerprint of the configuration of the model that it belongs to.
    """

    layers: list[State]
    lengths: Tensor
    max_length: int | None
    model: str

    def kind(self) -> tuple[object, ...]:
        return (self.model,)

    def save(self, path: str | PathLike[str]) -> None:
        """Write a safetensors file that ``Model.load_state`` reads, of the same model only."""
        tensors = {name: tensor.contiguous() for name, tensor in self.named_tensors()}
        save_file(tensors, path, {"max_length": json.dumps(self.max_length), "model": self.model})


def fingerprint(config: object) -> str:
    """A short hash of a configuration."""
    return hashlib.sha256(repr(config).encode()).hexdigest()[:16]


def load_into(state: ModelState, path: str | PathLike[str]) -> ModelState:
    """Fill a fresh state, of the right model, batch and max_length, with a saved one. Raises StateError."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise StateError(f"cannot read the state {path}", given=error) from error
    wanted = dict(state.named_tensors())
    if wanted.keys() != tensors.keys() or any(wanted[name].shape != tensors[name].shape for name in wanted):
        raise StateError(f"the state {path} belongs to another model, batch or max_length")
    for name, tensor in tensors.items():
        wanted[name].copy_(tensor)
    return state


def saved_shape(path: str | PathLike[str]) -> tuple[str, int, int | None]:
    """Fingerprint of the model, number of rows and max_length of a saved state, without reading it whole."""
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            return (
                metadata["model"],
                file.get_slice("lengths").get_shape()[0],
                json.loads(metadata["max_length"]),
            )
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise StateError(
            f"{path} is not a saved state", given=error, expected="a file written by state.save"
        ) from error


def check_room(lengths: Tensor, added: Tensor | int, max_length: int, what: str) -> None:
    """StateError if a row would grow beyond what ``what`` was allocated for."""
    longest = int((lengths + added).max())
    if longest > max_length:
        raise StateError(
            f"the sequence is longer than the {what} state",
            given=f"{longest} tokens",
            expected=f"at most {max_length}",
            fix="make the state with a larger max_length",
        )
