"""The Hyena operator of a tutorial, a "deep dive", in a corrected form (docs/deep-dive.md lists each correction)."""

from __future__ import annotations

from crocuta.config import (
    BlockConfig,
    GatedMLPConfig,
    ImplicitFilterConfig,
    LayerNormConfig,
    LearnedWindowConfig,
    ModelConfig,
    OrderNHyenaConfig,
    RMSNormConfig,
    SineConfig,
    SinusoidalConfig,
)


def deep_dive_hyena(
    *,
    vocab_size: int = 512,
    hidden_size: int = 256,
    num_layers: int = 4,
    order: int = 2,
    filter_size: int = 64,
    max_length: int = 8192,
    dropout: float = 0.0,
    mlp_multiple: int = 64,
) -> ModelConfig:
    """A language model of deep-dive blocks: ``order`` long convolutions of bounded, normalised filters.

    Filters see sinusoidal positions of ``filter_size`` / 2 features. The SwiGLU is 8/3 · hidden_size wide, rounded up
    to ``mlp_multiple``.
    """
    implicit = ImplicitFilterConfig(
        max_length=max_length,
        width=filter_size,
        inner_layers=1,
        positions=SinusoidalConfig(features=2 * max(1, filter_size // 4)),
        activation=SineConfig(),
        window=LearnedWindowConfig(),
        output_bias=True,
        bound=True,
        normalise="energy",
    )
    mixer = OrderNHyenaConfig(
        filter=implicit,
        convolutions=order,
        gate_first=False,
        shared_filter=False,
        branch_norm=LayerNormConfig(),
        residual=0.1,
    )
    norm = RMSNormConfig(eps_inside_root=True)
    mlp = GatedMLPConfig(intermediate_size=-(-(8 * hidden_size // 3) // mlp_multiple) * mlp_multiple)
    block = BlockConfig(mixer=mixer, mlp=mlp, norm=norm, dropout=dropout)
    return ModelConfig(vocab_size=vocab_size, hidden_size=hidden_size, blocks=(block,) * num_layers, norm=norm)
