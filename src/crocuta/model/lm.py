"""The one model class: ids [b l] to logits [b l v]."""

from __future__ import annotations

from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from crocuta.config import ModelConfig
from crocuta.model.backbone import Backbone, check_ids
from crocuta.model.linear import Embedding, Linear
from crocuta.model.state import ModelState
from crocuta.ops.blocks import full_precision
from crocuta.ops.linear import linear
from crocuta.types import Hidden, Logits, TokenIds


@final
class Model(Backbone):
    """Embedding, blocks, final norm and head; HyenaDNA, StripedHyena and Evo differ only in the configuration.

    ``forward`` of a sequence equals ``extend`` of its pieces. Logits are float32 (float64 for a float64 model),
    from a float32 product, whatever the model's dtype, unless ``config.precision`` is "upstream". Build one with
    ``crocuta.model.build.build_model``.
    """

    config: ModelConfig
    embedding: Embedding

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, Embedding(config.vocab_size, config.hidden_size))
        self._narrow_logits = config.precision == "upstream"
        self.head = None if config.tie_embeddings else Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, ids: TokenIds, lengths: Int[Tensor, " b"] | None = None) -> Logits:
        """Logits of the token after each position. Raises InputError for wrong shape, dtype or ids.

        ``lengths`` as in ``hidden``; needed only where a block looks ahead.
        """
        return self.logits(self.hidden(ids, lengths=lengths))

    def logits(self, hidden: Hidden) -> Logits:
        """Logits of final hidden states, in float32 (or float64); in the model's dtype in upstream precision."""
        weight = self.embedding.weight if self.head is None else self.head.weight
        dtype = weight.dtype if self._narrow_logits else torch.promote_types(weight.dtype, torch.float32)
        return _linear(hidden.to(dtype), weight.to(dtype))

    def extend(self, ids: TokenIds, state: ModelState, lengths: Int[Tensor, " b"] | None = None) -> Logits:
        """Read the next tokens of each row: logits after each of them, and ``state`` moved on.

        ``lengths[row]`` tokens of a row are real, the rest is padding on the right, whose logits mean nothing.
        Raises InputError for bad ids, StateError when the batch differs or a row outgrows the state.
        """
        return self.logits(self.extend_hidden(ids, state, lengths))

    def _check_input(self, x: Tensor) -> None:
        check_ids(x, self.config.vocab_size)

    def _embed(self, x: Tensor) -> Hidden:
        return F.dropout(self.embedding(x), self.config.embedding_dropout, self.training)


@full_precision
def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return linear(x, weight)
