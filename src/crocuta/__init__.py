"""Crocuta: Hyena and StripedHyena sequence models.

    model, tokenizer = crocuta.load("runs/demo-text")
    logits = model(ids)                                    # [b l v]
    crocuta.generate(model, tokenizer, ["Call me"])
    crocuta.score(model, tokenizer, ["ACGT", "GATTACA"])
    crocuta.embed(model, tokenizer, ["ACGT"])
    crocuta.save(model, tokenizer, "folder")
    crocuta.convert("folder", "other", "native")           # or to a layout that the published code reads

Importing this imports nothing heavy: each name is fetched when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from crocuta.checkpoints.convert import convert
    from crocuta.checkpoints.load import load, load_encoder
    from crocuta.checkpoints.native import save
    from crocuta.config.encoder import EncoderConfig
    from crocuta.config.model import ModelConfig
    from crocuta.errors import CrocutaError
    from crocuta.inference.continuations import score_continuations
    from crocuta.inference.distill import distill
    from crocuta.inference.embed import embed
    from crocuta.inference.encode import encode
    from crocuta.inference.generate import Generation, Piece, generate, stream
    from crocuta.inference.prefix import Prefix, load_prefix, read_prefix
    from crocuta.inference.sampling import SamplingConfig
    from crocuta.inference.score import Score, score
    from crocuta.inference.variants import Variant, VariantScore, score_variants
    from crocuta.model.build import build_block, build_encoder, build_model, encoder_from
    from crocuta.model.chunks import hidden_chunks
    from crocuta.model.encoder import Encoder
    from crocuta.model.lm import Model
    from crocuta.model.state import ModelState
    from crocuta.presets import encoder_preset, preset
    from crocuta.training.config import TrainConfig
    from crocuta.training.finetune import fine_tune
    from crocuta.training.finetune_config import FineTuneConfig
    from crocuta.training.loop import train

_HOMES = {
    "convert": "checkpoints.convert",
    "load": "checkpoints.load",
    "load_encoder": "checkpoints.load",
    "save": "checkpoints.native",
    "EncoderConfig": "config.encoder",
    "ModelConfig": "config.model",
    "CrocutaError": "errors",
    "score_continuations": "inference.continuations",
    "distill": "inference.distill",
    "embed": "inference.embed",
    "encode": "inference.encode",
    "Generation": "inference.generate",
    "Piece": "inference.generate",
    "generate": "inference.generate",
    "stream": "inference.generate",
    "Prefix": "inference.prefix",
    "load_prefix": "inference.prefix",
    "read_prefix": "inference.prefix",
    "SamplingConfig": "inference.sampling",
    "Score": "inference.score",
    "score": "inference.score",
    "Variant": "inference.variants",
    "VariantScore": "inference.variants",
    "score_variants": "inference.variants",
    "build_block": "model.build",
    "build_encoder": "model.build",
    "build_model": "model.build",
    "encoder_from": "model.build",
    "Encoder": "model.encoder",
    "hidden_chunks": "model.chunks",
    "Model": "model.lm",
    "ModelState": "model.state",
    "encoder_preset": "presets",
    "preset": "presets",
    "TrainConfig": "training.config",
    "FineTuneConfig": "training.finetune_config",
    "fine_tune": "training.finetune",
    "train": "training.loop",
}

__all__ = [
    "CrocutaError",
    "Encoder",
    "EncoderConfig",
    "FineTuneConfig",
    "Generation",
    "Model",
    "ModelConfig",
    "ModelState",
    "Piece",
    "Prefix",
    "SamplingConfig",
    "Score",
    "TrainConfig",
    "Variant",
    "VariantScore",
    "build_block",
    "build_encoder",
    "build_model",
    "convert",
    "distill",
    "embed",
    "encode",
    "encoder_from",
    "encoder_preset",
    "fine_tune",
    "generate",
    "hidden_chunks",
    "load",
    "load_encoder",
    "load_prefix",
    "preset",
    "read_prefix",
    "save",
    "score",
    "score_continuations",
    "score_variants",
    "stream",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'crocuta' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"crocuta.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
