"""The one model class: ids [b l] to logits [b l v]."""

from __future__ import annotations

from os import PathLike

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from crocuta.config import ModelConfig
from crocuta.errors import InputError, StateError
from crocuta.model.block import Block
from crocuta.model.linear import Embedding, Linear
from crocuta.model.norm import build_norm
from crocuta.model.state import ModelState, SavedState, check_room, fingerprint, load_state, read_head
from crocuta.ops.blocks import full_precision
from crocuta.types import Hidden, Logits, TokenIds


class Model(nn.Module):
    """Embedding, blocks, final norm and head; HyenaDNA, StripedHyena and Evo differ only in the configuration.

    ``forward`` of a sequence equals ``extend`` of its pieces. Logits are float32 (float64 for a float64 model),
    from a float32 product, whatever the model's dtype, unless ``config.precision`` is "upstream". Build one with
    ``crocuta.model.build.build_model``.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self._fingerprint, self._limit = fingerprint(config), config.max_length
        self.checkpoint_activations = False
        """Recompute each block in the backward pass instead of keeping its activations."""
        self._narrow_logits = config.precision == "upstream"
        self.embedding = Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(block, config.hidden_size, config.precision) for block in config.blocks)
        self.norm = build_norm(config.norm, config.hidden_size, config.precision)
        self.head = None if config.tie_embeddings else Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, ids: TokenIds) -> Logits:
        """Logits of the token after each position. Raises InputError for wrong shape, dtype or ids."""
        return self.logits(self.hidden(ids))

    def hidden(self, ids: TokenIds, layer: int | None = None) -> Hidden:
        """Hidden states: after the final norm (None), or the residual stream: 0 the embedding, k after block k.

        Negative numbers count from the last block (-1). Blocks above ``layer`` are not computed.
        """
        self._check_ids(ids)
        x = self._embed(ids)
        for block in self._blocks_below(layer):
            recompute = self.checkpoint_activations and self.training and torch.is_grad_enabled()
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        return self.norm(x) if layer is None else x

    def logits(self, hidden: Hidden) -> Logits:
        """Logits of final hidden states, in float32 (or float64); in the model's dtype in upstream precision."""
        weight = self.embedding.weight if self.head is None else self.head.weight
        dtype = weight.dtype if self._narrow_logits else torch.promote_types(weight.dtype, torch.float32)
        return _linear(hidden.to(dtype), weight.to(dtype))

    def init_state(self, batch: int, max_length: int | None = None) -> ModelState:
        """The state of ``batch`` rows before their first token.

        ``max_length`` is the longest sequence a row may reach; models without attention and implicit filters need
        none and keep constant memory for ever. Raises StateError or InputError.
        """
        for name, value in (("batch", batch), ("max_length", max_length)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise InputError(f"{name} must be a positive whole number", given=value)
        return self._state(batch, max_length, self.embedding.weight.device)

    def with_room(self, state: ModelState, max_length: int) -> ModelState:
        """A copy of ``state`` for rows of up to ``max_length`` tokens, more or fewer than it was made for.

        Raises StateError if a row is longer already, or for another model's state.
        """
        self.check_owner(state)
        check_room(state.lengths, 0, max_length, "new")
        larger = self.init_state(state.batch, max_length)
        larger.fill(state)
        return larger

    def extend(self, ids: TokenIds, state: ModelState, lengths: Int[Tensor, " b"] | None = None) -> Logits:
        """Read the next tokens of each row: logits after each of them, and ``state`` moved on.

        ``lengths[row]`` tokens of a row are real, the rest is padding on the right, whose logits mean nothing.
        Raises InputError for bad ids, StateError when the batch differs or a row outgrows the state.
        """
        return self.logits(self.extend_hidden(ids, state, lengths))

    def extend_hidden(
        self, ids: TokenIds, state: ModelState, lengths: Int[Tensor, " b"] | None = None, layer: int | None = None
    ) -> Hidden:
        """``extend`` without the head, for callers that need few of the logits, or hidden states (see ``hidden``).

        With ``layer`` the blocks above it are not run and their states stay behind: keep to one layer a state.
        """
        self._check_ids(ids)
        if state.batch != ids.shape[0]:
            raise StateError(
                "the state has another number of rows than the ids",
                given=f"ids with {ids.shape[0]} rows",
                expected=f"{state.batch} rows",
            )
        self.check_owner(state)
        added = self._check_lengths(ids, lengths)
        self._check_room(state, added)
        x = self._embed(ids)
        for block, layer_state in zip(self._blocks_below(layer), state.layers, strict=False):
            x = block.extend(x, layer_state, lengths)
        state.lengths = state.lengths + added
        return self.norm(x) if layer is None else x

    def load_state(self, path: str | PathLike[str]) -> ModelState:
        """A state written by ``state.save(path)``. Raises StateError if it is another model's."""
        head = read_head(path)
        return load_state(self.state_like(head, path), path, self.embedding.weight.device)

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
        dtype = self.embedding.weight.dtype
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

    def _embed(self, ids: Tensor) -> Hidden:
        return F.dropout(self.embedding(ids), self.config.embedding_dropout, self.training)

    def _check_ids(self, ids: Tensor) -> None:
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32):
            given = f"{tuple(ids.shape)} {ids.dtype}" if isinstance(ids, Tensor) else type(ids).__name__
            raise InputError(
                "ids must be a tensor [batch, length] of int64",
                given=given,
                fix="use torch.tensor(tokenizer.encode(text))[None]",
            )
        if ids.numel() == 0:
            raise InputError("ids are empty", given=tuple(ids.shape), expected="at least one token")
        if ids.device.type != "meta":
            low, high = (int(x) for x in ids.aminmax())
            if low < 0 or high >= self.config.vocab_size:
                raise InputError(
                    "an id is outside the vocabulary",
                    given=f"ids from {low} to {high}",
                    expected=f"0 to {self.config.vocab_size - 1}",
                    fix="use the tokenizer this model was trained with",
                )

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

    @staticmethod
    def _check_lengths(ids: Tensor, lengths: Tensor | None) -> Tensor:
        b, l = ids.shape
        if lengths is None:
            return torch.full((b,), l)
        expected = f"a tensor of {b} whole numbers from 0 to {l}"
        if not isinstance(lengths, Tensor) or lengths.is_floating_point() or lengths.shape != (b,):
            raise InputError("lengths do not fit the ids", given=lengths, expected=expected)
        if not bool(((lengths >= 0) & (lengths <= l)).all()):
            raise InputError("lengths do not fit the ids", given=lengths.tolist(), expected=expected)
        return lengths.cpu()


@full_precision
def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)
