"""The encoders of Edifice, the Elixir library: ``Edifice.SSM.Hyena`` and ``Edifice.SSM.StripedHyena``.

Their formulas and parameters, not their initial values: theirs make filters that grow with the lag and ignore the
present. What they take as a fixed sequence length is here the longest one. (Edifice 0.2.0, lib/edifice/ssm/hyena.ex and
striped_hyena.ex, lib/edifice/blocks/depthwise_conv.ex and swiglu.ex.)
"""

from __future__ import annotations

from crocuta.config import (
    BlockConfig,
    EncoderConfig,
    FeatureInputConfig,
    GatedConvConfig,
    GatedMLPConfig,
    ImplicitFilterConfig,
    LastPoolingConfig,
    LayerNormConfig,
    MixerConfig,
    OrderNHyenaConfig,
    ScalarConfig,
    SineConfig,
)
from crocuta.config.checks import require

EMBED_DIM = 287
"""Of the documentation's example; every other default is a recommended one."""


def edifice_hyena(
    *,
    embed_dim: int = EMBED_DIM,
    hidden_size: int = 256,
    order: int = 2,
    filter_size: int = 64,
    num_layers: int = 4,
    dropout: float = 0.1,
    window_size: int = 60,
    seq_len: int | None = None,
) -> EncoderConfig:
    """Features [b l embed_dim] -> [b hidden_size]: ``num_layers`` Hyena blocks, LayerNorm, the last position.

    ``order`` long convolutions a block, each with its MLP of ``filter_size`` units. ``seq_len``, by default
    ``window_size``, is the longest sequence; shorter ones see the first taps of the same filters.
    """
    block = edifice_hyena_block(hidden_size, order, filter_size, dropout, seq_len or window_size)
    return _encoder(embed_dim, hidden_size, (block,) * num_layers)


def edifice_striped_hyena(
    *,
    embed_dim: int = EMBED_DIM,
    hidden_size: int = 256,
    order: int = 2,
    filter_size: int = 64,
    conv_kernel_size: int = 7,
    num_layers: int = 4,
    dropout: float = 0.1,
    window_size: int = 60,
    seq_len: int | None = None,
) -> EncoderConfig:
    """As ``edifice_hyena``, with a gated convolution of ``conv_kernel_size`` taps in place of every second Hyena."""
    hyena = edifice_hyena_block(hidden_size, order, filter_size, dropout, seq_len or window_size)
    gated = edifice_gated_block(hidden_size, conv_kernel_size, dropout)
    return _encoder(embed_dim, hidden_size, tuple(gated if i % 2 else hyena for i in range(num_layers)))


def edifice_hyena_block(hidden_size: int, order: int, filter_size: int, dropout: float, max_length: int) -> BlockConfig:
    """A short convolution of the input, its projection to the value and ``order`` gates, as many long convolutions.

    h[t] is an MLP of t = i / (max_length - 1) with sines of frequency 1 and no window; there is no D term.
    """
    implicit = ImplicitFilterConfig(
        max_length=max_length,
        width=filter_size,
        inner_layers=1,
        positions=ScalarConfig(),
        activation=SineConfig(frequency=1.0, trained=False),
        window=None,
        output_bias=True,
    )
    mixer = OrderNHyenaConfig(
        filter=implicit,
        convolutions=order,
        gate_first=False,
        shared_filter=False,
        short_bias=True,
        short_before_projection=True,
        projection_bias=True,
        skip=False,
    )
    return _block(mixer, hidden_size, dropout)


def edifice_gated_block(hidden_size: int, conv_kernel_size: int, dropout: float) -> BlockConfig:
    """A gated depthwise convolution with its norm, SiLU and pointwise map."""
    mixer = GatedConvConfig(taps=conv_kernel_size, norm=LayerNormConfig(), activation="silu", pointwise=True)
    return _block(mixer, hidden_size, dropout)


def _block(mixer: MixerConfig, hidden_size: int, dropout: float) -> BlockConfig:
    mlp = GatedMLPConfig(intermediate_size=4 * hidden_size, bias=True)
    return BlockConfig(mixer=mixer, mlp=mlp, norm=LayerNormConfig(), dropout=dropout)


def _encoder(embed_dim: int, hidden_size: int, blocks: tuple[BlockConfig, ...]) -> EncoderConfig:
    require(len(blocks) > 0, "num_layers is too small", len(blocks), ">= 1")
    return EncoderConfig(
        input=FeatureInputConfig(size=embed_dim),
        hidden_size=hidden_size,
        blocks=blocks,
        norm=LayerNormConfig(),
        pooling=LastPoolingConfig(),
    )
