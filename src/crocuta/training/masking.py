"""Masked language modelling: some tokens of a batch are hidden, and the model is to say what they were."""

from __future__ import annotations

from typing import Final, final

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray

from crocuta.errors import ConfigError
from crocuta.tokenizers.base import Tokenizer
from crocuta.tokenizers.dna import MASK, UNK, DNATokenizer
from crocuta.training.config import MaskedConfig

EVALUATION_SEED: Final = 0
"""Of the masks of every held-out text, so that figures of different runs are of the same tokens."""
NOT_COUNTED: Final = -100
"""The target of a position that was not chosen."""

_PURPOSE: Final = 3
"""Beside those of the loader, whose random words have the same key (seed, number)."""


@final
class Masking:
    """Chooses tokens of batches and hides them (Devlin et al. 2019, *BERT*, section 3.1).

    Of the tokens of a batch that are not special, ``fraction`` are chosen, at random and without regard to rows, at
    least one. Of the chosen ones ``mask_token`` become the mask, ``random_token`` any token that is not special (which
    may be the same one), and the rest stay what they are; all are to be predicted.

    What is done to batch i is a function of (seed, i) and the batch: raw Philox bits, which numpy keeps the same.

    Raises ConfigError for a mask that the tokenizer does not name and the configuration neither, or outside the model's
    vocabulary.
    """

    def __init__(self, config: MaskedConfig, tokenizer: Tokenizer, vocab_size: int, seed: int) -> None:
        self.config, self.seed = config, seed
        self.mask_id = _mask_id(config, tokenizer)
        if self.mask_id >= vocab_size:
            raise ConfigError(
                "objective.mask_id is outside the model's vocabulary",
                given=self.mask_id,
                expected=f"at most {vocab_size - 1}",
                fix="choose an id that no text has, or a tokenizer with a larger vocab_size",
            )
        is_ordinary = np.zeros(vocab_size, np.bool_)
        is_ordinary[: tokenizer.num_ids] = True
        is_ordinary[[i for i in (*special_ids(tokenizer), self.mask_id) if i < vocab_size]] = False
        self._is_ordinary, self._ordinary = is_ordinary, np.flatnonzero(is_ordinary)

    def batch(self, ids: Int[NDArray, "b l"], index: int) -> tuple[Int[NDArray, "b l"], Int[NDArray, "b l"]]:
        """(inputs, targets) of batch ``index``, whose tokens are ``ids``; targets that do not count are -100."""
        words = self._bits(index, 3 * ids.size).reshape(3, ids.size)
        flat = ids.reshape(-1)
        candidates = np.flatnonzero(self._is_ordinary[flat])
        count = min(len(candidates), max(1, int(self.config.fraction * len(candidates) + 0.5)))
        chosen = candidates[np.argsort(words[0, candidates], kind="stable")[:count]]
        share = (words[1, chosen] >> np.uint64(11)) * 2.0**-53  # uniform in [0, 1)
        is_mask = share < self.config.mask_token
        is_random = ~is_mask & (share < self.config.mask_token + self.config.random_token)
        inputs, targets = flat.copy(), np.full(flat.shape, NOT_COUNTED, np.int64)
        targets[chosen] = flat[chosen]
        inputs[chosen[is_mask]] = self.mask_id
        inputs[chosen[is_random]] = self._ordinary[words[2, chosen[is_random]] % np.uint64(len(self._ordinary))]
        return inputs.reshape(ids.shape), targets.reshape(ids.shape)

    def _bits(self, index: int, count: int) -> NDArray[np.uint64]:
        key = np.array([self.seed, index], np.uint64)
        return np.random.Philox(key=key, counter=[0, 0, 0, _PURPOSE]).random_raw(count)


def special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The ids that stand for no text: never hidden, and nothing random becomes one of them."""
    named = {tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id, *tokenizer.prefix_ids, *tokenizer.suffix_ids}
    own = range(UNK + 1) if isinstance(tokenizer, DNATokenizer) else ()
    return frozenset(i for i in (*named, *own) if i is not None)


def _mask_id(config: MaskedConfig, tokenizer: Tokenizer) -> int:
    if config.mask_id is not None:
        return config.mask_id
    if isinstance(tokenizer, DNATokenizer):
        return MASK
    raise ConfigError(
        "the tokenizer has no mask of its own",
        given=f"a tokenizer of type {tokenizer.type!r} and no objective.mask_id",
        expected="objective.mask_id",
        fix="choose an id that no text has" + (", such as 256" if tokenizer.type == "bytes" else ""),
    )
