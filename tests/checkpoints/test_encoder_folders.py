"""Encoders in folders: saved and read as models are, and never taken for one."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import tiny_config, tiny_model

import crocuta
from crocuta.config import AttentionPoolingConfig, ClassificationConfig, ProjectionConfig
from crocuta.errors import ConfigError, InputError, TokenizerError, WeightsFormatError
from crocuta.model import edifice
from crocuta.tokenizers.bytes import ByteTokenizer
from crocuta.tokenizers.dna import DNATokenizer


def encoder(kind: str = "stripe", dtype: torch.dtype = torch.float32) -> crocuta.Encoder:
    return crocuta.encoder_from(
        tiny_model(kind, dtype, seed=1),
        pooling=AttentionPoolingConfig(),
        projection=ProjectionConfig(size=6),
        head=ClassificationConfig(labels=3),
        seed=2,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["stripe", "order-n-shared", "implicit-features", "gated-conv-edifice"])
def test_an_encoder_comes_back_bit_for_bit(kind, dtype, tmp_path):
    ours = encoder(kind, dtype)
    crocuta.save(ours, DNATokenizer(), tmp_path / "encoder")
    again, tokenizer = crocuta.load_encoder(tmp_path / "encoder")
    assert again.config == ours.config
    assert not again.training
    assert tokenizer == DNATokenizer()
    for (name, a), (other, b) in zip(ours.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name


def test_an_encoder_of_features(tmp_path):
    ours = edifice.hyena(embed_dim=5, hidden_size=16, filter_size=8, num_layers=1)
    crocuta.save(ours, None, tmp_path / "encoder")
    again, tokenizer = crocuta.load_encoder(tmp_path / "encoder", dtype=torch.float64)
    x = torch.randn(2, 9, 5)
    assert tokenizer is None
    torch.testing.assert_close(again(x.double()).float(), ours.eval()(x), rtol=0, atol=1e-5)


def test_models_and_encoders_are_not_confused(tmp_path):
    crocuta.save(encoder(), None, tmp_path / "encoder")
    crocuta.save(tiny_model("stripe"), None, tmp_path / "model")
    with pytest.raises(InputError, match=r"is not a model: got an encoder.*load_encoder"):
        crocuta.load(tmp_path / "encoder")
    with pytest.raises(InputError, match=r"is not an encoder: got a model.*encoder_from"):
        crocuta.load_encoder(tmp_path / "model")


def test_a_model_may_replace_an_encoder_and_the_other_way_round(tmp_path):
    crocuta.save(encoder(), None, tmp_path / "folder")
    crocuta.save(tiny_model("stripe"), None, tmp_path / "folder")
    assert crocuta.load(tmp_path / "folder")[0].config == tiny_config("stripe")
    crocuta.save(encoder(), None, tmp_path / "folder")
    assert crocuta.load_encoder(tmp_path / "folder")[0].config == encoder().config


def test_bad_folders(tmp_path):
    with pytest.raises(TokenizerError, match="does not fit the model"):
        crocuta.save(encoder(), ByteTokenizer(), tmp_path / "encoder")
    crocuta.save(encoder(), None, tmp_path / "encoder")
    (tmp_path / "encoder" / "manifest.json").unlink()
    file = tmp_path / "encoder" / "config.json"
    whole = json.loads(file.read_text())
    for change, error, message in (
        ({"kind": "decoder"}, WeightsFormatError, "unknown kind: got decoder"),
        ({"pooling": {"type": "max"}}, ConfigError, "pooling.type names no known kind"),
        ({"complement": [0, 1]}, ConfigError, "no complement"),
        ({"hidden_size": 16}, WeightsFormatError, "misshapen|shape|do not fit"),
    ):
        file.write_text(json.dumps(whole | change))
        with pytest.raises(error, match=message):
            crocuta.load_encoder(tmp_path / "encoder")
