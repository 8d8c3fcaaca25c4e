"""What a checkpoint format is: a way to recognise a path, and a way to read it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from torch import Tensor

from crocuta.checkpoints.files import TensorInfo
from crocuta.config import ModelConfig
from crocuta.tokenizers.base import Tokenizer


class TensorSource(Protocol):
    """Weights that are read one by one, under the names and in the layout of our own state dict."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """dtype and shape of every tensor, in the order in which reading is cheapest."""
        ...

    def read(self, name: str) -> Tensor:
        """The values, on the CPU, in memory of their own. Raises WeightsFormatError."""
        ...

    def close(self) -> None: ...


class Contents(NamedTuple):
    """What a checkpoint holds; whoever receives it closes ``tensors``."""

    config: ModelConfig
    tensors: TensorSource
    tokenizer: Tokenizer | None


@dataclass(frozen=True)
class Format:
    """One kind of checkpoint. ``looks_for`` says in words what ``detect`` checks."""

    name: str
    looks_for: str
    detect: Callable[[Path], bool]
    read: Callable[[Path], Contents]
