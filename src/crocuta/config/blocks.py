"""Blocks, and what holds of a stack of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from crocuta.config.checks import require, share
from crocuta.config.filters import FilterConfig, ImplicitFilterConfig
from crocuta.config.layers import MLPConfig, NormConfig, RMSNormConfig
from crocuta.config.mixers import (
    AttentionConfig,
    BidirectionalHyenaConfig,
    GatedConvConfig,
    MixerConfig,
    MultiHeadHyenaConfig,
)


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """x = x + mixer(norm(x)); x = x + mlp(norm(x)). ``dropout`` acts on both branches while training."""

    mixer: MixerConfig
    mlp: MLPConfig | None
    norm: NormConfig = RMSNormConfig()
    dropout: float = 0.0

    def __post_init__(self) -> None:
        share("BlockConfig", dropout=self.dropout)


def filter_of(mixer: MixerConfig) -> FilterConfig | None:
    """The long filter of a mixer, if it has one."""
    return None if isinstance(mixer, AttentionConfig | GatedConvConfig) else mixer.filter


def max_length_of(blocks: Iterable[BlockConfig]) -> int | None:
    """The longest sequence that every filter is defined for, or None where no filter sets a limit."""
    filters = (filter_of(block.mixer) for block in blocks)
    return min((f.max_length for f in filters if isinstance(f, ImplicitFilterConfig)), default=None)


def is_causal(mixer: MixerConfig) -> bool:
    """Whether no output of the mixer depends on a later input; only then can it be read in pieces, and generate."""
    match mixer:
        case BidirectionalHyenaConfig():
            return False
        case AttentionConfig(causal=causal):
            return causal
        case _:
            return True


def check_blocks(blocks: Iterable[BlockConfig], channels: int) -> None:
    """ConfigError where a mixer cannot have so many ``channels``."""
    for index, block in enumerate(blocks):
        where = f"blocks[{index}].mixer"
        match block.mixer:
            case AttentionConfig(num_heads=heads, rope=rope):
                _check_divides(f"{where}.num_heads", heads, channels)
                require(
                    rope is None or (channels // heads) % 2 == 0,
                    f"{where}.rope needs an even head size",
                    channels // heads,
                    "an even number",
                )
            case MultiHeadHyenaConfig(num_heads=heads):
                _check_divides(f"{where}.num_heads", heads, channels)
            case mixer:
                filter_ = filter_of(mixer)
                if filter_ is not None and filter_.groups is not None:
                    _check_divides(f"{where}.filter.groups", filter_.groups, channels)


def _check_divides(name: str, count: int, channels: int) -> None:
    field = name.rpartition(".")[2]
    require(
        channels % count == 0,
        f"{name} must divide hidden_size",
        f"{field}={count}, hidden_size={channels}",
        "a divisor",
    )
