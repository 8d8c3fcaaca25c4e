"""What a checkpoint format is: a way to recognise a path, and a way to read it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, TypeAlias

from torch import Tensor

from crocuta.checkpoints.files import TensorInfo
from crocuta.checkpoints.keymap import KeyMap
from crocuta.config import BackboneConfig
from crocuta.tokenizers.base import Tokenizer


class TensorSource(Protocol):
    """Weights that are read one by one, under the names and in the layout of their file."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """dtype and shape of every tensor, in the order in which reading is cheapest."""
        ...

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The values, or ``rows`` of the first axis, on the CPU, in memory of their own. Raises WeightsFormatError."""
        ...

    def close(self) -> None: ...


FilterLayout: TypeAlias = Literal["interleaved", "by_convolution"]
"""Which output of a filter network is filter c of convolution i, of C: c · C + i, or i · channels + c."""


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """What a user may choose about a published checkpoint, see ``load``."""

    fp8: Literal["auto", "off"] = "auto"
    keep_padding: bool = False
    filter_layout: FilterLayout | None = None


class Contents(NamedTuple):
    """What a checkpoint holds; whoever receives it closes ``tensors``.

    ``key_map`` None: the names and layouts are those of our own state dict.
    """

    config: BackboneConfig
    tensors: TensorSource
    tokenizer: Tokenizer | None
    key_map: KeyMap | None = None


@dataclass(frozen=True)
class Format:
    """One kind of checkpoint. ``looks_for`` says in words what ``detect`` checks; ``detect`` never raises."""

    name: str
    looks_for: str
    detect: Callable[[Path], bool]
    read: Callable[[Path, ReadOptions], Contents]
