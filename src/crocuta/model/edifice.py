"""The models of Edifice, each as one function with the options of its documentation.

    encoder = edifice.hyena(embed_dim=287)          # [b l 287] -> [b 256]
    encoder(features)                               # any length up to window_size
    encoder.extend_hidden(frame, state)             # frame by frame, exactly

``crocuta.presets.edifice`` has their configurations. Convolutions are by FFT, O(l log l), where Edifice's take O(l²).
"""

from __future__ import annotations

from typing import Final

from crocuta.model.block import Block
from crocuta.model.build import build_block, build_encoder
from crocuta.model.encoder import Encoder
from crocuta.presets.edifice import edifice_gated_block, edifice_hyena, edifice_hyena_block, edifice_striped_hyena

RECOMMENDED: Final = {
    "hidden_size": 256,
    "order": 2,
    "filter_size": 64,
    "num_layers": 4,
    "window_size": 60,
    "dropout": 0.1,
}
"""Recommended defaults of ``hyena``; those of ``striped_hyena`` have conv_kernel_size=7 in addition."""


def hyena(
    *,
    embed_dim: int,
    hidden_size: int = 256,
    order: int = 2,
    filter_size: int = 64,
    num_layers: int = 4,
    dropout: float = 0.1,
    window_size: int = 60,
    seq_len: int | None = None,
    seed: int = 0,
) -> Encoder:
    """``Edifice.SSM.Hyena``: features [b l embed_dim] -> [b hidden_size].

    For every length up to ``seq_len`` (default ``window_size``), which the filters are defined for: give a larger one
    for longer sequences. Raises ConfigError for impossible options, and the encoder InputError for longer sequences.
    """
    config = edifice_hyena(
        embed_dim=embed_dim,
        hidden_size=hidden_size,
        order=order,
        filter_size=filter_size,
        num_layers=num_layers,
        dropout=dropout,
        window_size=window_size,
        seq_len=seq_len,
    )
    return build_encoder(config, seed=seed)


def striped_hyena(
    *,
    embed_dim: int,
    hidden_size: int = 256,
    order: int = 2,
    filter_size: int = 64,
    conv_kernel_size: int = 7,
    num_layers: int = 4,
    dropout: float = 0.1,
    window_size: int = 60,
    seq_len: int | None = None,
    seed: int = 0,
) -> Encoder:
    """``Edifice.SSM.StripedHyena``: as ``hyena``, with a gated convolution in place of every second Hyena."""
    config = edifice_striped_hyena(
        embed_dim=embed_dim,
        hidden_size=hidden_size,
        order=order,
        filter_size=filter_size,
        conv_kernel_size=conv_kernel_size,
        num_layers=num_layers,
        dropout=dropout,
        window_size=window_size,
        seq_len=seq_len,
    )
    return build_encoder(config, seed=seed)


def hyena_block(
    *,
    hidden_size: int = 256,
    order: int = 2,
    filter_size: int = 64,
    dropout: float = 0.1,
    max_length: int = 60,
    seed: int = 0,
) -> Block:
    """One block of ``hyena`` alone, [b l hidden_size] -> [b l hidden_size]."""
    return build_block(
        edifice_hyena_block(hidden_size, order, filter_size, dropout, max_length), hidden_size, seed=seed
    )


def gated_conv_block(
    *, hidden_size: int = 256, conv_kernel_size: int = 7, dropout: float = 0.1, seed: int = 0
) -> Block:
    """One gated block of ``striped_hyena`` alone, [b l hidden_size] -> [b l hidden_size]."""
    return build_block(edifice_gated_block(hidden_size, conv_kernel_size, dropout), hidden_size, seed=seed)
