"""Encoders: ids or features to one vector a sequence, or to the outputs of a head."""

from __future__ import annotations

from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from crocuta.config import (
    AttentionPoolingConfig,
    EncoderConfig,
    FeatureInputConfig,
    InputConfig,
    LastPoolingConfig,
    MeanPoolingConfig,
    PoolingConfig,
    TokenInputConfig,
)
from crocuta.errors import InputError, StateError
from crocuta.model.backbone import Backbone, check_ids, check_lengths
from crocuta.model.linear import Embedding, Linear
from crocuta.model.state import ModelState
from crocuta.ops.blocks import compute_dtype, own_positions
from crocuta.types import Hidden


@final
class Encoder(Backbone):
    """Blocks, then pooling over a sequence's own positions, a projection and a head, where the configuration has them.

    Build one with ``crocuta.model.build.build_encoder``, or from a pretrained model with ``encoder_from``.
    """

    config: EncoderConfig

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config, _input_layer(config.input, config.hidden_size))
        size = config.hidden_size
        attends = isinstance(config.pooling, AttentionPoolingConfig)
        self.query = nn.Parameter(torch.empty(size)) if attends else None
        self.projection = None
        if config.projection is not None:
            self.projection = Linear(size, config.projection.size, bias=False)
            size = config.projection.size
        self.head = None if config.head is None else Linear(size, config.output_size)

    def forward(self, x: Tensor, lengths: Int[Tensor, " b"] | None = None) -> Float[Tensor, "b *l c"]:
        """[b c]: pooled states, projected, or a head's outputs; [b l c] without pooling. In float32 (or float64).

        ``x`` are ids [b l] or features [b l e]; positions past ``lengths[row]`` are padding. Raises InputError for
        input of another shape or dtype, for ids outside the vocabulary, and for rows without any position.
        """
        hidden = self.hidden(x, lengths=lengths)
        y = hidden.to(compute_dtype(hidden.dtype))
        if self.config.pooling is not None:
            y = pool(y, self.config.pooling, _all_of(x) if lengths is None else lengths, self.query)
        if self.projection is not None:
            y = F.linear(y, self.projection.weight.to(y.dtype))
        if self.config.projection is not None and self.config.projection.normalise:
            y = F.normalize(y, dim=-1)
        if self.head is None or self.config.head is None:
            return y
        y = F.dropout(y, self.config.head.dropout, self.training)
        return F.linear(y, self.head.weight.to(y.dtype), self.head.bias.to(y.dtype))

    def hidden(self, x: Tensor, layer: int | None = None, lengths: Int[Tensor, " b"] | None = None) -> Hidden:
        """As ``Backbone.hidden``; with a complement, the mean of both strands at each base."""
        x = self._without_padding(x, lengths)
        if self.config.complement is None:
            return super().hidden(x, layer, lengths)
        forward = super().hidden(x, layer, lengths)
        own = _all_of(x) if lengths is None else lengths
        complement = torch.tensor(self.config.complement, device=x.device)
        backward = super().hidden(reverse_rows(complement[x], own), layer, lengths)
        return (forward + reverse_rows(backward, own)) / 2

    def extend_hidden(
        self, x: Tensor, state: ModelState, lengths: Int[Tensor, " b"] | None = None, layer: int | None = None
    ) -> Hidden:
        """As ``Backbone.extend_hidden``."""
        return super().extend_hidden(self._without_padding(x, lengths), state, lengths, layer)

    def _state(self, batch: int, max_length: int | None, device: torch.device) -> ModelState:
        if self.config.complement is not None:
            raise StateError(
                "an encoder of both strands cannot read a sequence in pieces",
                given="a complement",
                expected="complement=None",
                fix="use encoder.hidden on whole sequences",
            )
        return super()._state(batch, max_length, device)

    def _without_padding(self, x: Tensor, lengths: Int[Tensor, " b"] | None) -> Tensor:
        """Features with zeros past ``lengths[row]``: a convolution by matrix product or FFT multiplies padding with
        zeros, but zero times NaN is NaN."""
        if lengths is None or isinstance(self.config.input, TokenInputConfig):
            return x
        self._check_input(x)
        own = own_positions(check_lengths(x, lengths), x.shape[1], x.device)
        return x.masked_fill(~own[:, :, None], 0)

    def _check_input(self, x: Tensor) -> None:
        if isinstance(self.config.input, TokenInputConfig):
            check_ids(x, self.config.input.vocab_size)
            return
        size, dtype = self.config.input.size, self.norm.scale.dtype
        if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[2] != size or x.dtype != dtype or not x.numel():
            given = f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            raise InputError(
                "features do not fit the encoder", given=given, expected=f"[batch, length, {size}] {dtype}"
            )

    def _embed(self, x: Tensor) -> Hidden:
        return F.dropout(self.embedding(x), self.config.embedding_dropout, self.training)


def pool(
    x: Hidden, config: PoolingConfig, lengths: Int[Tensor, " b"], query: Float[Tensor, " d"] | None = None
) -> Float[Tensor, "b d"]:
    """One vector a row, of its first ``lengths[row]`` positions and of no padding; sums are in x's dtype.

    ``query`` is that of attention pooling. Raises InputError for a row without positions.
    """
    lengths = check_lengths(x, lengths)
    if not bool((lengths > 0).all()):
        raise InputError("there is nothing to pool", given=f"lengths {lengths.tolist()}", expected="at least 1")
    count = lengths.to(x.device)[:, None]
    own = own_positions(lengths, x.shape[1], x.device)
    match config:
        case MeanPoolingConfig():
            weights = own.to(x.dtype) / count
        case LastPoolingConfig(positions=positions):
            own = own & ~own_positions(lengths - positions, x.shape[1], x.device)
            weights = own.to(x.dtype) / own.sum(1, keepdim=True)
        case AttentionPoolingConfig():
            assert query is not None
            weights = (x @ query.to(x.dtype)).masked_fill(~own, -torch.inf).softmax(1)
    kept = x.masked_fill(~own[:, :, None], 0)  # a weight of zero would not silence a NaN
    return (weights[:, None] @ kept)[:, 0]


def reverse_rows(x: Float[Tensor, "b l *d"] | Int[Tensor, "b l"], lengths: Int[Tensor, " b"]) -> Tensor:
    """Each row's own positions in reverse; padding stays where it is."""
    place = torch.arange(x.shape[1], device=x.device)
    count = lengths.to(x.device)[:, None]
    index = torch.where(place < count, count - 1 - place, place)
    return x[torch.arange(len(x), device=x.device)[:, None], index]


def _all_of(x: Tensor) -> Tensor:
    return torch.full((len(x),), x.shape[1])


def _input_layer(config: InputConfig, channels: int) -> nn.Module:
    match config:
        case TokenInputConfig(vocab_size=size):
            return Embedding(size, channels)
        case FeatureInputConfig(size=size):
            return nn.Identity() if size == channels else Linear(size, channels)
