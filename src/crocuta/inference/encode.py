"""What an encoder makes of sequences: a vector, or the outputs of its head, for each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crocuta.config import FeatureInputConfig
from crocuta.errors import InputError
from crocuta.inference.batches import TextOrIds, evaluating, to_ids
from crocuta.model.encode import encode_rows
from crocuta.model.encoder import Encoder
from crocuta.tokenizers.base import Tokenizer


def encode(
    encoder: Encoder, tokenizer: Tokenizer | None, sequences: Sequence[TextOrIds | Tensor]
) -> list[NDArray[np.float32]]:
    """One float32 array a sequence, in the given order: [c], or [l c] for an encoder without pooling.

    c are the channels of the projection, or the logits of a classification head, or the targets of a regression head.
    Sequences are text or ids, or for an encoder of features tensors [l e] of its dtype; they may have any lengths, and
    none sees another or its padding.

    Raises:
        InputError: an empty sequence, ids outside the vocabulary, features of another shape, a sequence longer than
            the encoder's filters are defined for. TokenizerError: text without a tokenizer. NonFiniteError: naming
            the sequence.
    """
    if isinstance(sequences, str | bytes):
        raise InputError("sequences must be a list", given="one text", fix="pass [text]")
    if isinstance(encoder.config.input, FeatureInputConfig):
        rows = [_features(sequence, f"sequence {i}") for i, sequence in enumerate(sequences)]
    else:
        rows = [to_ids(encoder, tokenizer, sequence, f"sequence {i}") for i, sequence in enumerate(sequences)]
    with evaluating(encoder):
        return [output.to(torch.float32).numpy() for output in encode_rows(encoder, rows)]


def _features(sequence: TextOrIds | Tensor, name: str) -> Tensor:
    if not isinstance(sequence, Tensor) or sequence.ndim != 2 or not len(sequence):
        given = tuple(sequence.shape) if isinstance(sequence, Tensor) else type(sequence).__name__
        raise InputError(f"{name} is not a row of features", given=given, expected="a tensor [length, features]")
    return sequence
