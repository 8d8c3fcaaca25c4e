"""The models of the cases, as configurations of ours; peers build the same from the same sizes."""

from __future__ import annotations

from crocuta.config import (
    AttentionConfig,
    BlockConfig,
    ComplexModalFilterConfig,
    FixedWindowConfig,
    GatedMLPConfig,
    HyenaConfig,
    ImplicitFilterConfig,
    LayerNormConfig,
    ModelConfig,
    PlainMLPConfig,
    RMSNormConfig,
)
from suite.task import Settings

EPS = 1e-6


def config_of(sizes: Settings) -> ModelConfig:
    """``family`` names the kind; the rest are its sizes."""
    match sizes["family"]:
        case "stripedhyena":
            return stripedhyena(sizes)
        case "hyenadna":
            return hyenadna(sizes)
        case "transformer":
            return transformer(sizes)
        case other:
            raise ValueError(f"unknown family {other!r}")


def gated_width(hidden: int) -> int:
    """8/3 of the hidden size, rounded up to a multiple of 64: the default of the package ``stripedhyena``."""
    return -(-(2 * hidden * 4 // 3) // 64) * 64


def stripedhyena(sizes: Settings) -> ModelConfig:
    """StripedHyena 1 with every bias that the package ``stripedhyena`` has and raw poles.

    ``attention`` lists the layers that have attention instead, with the package's defaults: biases and RoPE.
    """
    norm = RMSNormConfig(eps=EPS)
    mixer = HyenaConfig(
        filter=ComplexModalFilterConfig(modes=sizes["modes"], poles="raw"), short_bias=True, projection_bias=True
    )
    mlp = GatedMLPConfig(intermediate_size=gated_width(sizes["hidden"]))
    attention = AttentionConfig(num_heads=heads_of(sizes["hidden"]), qkv_bias=True, output_bias=True)
    mixers = [attention if layer in sizes.get("attention", []) else mixer for layer in range(sizes["layers"])]
    blocks = tuple(BlockConfig(mixer=each, mlp=mlp, norm=norm) for each in mixers)
    return ModelConfig(vocab_size=sizes["vocabulary"], hidden_size=sizes["hidden"], blocks=blocks, norm=norm)


def heads_of(hidden: int) -> int:
    """Attention heads of 64 channels."""
    return max(1, hidden // 64)


def hyenadna(sizes: Settings) -> ModelConfig:
    """HyenaDNA as published, filters defined for ``longest`` tokens, or for just the length."""
    longest = max(2, sizes.get("longest", sizes["length"]))
    implicit = ImplicitFilterConfig(max_length=longest, window=FixedWindowConfig(shift=0.05), wide_positions=False)
    mixer = HyenaConfig(filter=implicit, short_bias=True, projection_bias=True)
    mlp = PlainMLPConfig(intermediate_size=4 * sizes["hidden"])
    return _model(sizes, BlockConfig(mixer=mixer, mlp=mlp, norm=LayerNormConfig()), LayerNormConfig())


def transformer(sizes: Settings) -> ModelConfig:
    """What transformers' Llama is: RMSNorm with eps inside the root, RoPE, a SiLU gated MLP, no biases."""
    norm = RMSNormConfig(eps=EPS, eps_inside_root=True)
    mlp = GatedMLPConfig(intermediate_size=gated_width(sizes["hidden"]))
    mixer = AttentionConfig(num_heads=heads_of(sizes["hidden"]))
    return _model(sizes, BlockConfig(mixer=mixer, mlp=mlp, norm=norm), norm)


def _model(sizes: Settings, block: BlockConfig, norm: RMSNormConfig | LayerNormConfig) -> ModelConfig:
    return ModelConfig(
        vocab_size=sizes["vocabulary"], hidden_size=sizes["hidden"], blocks=(block,) * sizes["layers"], norm=norm
    )
