"""Configuration to module."""

from __future__ import annotations

from typing import TypeVar

import torch

from crocuta.config import (
    BlockConfig,
    EncoderConfig,
    HeadConfig,
    MeanPoolingConfig,
    ModelConfig,
    PoolingConfig,
    ProjectionConfig,
    TokenInputConfig,
)
from crocuta.config.blocks import check_blocks
from crocuta.errors import InputError
from crocuta.model.block import Block
from crocuta.model.encoder import Encoder
from crocuta.model.init import initialise
from crocuta.model.lm import Model

_MEAN = MeanPoolingConfig()

B = TypeVar("B", Model, Encoder, Block)


def build_model(
    config: ModelConfig,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Model:
    """A model on ``device`` ("meta" allocates nothing) in ``dtype``, initialised from ``seed`` as ``init`` says.

    Filters stay in float32 in a bfloat16 model. The values do not depend on device or dtype before rounding.
    """
    with torch.device("meta"):
        model = Model(config)
    return _filled(model, device, dtype, seed)


def build_encoder(
    config: EncoderConfig,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Encoder:
    """An encoder, as ``build_model`` makes a model."""
    with torch.device("meta"):
        encoder = Encoder(config)
    return _filled(encoder, device, dtype, seed)


def build_block(
    config: BlockConfig,
    channels: int,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Block:
    """One block alone, [b l d] -> [b l d], as ``build_model`` makes a model. Raises ConfigError for other channels."""
    check_blocks([config], channels)
    with torch.device("meta"):
        block = Block(config, channels)
    return _filled(block, device, dtype, seed)


def encoder_from(
    model: Model,
    *,
    pooling: PoolingConfig | None = _MEAN,
    projection: ProjectionConfig | None = None,
    head: HeadConfig | None = None,
    complement: tuple[int, ...] | None = None,
    seed: int = 0,
) -> Encoder:
    """An encoder with the embedding, the blocks and the norm of ``model``, copied, and a new projection and head.

    The settings are those of ``EncoderConfig``. Raises ConfigError for a complement that does not fit the ids.
    """
    base = model.config
    config = EncoderConfig(
        input=TokenInputConfig(vocab_size=base.vocab_size),
        hidden_size=base.hidden_size,
        blocks=base.blocks,
        norm=base.norm,
        pooling=pooling,
        projection=projection,
        head=head,
        embedding_dropout=base.embedding_dropout,
        precision=base.precision,
        complement=complement,
    )
    weight = model.embedding.weight
    encoder = build_encoder(config, device=weight.device, dtype=weight.dtype, seed=seed)
    shared = {name: t for name, t in model.state_dict().items() if not name.startswith("head.")}
    encoder.load_state_dict(encoder.state_dict() | shared)
    return encoder


def _filled(model: B, device: str | torch.device, dtype: torch.dtype, seed: int) -> B:
    if dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise InputError(
            "a model cannot have this dtype", given=dtype, expected="float32, float64, bfloat16 or float16"
        )
    if torch.device(device).type == "meta":
        return model.to(dtype)
    model = model.to_empty(device="cpu")
    initialise(model, seed, 1 if isinstance(model, Block) else len(model.blocks))
    return model.to(device=device, dtype=dtype)
