"""What a model remembers of the tokens it has read, as batch-first tensors: one row is one sequence.

Rows may have different lengths; left padding is never used. Sequences come and go by row: ``join`` admits the rows
of other states, ``without`` removes rows, ``select`` orders and forks them, ``write`` overwrites them. A state can
be copied, counted in bytes, saved, and asked where it is not finite. ``extend`` of the owning module updates it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, Self, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from crocuta.errors import StateError
from crocuta.ops.kernels.online_conv import OnlineFilter
from crocuta.ops.online_conv import OnlineBuffers


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

    def without(self, rows: Sequence[int] | Tensor) -> Self:
        """A new state of all other rows, in their order; without all of them it has none, and ``join`` may add some."""
        removed = set(self._index(rows).tolist())
        return self.select([row for row in range(self.batch) if row not in removed])

    def join(self, others: Sequence[Self]) -> Self:
        """A new state: these rows, then those of ``others``, of the same model and max_length. Raises StateError."""
        for other in others:
            self._check_fits(other)
        columns = zip(*(state.named_tensors() for state in (self, *others)), strict=True)
        joined = iter([torch.cat([t.to(column[0][1]) for _, t in column]) for column in columns])
        return self._mapped(lambda _: next(joined))

    def write(self, rows: Sequence[int] | Tensor, source: Self) -> None:
        """Overwrite the given rows, in order, with the rows of ``source``, a state of the same model and max_length."""
        index = self._index(rows)
        self._check_fits(source)
        if len(index.unique()) != len(index) or len(index) != source.batch:
            raise StateError(
                "rows to write must be distinct and as many as the source has",
                given=f"rows {index.tolist()} and a source of {source.batch} rows",
            )
        for (_, mine), (_, theirs) in zip(self.named_tensors(), source.named_tensors(), strict=True):
            mine.index_copy_(0, index.to(mine.device), theirs.to(mine.device, mine.dtype))

    def fill(self, source: Self) -> None:
        """Copy ``source``, a state of the same model and as many rows but another max_length.

        Buffers are copied as far as both reach; ``Model.with_room`` sees to it that they reach far enough. A state
        whose tensors depend on max_length in another way than by their size has a ``fill`` of its own.
        """
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            mine, theirs = getattr(self, field.name), getattr(source, field.name)
            if isinstance(mine, Tensor):
                both = tuple(slice(min(sizes)) for sizes in zip(mine.shape, theirs.shape, strict=True))
                mine[both] = theirs[both]
            elif isinstance(mine, State):
                mine.fill(theirs)
            elif isinstance(mine, list):
                for item, other in zip(mine, theirs, strict=True):
                    item.fill(other)

    def non_finite_rows(self, prefix: str = "") -> Iterator[tuple[str, list[int]]]:
        """The dotted name of each tensor that holds a NaN or an infinity, and the rows that do."""
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                finite = torch.isfinite(self._meant(value)).flatten(1).all(1) if value.ndim > 1 else value.isfinite()
                if not finite.all():
                    yield prefix + field.name, (~finite).nonzero()[:, 0].tolist()
            elif isinstance(value, State):
                yield from value.non_finite_rows(f"{prefix}{field.name}.")
            elif isinstance(value, list):
                for i, item in enumerate(value):
                    yield from item.non_finite_rows(f"{prefix}{field.name}.{i}.")

    @property
    def room(self) -> int | None:
        """The max_length of a whole model's state; its parts know theirs by the sizes of their buffers."""
        return None

    def _meant(self, tensor: Tensor) -> Tensor:
        """``tensor`` without whatever happens to lie in it past the ends of its rows."""
        return tensor

    def _check_fits(self, source: Self) -> None:
        if self.kind() != source.kind():
            raise StateError("the rows to write belong to another model", fix="make both states with the same model")
        for (name, mine), (_, theirs) in zip(self.named_tensors(), source.named_tensors(), strict=True):
            if mine.shape[1:] != theirs.shape[1:]:
                raise StateError(
                    f"states differ in {name!r}",
                    given=tuple(theirs.shape[1:]),
                    expected=tuple(mine.shape[1:]),
                    fix="make both with the same model and max_length",
                )
        if self.room != source.room:
            raise StateError(
                "states differ in max_length", given=source.room, expected=self.room, fix="use model.with_room"
            )

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
class OnlineState(State):
    """The buffers of an online convolution, [b d p] and [b c d], float32; ``lengths`` [b] counts the inputs read.

    On a CPU ``long`` has its channels side by side in memory, as the compiled step wants it: given otherwise, as from
    a file or of selected rows, it is laid out anew.
    """

    long: Tensor
    near: Tensor
    lengths: Tensor

    def __post_init__(self) -> None:
        if self.long.device.type == "cpu":
            self.long = self.long.transpose(1, 2).contiguous().transpose(1, 2)
        self.buffers = OnlineBuffers(self.long, self.near)
        """The same memory as the op wants it. Both are written in place, never replaced."""
        self.filter: OnlineFilter | None = None
        """The filter's taps, as last looked up."""

    def writable(self) -> OnlineBuffers:
        """The buffers for a kernel to write into, which autograd does not see: copies if it watches them."""
        if self.long.requires_grad or self.near.requires_grad:
            self.long, self.near = self.long.detach().clone(), self.near.detach().clone()
            self.__post_init__()
        return self.buffers

    def fill(self, source: Self) -> None:
        """As for any state, but a buffer may have cut off outputs that were to come: as many as a tile has brought."""
        reach = 1 << (max(1, int(source.lengths.max())) - 1).bit_length()
        if source.long.shape[2] < min(reach, self.long.shape[2]):
            raise StateError(
                "the state of an online convolution cannot grow any more",
                given=f"room for {source.long.shape[2]} tokens",
                expected=f"at least {reach}, where tokens beyond are to be read",
                fix="make the state with a max_length that is a power of two",
            )
        super().fill(source)


@dataclass
class AttentionState(State):
    """Rotated keys and values [b p m c]; ``lengths`` [b] of them are valid."""

    keys: Tensor
    values: Tensor
    lengths: Tensor

    def _meant(self, tensor: Tensor) -> Tensor:
        if tensor is self.lengths:
            return tensor
        past = torch.arange(tensor.shape[1]) >= self.lengths[:, None]
        return tensor.masked_fill(past.to(tensor.device)[:, :, None, None], 0)


@dataclass
class PlacedAttentionState(State):
    """Keys and values as in ``AttentionState``, and where each row's next token stands, on their device [b]."""

    keys: Tensor
    values: Tensor
    positions: Tensor


@dataclass
class HyenaState(State):
    """The short filter's inputs and the long filter's state."""

    short: FIRState
    long: State


@dataclass
class HyenaStates(State):
    """The short filter's inputs and the state of each long filter."""

    short: FIRState
    long: list[State]


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

    @property
    def room(self) -> int | None:
        return self.max_length

    def non_finite(self, rows: Sequence[int] | None = None) -> list[str]:
        """Where the state holds a NaN or an infinity, as "block 3, long.modes, row 2"; nowhere is an empty list.

        In the order of the blocks, which are numbered from 0 as in the names of weights: the first is where it began.
        ``rows`` are the names of the rows, by default their numbers.
        """
        names = range(self.batch) if rows is None else rows
        return [
            f"block {block}, {name}, row {names[row]}"
            for block, layer in enumerate(self.layers)
            for name, bad in layer.non_finite_rows()
            for row in bad
        ]

    def save(self, path: str | PathLike[str]) -> None:
        """Write a safetensors file that ``Model.load_state`` reads, of the same model only. Raises StateError."""
        save_state(self, self, path)


S = TypeVar("S", bound=State)


def fingerprint(config: object) -> str:
    """A short hash of a configuration."""
    return hashlib.sha256(repr(config).encode()).hexdigest()[:16]


def save_state(state: State, owner: ModelState, path: str | PathLike[str]) -> None:
    """Write a state, whose model and max_length are those of ``owner``, as safetensors. Raises StateError."""
    if not state.batch:
        raise StateError(f"there is nothing to save in {path}", given="a state without rows")
    tensors = {name: tensor.contiguous() for name, tensor in state.named_tensors()}
    try:
        save_file(tensors, path, {"max_length": json.dumps(owner.max_length), "model": owner.model})
    except (OSError, SafetensorError) as error:
        raise StateError(f"cannot write the state {path}", given=error) from error


@dataclass(frozen=True)
class SavedState:
    """What the head of a saved state says: the fingerprint of its model, and its tensors' shapes by name."""

    model: str
    max_length: int | None
    shapes: Mapping[str, tuple[int, ...]]


def read_head(path: str | PathLike[str]) -> SavedState:
    """The head of a saved state, without reading it whole. Raises StateError for a file that is none."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            model, room = metadata["model"], json.loads(metadata["max_length"])
        if room is not None and (type(room) is not int or room < 1):
            raise ValueError(f"max_length={room}")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise StateError(f"{path} is not a saved state", given=error, expected="a file written by save") from error
    return SavedState(model, room, shapes)


def load_state(like: S, path: str | PathLike[str], device: torch.device, lengths: str = "lengths") -> S:
    """The state in a file, with the shapes and dtypes of ``like``, whose tensors may be empty ones on "meta".

    Those go to ``device``, others to where they are in ``like``; ``lengths`` is the name of the model's lengths.
    Raises StateError for other names or shapes, and for lengths that cannot be.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise StateError(f"cannot read the state {path}", given=error) from error
    wanted = dict(like.named_tensors())
    if wanted.keys() != tensors.keys() or any(wanted[name].shape != tensors[name].shape for name in wanted):
        raise StateError(f"the state {path} belongs to another model, batch or max_length")
    _check_lengths(tensors, lengths, like.room, path)
    # Copies, because what is read is mapped: a file that is written anew would change it, or end the process.
    placed = [(tensors[n], device if t.is_meta else t.device, t.dtype) for n, t in wanted.items()]
    loaded = iter([tensor.to(place, dtype, copy=True) for tensor, place, dtype in placed])
    return like._mapped(lambda _: next(loaded))


def _check_lengths(tensors: Mapping[str, Tensor], whole: str, room: int | None, path: str | PathLike[str]) -> None:
    """StateError for rows longer than the room, and for layers that have read more than the model, or less than 0."""
    longest = int(tensors[whole].max())
    if room is not None and longest > room:
        raise StateError(f"the state {path} is damaged", given=f"{longest} tokens", expected=f"at most {room}")
    for name, tensor in tensors.items():
        if name.split(".")[-1] == "lengths" and not bool(((tensor >= 0) & (tensor <= tensors[whole])).all()):
            raise StateError(f"the state {path} is damaged", given=f"{name} of {tensor.tolist()}")


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
