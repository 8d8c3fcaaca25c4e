"""Which model a run begins with: one of a folder, or a new one of a description."""

from __future__ import annotations

from typing import Any

from crocuta.checkpoints.load import load
from crocuta.errors import ConfigError
from crocuta.model.build import build_model
from crocuta.model.lm import Model
from crocuta.presets import preset, striped
from crocuta.tokenizers.base import Tokenizer
from crocuta.tokenizers.load import make_tokenizer
from crocuta.training.config import ModelSpec


def model_of(spec: ModelSpec, tokenizer: dict[str, Any], seed: int) -> tuple[Model, Tokenizer]:
    """The model of ``spec``, new ones initialised from ``seed``, and its tokenizer.

    A loaded model brings its own tokenizer; ``tokenizer`` describes that of all others, and of a loaded one without.

    Raises:
        ConfigError: the tokenizer has more ids than the model; and all that ``load`` and ``make_tokenizer`` raise.
    """
    if spec.load is not None:
        model, own = load(spec.load)
        return model, own or make_tokenizer(tokenizer)
    made = make_tokenizer(tokenizer)
    if spec.striped is not None:
        s = spec.striped
        architecture = striped(
            vocab_size=made.vocab_size,
            hidden_size=s.hidden_size,
            num_layers=s.num_layers,
            filter=s.filter,
            num_heads=s.num_heads,
            attention_layers=s.attention_layers,
            dropout=s.dropout,
        )
    else:
        architecture = spec.config or preset(spec.preset or "")
    if made.num_ids > architecture.vocab_size:
        raise ConfigError(
            "the tokenizer has more ids than the model",
            given=made.num_ids,
            expected=f"at most {architecture.vocab_size}",
        )
    return build_model(architecture, seed=seed), made
