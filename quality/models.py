"""The models that are compared: the same depth, width and number of parameters, and another mixer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crocuta.config import (
    AttentionConfig,
    BlockConfig,
    FixedWindowConfig,
    GatedConvConfig,
    GatedMLPConfig,
    HyenaConfig,
    ImplicitFilterConfig,
    MixerConfig,
    ModelConfig,
    MultiHeadHyenaConfig,
    SineConfig,
)
from crocuta.errors import InputError
from crocuta.model.build import build_model
from crocuta.model.count import parameters

TOLERANCE = 0.05
"""By how much the numbers of parameters may differ from Hyena's."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What all models of a comparison share. ``mlp`` is Hyena's; the others get what makes them as large."""

    hidden: int = 64
    layers: int = 2
    heads: int = 4
    mlp: int = 128
    filter_width: int = 64
    frequency: float = 10.0
    window: tuple[float, float] = (1.0, 8.0)
    """Shares of the longest input after which the fastest and the slowest filter are down to 1 %."""
    constant: bool = False
    """Whether filters have a trained constant, which sums over all that went before."""
    conv_taps: int = 7


KINDS = ("hyena", "striped", "transformer", "gated-conv", "multi-head")
"""Hyena of order 2; Hyena with attention in its last layer; attention with RoPE; gated short convolutions; multi-head
Hyena."""


def model_config(kind: str, shape: Shape, vocab_size: int, length: int) -> ModelConfig:
    """The configuration of a kind, with an MLP that brings its size to Hyena's. Raises InputError for another kind."""
    mixers = _mixers(kind, shape, length)
    target = _size(_config(_mixers("hyena", shape, length), shape, vocab_size, shape.mlp))
    base = _size(_config(mixers, shape, vocab_size, 1))
    width = 1 + round((target - base) / (3 * shape.hidden * shape.layers))  # a gated MLP has 3 weights a unit
    config = _config(mixers, shape, vocab_size, max(1, width))
    if abs(_size(config) / target - 1) > TOLERANCE:
        raise InputError(
            f"no {kind} model is as large as Hyena's of this shape",
            given=f"{_size(config)} parameters",
            expected=f"{target} ± {TOLERANCE:.0%}",
            fix="use a larger mlp",
        )
    return config


def _mixers(kind: str, shape: Shape, length: int) -> list[MixerConfig]:
    filter_ = ImplicitFilterConfig(
        max_length=max(2, length),
        width=shape.filter_width,
        activation=SineConfig(frequency=shape.frequency),
        window=FixedWindowConfig(decay=shape.window),
        output_bias=shape.constant,
    )
    hyena, attention = HyenaConfig(filter=filter_), AttentionConfig(num_heads=shape.heads)
    match kind:
        case "hyena":
            return [hyena] * shape.layers
        case "striped":
            return [hyena] * (shape.layers - 1) + [attention]
        case "transformer":
            return [attention] * shape.layers
        case "gated-conv":
            return [GatedConvConfig(taps=shape.conv_taps)] * shape.layers
        case "multi-head":
            return [MultiHeadHyenaConfig(num_heads=shape.hidden // 8, filter=filter_)] * shape.layers
        case _:
            raise InputError("unknown kind of model", given=repr(kind), expected=f"one of {KINDS}")


def _config(mixers: Sequence[MixerConfig], shape: Shape, vocab_size: int, mlp: int) -> ModelConfig:
    gated = GatedMLPConfig(intermediate_size=mlp)
    blocks = tuple(BlockConfig(mixer=mixer, mlp=gated) for mixer in mixers)
    return ModelConfig(vocab_size=vocab_size, hidden_size=shape.hidden, blocks=blocks, tie_embeddings=False)


def _size(config: ModelConfig) -> int:
    return sum(parameters(config).values())


class TokenModel(nn.Module):
    """Logits at every position: the model as it is."""

    def __init__(self, config: ModelConfig, seed: int) -> None:
        super().__init__()
        self.model = build_model(config, seed=seed)

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids)


class LastTokenModel(nn.Module):
    """Logits at every position from the hidden state of the last one (MAD's compression task).

    A sinusoidal code of the position is added to that state, and a decoder of one hidden layer turns each sum into
    logits: nothing else tells it what stood there.
    """

    def __init__(self, config: ModelConfig, seed: int) -> None:
        super().__init__()
        self.model = build_model(config, seed=seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.up = nn.Linear(config.hidden_size, 2 * config.hidden_size)
            self.down = nn.Linear(2 * config.hidden_size, config.vocab_size)

    def forward(self, ids: Tensor) -> Tensor:
        last = self.model.hidden(ids)[:, -1:]
        return self.down(F.gelu(self.up(last + positions(ids.shape[1], last))))


def positions(length: int, like: Tensor) -> Tensor:
    """[l d]: sines and cosines of i / 10000^(2j / d) (Vaswani et al. 2017)."""
    pairs = like.shape[-1] // 2
    rates = torch.exp(torch.arange(pairs, device=like.device) * (-math.log(10_000.0) / pairs))
    angles = torch.arange(length, device=like.device)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1).to(like.dtype)
