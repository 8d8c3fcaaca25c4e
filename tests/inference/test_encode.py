"""What an encoder gives for sequences of any lengths is what it gives for each alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import random_ids, tiny_model

import crocuta
from crocuta.config import AttentionPoolingConfig, ClassificationConfig, PoolingConfig
from crocuta.errors import InputError, NonFiniteError, TokenizerError
from crocuta.model import edifice
from crocuta.tokenizers.dna import DNATokenizer

LENGTHS = (13, 1, 40, 7, 40)
ROWS = [random_ids(length, seed=length) for length in LENGTHS]
DNA = DNATokenizer()


ATTENTION = AttentionPoolingConfig()


def encoder(pooling: PoolingConfig | None = ATTENTION) -> crocuta.Encoder:
    made = crocuta.encoder_from(tiny_model("stripe", seed=1), pooling=pooling, head=ClassificationConfig(labels=3))
    if made.query is not None:
        made.query.data.copy_(torch.randn(len(made.query), generator=torch.Generator().manual_seed(1)))
    return made


@torch.no_grad()
@pytest.mark.parametrize("pooling", [ATTENTION, None], ids=["pooled", "every token"])
def test_rows_are_those_of_each_alone(pooling):
    ours = encoder(pooling).double().eval()
    results = crocuta.encode(ours, None, ROWS)
    for row, result in zip(ROWS, results, strict=True):
        expected = ours(row[None])[0]
        assert result.dtype == np.float32
        assert result.shape == ((3,) if pooling else (len(row), 3))
        np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-6)


def test_text_ids_and_the_mode_are_as_they_were():
    ours = encoder().train()
    by_text, by_ids = crocuta.encode(ours, DNA, ["GATTACA", DNA.encode("GATTACA")])
    np.testing.assert_allclose(by_text, by_ids, rtol=0, atol=1e-5)
    assert ours.training


@torch.no_grad()
def test_features_of_unequal_lengths():
    ours = edifice.hyena(embed_dim=5, hidden_size=16, filter_size=8, num_layers=1).eval()
    rows = [torch.randn(length, 5, generator=torch.Generator().manual_seed(length)) for length in LENGTHS]
    for row, result in zip(rows, crocuta.encode(ours, None, rows), strict=True):
        np.testing.assert_allclose(result, ours(row[None])[0], rtol=1e-5, atol=1e-5)


def test_bad_input():
    with pytest.raises(InputError, match="sequences must be a list"):
        crocuta.encode(encoder(), DNA, "ACGT")
    with pytest.raises(TokenizerError, match="there is no tokenizer"):
        crocuta.encode(encoder(), None, ["ACGT"])
    with pytest.raises(InputError, match="sequence 1 has an id outside the vocabulary"):
        crocuta.encode(encoder(), None, [[7, 8], [16]])
    with pytest.raises(InputError, match=r"sequence 0 is not a row of features: got str"):
        crocuta.encode(edifice.hyena(embed_dim=5), None, ["ACGT"])
    with pytest.raises(InputError, match="features do not fit the encoder"):
        crocuta.encode(edifice.hyena(embed_dim=5), None, [torch.randn(4, 6)])
    broken = encoder()
    broken.head.bias.data[1] = torch.nan
    with pytest.raises(NonFiniteError, match="the output for sequence 1 is not finite"):
        crocuta.encode(broken, None, ROWS)
