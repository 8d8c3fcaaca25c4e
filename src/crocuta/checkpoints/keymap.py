"""How a foreign checkpoint names and lays out what our state dict holds, as data, both ways.

    ours     blocks.1.mixer.qkv.weight
    theirs   blocks.1.inner_mha_cls.Wqkv.weight
    layouts  (Regroup(heads, 3),)          rows [head, q|k|v, size] -> [q|k|v, head, size]

A layout only moves numbers, so that ``store(load(x))`` is x, bit for bit. What a file computes differently, such as
taps under a decay, is not a layout: its format derives the tensor when it is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from crocuta.checkpoints.files import TensorInfo
from crocuta.errors import WeightsFormatError

SHOWN = 20
"""Names in a message; of the rest only the count."""


class Layout(Protocol):
    """A rearrangement of one tensor.

    Also of meta tensors, to know shapes; not by ``torch.cat``, which imports torch's compiler there (a second).
    """

    def load(self, tensor: Tensor) -> Tensor:
        """Their arrangement to ours."""
        ...

    def store(self, tensor: Tensor) -> Tensor:
        """Ours to theirs."""
        ...


@dataclass(frozen=True)
class Regroup:
    """Rows [outer, inner, rest] of theirs are [inner, outer, rest] in ours."""

    outer: int
    inner: int

    def load(self, tensor: Tensor) -> Tensor:
        return _swap(tensor, self.outer, self.inner)

    def store(self, tensor: Tensor) -> Tensor:
        return _swap(tensor, self.inner, self.outer)


@dataclass(frozen=True)
class SwapGates:
    """The first two thirds of the rows change places: x1 | x2 | v in theirs (hyena_flip_x1x2)."""

    def load(self, tensor: Tensor) -> Tensor:
        order = torch.tensor([1, 0, 2], device=tensor.device)
        return tensor.unflatten(0, (3, -1)).index_select(0, order).flatten(0, 1)

    def store(self, tensor: Tensor) -> Tensor:
        return self.load(tensor)


@dataclass(frozen=True)
class Squeeze:
    """Theirs has one more axis, of size 1, at ``axis``."""

    axis: int

    def load(self, tensor: Tensor) -> Tensor:
        return tensor.squeeze(self.axis)

    def store(self, tensor: Tensor) -> Tensor:
        return tensor.unsqueeze(self.axis)


@dataclass(frozen=True)
class Flip:
    """The last axis runs the other way: the last tap of theirs multiplies the current token, in ours the first."""

    def load(self, tensor: Tensor) -> Tensor:
        return tensor.flip(-1)

    def store(self, tensor: Tensor) -> Tensor:
        return tensor.flip(-1)


@dataclass(frozen=True)
class Padded:
    """Theirs has zeros after ours along ``axis``: ``whole`` in all, of which ours keeps ``kept``."""

    axis: int
    kept: int
    whole: int

    def load(self, tensor: Tensor) -> Tensor:
        return tensor.narrow(self.axis, 0, self.kept)

    def store(self, tensor: Tensor) -> Tensor:
        shape = list(tensor.shape)
        shape[self.axis] = self.whole
        padded = tensor.new_zeros(shape)
        padded.narrow(self.axis, 0, self.kept).copy_(tensor)
        return padded


def _swap(tensor: Tensor, outer: int, inner: int) -> Tensor:
    shape = tensor.shape
    return tensor.reshape(outer, inner, -1, *shape[1:]).transpose(0, 1).flatten(0, 2)


@dataclass(frozen=True)
class Entry:
    """One tensor of ours and the one of theirs that holds it.

    ``wide``: ours is float32 always, theirs has the dtype of the model.
    """

    ours: str
    theirs: str
    layouts: tuple[Layout, ...] = ()
    wide: bool = False

    def load(self, tensor: Tensor) -> Tensor:
        """Ours, maybe a view with strides of its own."""
        for layout in self.layouts:
            tensor = layout.load(tensor)
        return tensor

    def store(self, tensor: Tensor) -> Tensor:
        """Theirs, contiguous."""
        for layout in reversed(self.layouts):
            tensor = layout.store(tensor)
        return tensor.contiguous()


Entries: TypeAlias = Iterable[Entry]


@dataclass(frozen=True)
class KeyMap:
    """Every tensor of a checkpoint: those that are ours, repetitions of these, and what may be left out."""

    entries: tuple[Entry, ...]
    copies: Mapping[str, str] = field(default_factory=dict)
    """Keys that repeat another: they may be absent, and must hold the same values."""
    junk: tuple[str, ...] = ()
    """Patterns of keys that hold nothing that a model needs."""
    explained_by: Mapping[str, str] = field(default_factory=dict)
    """Patterns of keys to the fields of the configuration that decide whether they exist, and their shapes."""

    def check(self, path: object, found: Mapping[str, TensorInfo], wanted: Mapping[str, TensorInfo]) -> None:
        """Compare all names, shapes and kinds before any tensor is read.

        ``found`` is what the file holds, ``wanted`` our own state dict at its narrowest dtypes. Raises
        WeightsFormatError, which lists what is missing, unexpected, misshapen and of the wrong dtype, and the fields
        of the configuration that would explain it.
        """
        expected = {
            entry.theirs: TensorInfo(
                torch.bfloat16 if entry.wide else wanted[entry.ours].dtype,
                tuple(entry.store(torch.empty(wanted[entry.ours].shape, device="meta")).shape),
            )
            for entry in self.entries
        }
        repeated = {key: expected[source] for key, source in self.copies.items() if source in expected}
        names = {key for key in found if not self.is_junk(key)}
        known = expected | {key: info for key, info in repeated.items() if key in names}
        missing, unexpected = known.keys() - names, names - known.keys()
        shapes = {k: i for k, i in known.items() if k in names and found[k].shape != i.shape}
        kinds = {k: i for k, i in known.items() if k in names and not _acceptable(found[k].dtype, i.dtype)}
        listed = (
            _summary("missing", missing),
            _summary("unexpected", unexpected),
            _summary(
                "misshapen",
                [f"{k} has shape {list(found[k].shape)}, expected {list(i.shape)}" for k, i in shapes.items()],
            ),
            _summary(
                "of the wrong dtype",
                [f"{k} is {found[k].dtype}, expected {_kind(i.dtype)}" for k, i in kinds.items()],
            ),
        )
        if any(listed):
            fields = self._fields(missing | unexpected | shapes.keys())
            fix = "are these the configuration and the weights of one model?"
            fix += f" The fields that decide: {fields}" if fields else ""
            if not any(listed[:3]):
                fix = "filters and poles need the float32 that they were trained in: take them from the original file"
            text = ". ".join(filter(None, listed))
            raise WeightsFormatError(f"the weights of {path} do not fit its configuration: {text}", fix=fix)

    def is_junk(self, key: str) -> bool:
        """Whether ``key`` may be left out."""
        return any(re.fullmatch(pattern, key) for pattern in self.junk)

    def _fields(self, keys: Iterable[str]) -> str:
        keys = list(keys)
        fields = {text: None for p, text in self.explained_by.items() if any(re.fullmatch(p, key) for key in keys)}
        return ", ".join(fields)


def _summary(what: str, items: Iterable[str]) -> str:
    items = sorted(items)
    rest = f", and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return f"{len(items)} {what}: {', '.join(items[:SHOWN])}{rest}" if items else ""


def _acceptable(found: torch.dtype, floor: torch.dtype) -> bool:
    if not floor.is_floating_point:
        return found == floor
    return found.is_floating_point and found.itemsize >= floor.itemsize


def _kind(floor: torch.dtype) -> str:
    return f"floating point of at least {8 * floor.itemsize} bits" if floor.is_floating_point else str(floor)
