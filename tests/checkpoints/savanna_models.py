"""Tiny models of the kinds that savanna trains, written as savanna does and read back."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from savanna_writer import SavannaCheckpoint, write_flat, write_layers, write_ranks, write_settings
from tiny_models import loud, random_ids

import crocuta
from crocuta.config import (
    AttentionConfig,
    BlockConfig,
    ComplexModalFilterConfig,
    ExplicitFilterConfig,
    GatedMLPConfig,
    HyenaConfig,
    ModelConfig,
    RealModalFilterConfig,
    RMSNormConfig,
    RopeConfig,
)
from crocuta.errors import WeightsFormatError
from crocuta.model.build import build_model
from crocuta.model.lm import Model

HIDDEN, VOCABULARY = 16, 24
SE = HyenaConfig(filter=ExplicitFilterConfig(taps=7, groups=4), skip=False)
MR = HyenaConfig(filter=ExplicitFilterConfig(taps=9, groups=8))
LI = HyenaConfig(filter=RealModalFilterConfig(modes=3, poles="raw", timescales=(1.0, 50.0)))
SH1 = HyenaConfig(filter=ComplexModalFilterConfig(modes=3, poles="raw", timescales=(1.0, 50.0)))
SH1_BIASED = dataclasses.replace(SH1, short_bias=True, projection_bias=True)
ATTENTION = AttentionConfig(num_heads=4, output_bias=True, rope=RopeConfig(base=100.0, scale=3.0, stored=True))


def tiny(*mixers, tied: bool = True, vocabulary: int = VOCABULARY, **changes) -> Model:
    """Of these mixers, with GELU until the first Hyena-MR or Hyena-LI and the identity from there on."""
    norm, blocks, activation = RMSNormConfig(eps=1e-5), [], "gelu"
    for mixer in mixers:
        activation = "identity" if isinstance(mixer, HyenaConfig) and mixer.skip else activation
        mlp = GatedMLPConfig(intermediate_size=32, activation=activation)
        blocks.append(BlockConfig(mixer=mixer, mlp=mlp, norm=norm))
    model = build_model(
        ModelConfig(
            vocab_size=vocabulary, hidden_size=HIDDEN, blocks=tuple(blocks), norm=norm, tie_embeddings=tied, **changes
        ),
        seed=3,
    )
    return loud(model).eval()


def write(folder: Path, checkpoint: SavannaCheckpoint, layout: str = "ranks", shards: int = 1) -> Path:
    write_settings(folder / "tiny.yml", checkpoint.settings)
    parts = checkpoint.shards(shards)
    if layout == "layers":
        write_layers(folder, parts)
    elif layout == "flat":
        write_flat(folder / "anything.pt", checkpoint.tensors)
    else:
        write_ranks(folder, parts, prefix={"ranks": "sequential.", "module": "module.sequential.", "bare": ""}[layout])
    return folder


@torch.no_grad()
def assert_same(path: Path, model: Model, bound: float = 1e-5) -> Model:
    loaded, _ = crocuta.load(path)
    ids = random_ids(2, 21, vocabulary=model.config.vocab_size)
    expected = model(ids)
    assert expected.abs().max() > 1
    assert (loaded(ids) - expected).abs().max() <= bound
    return loaded


def refusal(path: Path, error: type[Exception] = WeightsFormatError, **options) -> str:
    with pytest.raises(error) as caught:
        crocuta.load(path, **options)
    assert str(path) in str(caught.value)
    return str(caught.value)
