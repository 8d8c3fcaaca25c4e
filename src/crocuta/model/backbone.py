"""What models and encoders share: blocks, the final norm, and reading a sequence whole or in pieces."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from os import PathLike
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from crocuta.config import BackboneConfig
from crocuta.errors import InputError, StateError
from crocuta.model.block import Block
from crocuta.model.norm import build_norm
from crocuta.model.state import ModelState, SavedState, State, check_room, fingerprint, load_state, read_head
from crocuta.types import Hidden


class Backbone(nn.Module, ABC):
    """An input layer, blocks and a norm; ``hidden`` of a sequence equals ``extend_hidden`` of its pieces."""

    def __init__(self, config: BackboneConfig, embedding: nn.Module) -> None:
        super().__init__()
        self.config: Any = config
        self._fingerprint, self._limit = fingerprint(config), config.max_length
        self.checkpoint_activations = False
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.embedding = embedding
        self.blocks = nn.ModuleList(Block(block, config.hidden_size, config.precision) for block in config.blocks)
        self.norm = build_norm(config.norm, config.hidden_size, config.precision)

    @abstractmethod
    def _check_input(self, x: Tensor) -> None:
        """InputError unless the input [b l ...] is what the model reads."""

    @abstractmethod
    def _embed(self, x: Tensor) -> Hidden:
        """The input as the blocks want it."""

    def hidden(self, x: Tensor, layer: int | None = None, lengths: Int[Tensor, " b"] | None = None) -> Hidden:
        """Hidden states: after the final norm (None), or the residual stream: 0 the embedding, k after block k.

        Negative numbers count from the last block (-1). Blocks above ``layer`` are not computed. Positions past
        ``lengths[row]`` are padding on the right, whose hidden states mean nothing and which no other one depends on.
        """
        self._check_input(x)
        if lengths is not None:
            check_lengths(x, lengths)
        y = self._embed(x)
        for block in self._blocks_below(layer):
            recompute = self.checkpoint_activations and self.training and torch.is_grad_enabled()
            y = checkpoint(block, y, lengths, use_reentrant=False) if recompute else block(y, lengths)
        return self.norm(y)[1] if layer is None else y

    def init_state(self, batch: int, max_length: int | None = None) -> ModelState:
        """The state of ``batch`` rows before their first token.

        ``max_length`` is the longest sequence a row may reach; models without attention and implicit filters need
        none and keep constant memory for ever. Raises StateError, also for models that look ahead, or InputError.
        """
        for name, value in (("batch", batch), ("max_length", max_length)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise InputError(f"{name} must be a positive whole number", given=value)
        return self._state(batch, max_length, self.norm.scale.device)

    def with_room(self, state: ModelState, max_length: int) -> ModelState:
        """A copy of ``state`` for rows of up to ``max_length`` tokens, more or fewer than it was made for.

        Raises StateError if a row is longer already, or for another model's state.
        """
        self.check_owner(state)
        check_room(state.lengths, 0, max_length, "new")
        larger = self.init_state(state.batch, max_length)
        larger.fill(state)
        return larger

    def extend_hidden(
        self, x: Tensor, state: ModelState, lengths: Int[Tensor, " b"] | None = None, layer: int | None = None
    ) -> Hidden:
        """Read the next tokens of each row: their hidden states (see ``hidden``), and ``state`` moved on.

        ``lengths[row]`` tokens of a row are real, the rest is padding on the right. With ``layer`` the blocks above it
        are not run and their states stay behind: keep to one layer a state. Raises InputError for bad input,
        StateError when the batch differs or a row outgrows the state.
        """
        self._check_input(x)
        if not isinstance(state, ModelState):
            raise StateError("there is no state to extend", given=type(state).__name__, fix="use model.init_state")
        if state.batch != x.shape[0]:
            raise StateError(
                "the state has another number of rows than the input",
                given=f"{x.shape[0]} rows",
                expected=f"{state.batch} rows",
            )
        self.check_owner(state)
        added = torch.full((x.shape[0],), x.shape[1]) if lengths is None else check_lengths(x, lengths)
        self._check_room(state, added)
        y = self.advance(x, state.layers, lengths, layer)
        state.lengths = state.lengths + added
        return y

    def advance(
        self, x: Tensor, layers: Sequence[State], lengths: Int[Tensor, " b"] | None = None, layer: int | None = None
    ) -> Hidden:
        """``extend_hidden`` without its checks and without counting what was read: the part that a device can do."""
        y = self._embed(x)
        for block, layer_state in zip(self._blocks_below(layer), layers, strict=False):
            y = block.extend(y, layer_state, lengths)
        return self.norm(y)[1] if layer is None else y

    def load_state(self, path: str | PathLike[str]) -> ModelState:
        """A state written by ``state.save(path)``. Raises StateError if it is another model's."""
        head = read_head(path)
        return load_state(self.state_like(head, path), path, self.norm.scale.device)

    def state_like(self, head: SavedState, path: str | PathLike[str], lengths: str = "lengths") -> ModelState:
        """A state as the head of a file describes it, of tensors without memory: a damaged head allocates nothing.

        ``lengths`` is the name that the model's lengths have in the file. Raises StateError if it is another model's.
        """
        if head.model != self._fingerprint:
            raise StateError(f"the state {path} belongs to a model with another configuration")
        if len(head.shapes.get(lengths, ())) != 1:
            raise StateError(f"the state {path} is damaged", given=f"no row of {lengths}")
        return self._state(head.shapes[lengths][0], head.max_length, torch.device("meta"))

    def check_owner(self, state: ModelState, name: str = "the state") -> None:
        """StateError, naming it, for a state of a model with another configuration."""
        if state.model != self._fingerprint:
            raise StateError(f"{name} belongs to a model with another configuration", fix="make it with this model")

    def _state(self, batch: int, max_length: int | None, device: torch.device) -> ModelState:
        dtype = self.norm.scale.dtype
        layers = [block.init_state(batch, max_length, device=device, dtype=dtype) for block in self._blocks_below(None)]
        return ModelState(layers, torch.zeros(batch, dtype=torch.int64), max_length, self._fingerprint)

    def _blocks_below(self, layer: int | None) -> list[Block]:
        """The blocks that ``hidden(layer=layer)`` runs."""
        count = len(self.blocks)
        if layer is not None and not -count <= layer <= count:
            raise InputError(
                "no such layer", given=f"layer={layer}", expected=f"None or a number from {-count} to {count}"
            )
        last = count if layer is None else layer if layer >= 0 else count + 1 + layer
        return [block for block in self.blocks if isinstance(block, Block)][:last]

    def _check_room(self, state: ModelState, added: Tensor) -> None:
        """Before any layer reads: an error must leave every part of the state where it was."""
        if state.max_length is not None:
            check_room(state.lengths, added, state.max_length, "model's")
        longest = int((state.lengths + added).max())
        if self._limit is not None and longest > self._limit:
            raise StateError(
                "the sequence is longer than the model's filters are defined for",
                given=f"{longest} tokens",
                expected=f"at most {self._limit}",
            )


def check_ids(ids: Tensor, vocab_size: int) -> None:
    """InputError unless ``ids`` are a tensor [b l] of ids of the vocabulary."""
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32):
        given = f"{tuple(ids.shape)} {ids.dtype}" if isinstance(ids, Tensor) else type(ids).__name__
        raise InputError(
            "ids must be a tensor [batch, length] of int64",
            given=given,
            fix="use torch.tensor(tokenizer.encode(text))[None]",
        )
    if ids.numel() == 0:
        raise InputError("ids are empty", given=tuple(ids.shape), expected="at least one token")
    if torch.compiler.is_compiling():  # a graph cannot ask for values; this fails when it runs
        torch._assert_async(((ids >= 0) & (ids < vocab_size)).all(), f"an id is not from 0 to {vocab_size - 1}")
    elif ids.device.type != "meta":
        low, high = (int(x) for x in ids.aminmax())
        if low < 0 or high >= vocab_size:
            raise InputError(
                "an id is outside the vocabulary",
                given=f"ids from {low} to {high}",
                expected=f"0 to {vocab_size - 1}",
                fix="use the tokenizer this model was trained with",
            )


def check_lengths(x: Tensor, lengths: Tensor) -> Tensor:
    """``lengths`` on the CPU; InputError unless there is one for each row, and none beyond the rows' end."""
    b, l = x.shape[:2]
    expected = f"a tensor of {b} whole numbers from 0 to {l}"
    if not isinstance(lengths, Tensor) or lengths.is_floating_point() or lengths.shape != (b,):
        raise InputError("lengths do not fit the ids", given=lengths, expected=expected)
    if not bool(((lengths >= 0) & (lengths <= l)).all()):
        raise InputError("lengths do not fit the ids", given=lengths.tolist(), expected=expected)
    return lengths.cpu()
