"""What a configuration holds, without its weights: parameters, and bytes of weights and states.

They are those of the model itself, built on the meta device, so they cannot drift from the code. Operations: ``flops``.
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from crocuta.config import (
    AttentionConfig,
    BackboneConfig,
    BidirectionalHyenaConfig,
    BlockConfig,
    ComplexModalFilterConfig,
    EncoderConfig,
    ExplicitFilterConfig,
    FilterConfig,
    GatedConvConfig,
    HyenaConfig,
    ImplicitFilterConfig,
    MixerConfig,
    MLPConfig,
    ModelConfig,
    MultiHeadHyenaConfig,
    OrderNHyenaConfig,
    RealModalFilterConfig,
    filter_of,
)
from crocuta.model.block import Block
from crocuta.model.build import build_encoder, build_model
from crocuta.model.encoder import Encoder
from crocuta.model.lm import Model

# --- what stands in the model ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class BlockKind:
    """Blocks of one configuration: where they are, and the parameters of each of them."""

    mixer: str
    mlp: str
    layers: tuple[int, ...]
    mixer_parameters: int
    mlp_parameters: int
    norm_parameters: int


def parameters(config: BackboneConfig) -> dict[str, int]:
    """Number of parameters by part: embedding, each kind of mixer, MLPs, norms, head. A tied head has none."""
    model = _on_meta(config, torch.float32)
    kinds = block_kinds(config)
    parts: Counter[str] = Counter({"embedding": _size(model.embedding)})
    if isinstance(model, Encoder):
        parts["pooling"] = 0 if model.query is None else model.query.numel()
        parts["projection"] = _size(model.projection)
    for kind in kinds:
        parts[kind.mixer] += len(kind.layers) * kind.mixer_parameters
    parts["MLPs"] = sum(len(kind.layers) * kind.mlp_parameters for kind in kinds)
    parts["norms"] = sum(len(kind.layers) * kind.norm_parameters for kind in kinds) + _size(model.norm)
    parts["head"] = _size(model.head)
    return {name: number for name, number in parts.items() if number}


def block_kinds(config: BackboneConfig) -> list[BlockKind]:
    """The distinct blocks, in order of first appearance."""
    layers: dict[BlockConfig, list[int]] = {}
    for index, block in enumerate(config.blocks):
        layers.setdefault(block, []).append(index)
    model = _on_meta(config, torch.float32)
    return [_block_kind(block, model.blocks[places[0]], tuple(places)) for block, places in layers.items()]


def describe_mixer(config: MixerConfig) -> str:
    """The kind of a mixer in a few words, such as "hyena, 8 complex modes"."""
    match config:
        case AttentionConfig(num_heads=heads, num_kv_heads=kv_heads, causal=causal):
            kind = "attention" if causal else "bidirectional attention"
            return f"{kind}, {heads} heads" + (f", {kv_heads} of keys" if kv_heads not in (None, heads) else "")
        case HyenaConfig(filter=filter_, fp8_projection=fp8):
            return f"hyena, {_describe_filter(filter_)}" + (", FP8 projection" if fp8 else "")
        case OrderNHyenaConfig(filter=filter_, convolutions=convolutions, gate_first=gate_first):
            start = "gate first" if gate_first else "convolution first"
            return f"hyena, {convolutions} convolutions, {start}, {_describe_filter(filter_)}"
        case MultiHeadHyenaConfig(filter=filter_, num_heads=heads):
            return f"multi-head hyena, {heads} heads, {_describe_filter(filter_)}"
        case BidirectionalHyenaConfig(filter=filter_):
            return f"bidirectional hyena, {_describe_filter(filter_)}"
        case GatedConvConfig(taps=taps):
            return f"gated convolution, {taps} taps"


def describe_mlp(config: MLPConfig | None) -> str:
    """The kind of an MLP in a few words, such as "gated silu, 128"."""
    return "none" if config is None else f"{config.type} {config.activation}, {config.intermediate_size}"


def _describe_filter(config: FilterConfig) -> str:
    match config:
        case ExplicitFilterConfig(taps=taps):
            return f"{taps} taps"
        case ImplicitFilterConfig():
            return "implicit filter"
        case ComplexModalFilterConfig(modes=modes):
            return f"{modes} complex modes"
        case RealModalFilterConfig(modes=modes):
            return f"{modes} real modes"


def _block_kind(config: BlockConfig, block: nn.Module, layers: tuple[int, ...]) -> BlockKind:
    assert isinstance(block, Block)
    return BlockKind(
        mixer=describe_mixer(config.mixer),
        mlp=describe_mlp(config.mlp),
        layers=layers,
        mixer_parameters=_size(block.mixer),
        mlp_parameters=_size(block.mlp),
        norm_parameters=_size(block.pre_norm) + _size(block.post_norm),
    )


def _size(module: nn.Module | None) -> int:
    return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())


# --- bytes ----------------------------------------------------------------------------------------------------


def state_bytes(config: BackboneConfig, length: int, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of the state of one sequence with room for ``length`` tokens. Raises InputError for a length below 1."""
    return _on_meta(config, dtype).init_state(1, length).nbytes


def state_is_constant(config: BackboneConfig) -> bool:
    """Whether the state has one size for every length: no attention and no implicit filter."""
    mixers = [block.mixer for block in config.blocks]
    return not any(
        isinstance(mixer, AttentionConfig) or isinstance(filter_of(mixer), ImplicitFilterConfig) for mixer in mixers
    )


def weight_bytes(config: BackboneConfig, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of all weights and stored tables in ``dtype``; filters stay in float32."""
    model = _on_meta(config, dtype)
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])


@functools.lru_cache(maxsize=4)
def _on_meta(config: BackboneConfig, dtype: torch.dtype) -> Model | Encoder:
    match config:
        case ModelConfig():
            return build_model(config, device="meta", dtype=dtype)
        case EncoderConfig():
            return build_encoder(config, device="meta", dtype=dtype)
