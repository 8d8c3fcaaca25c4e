"""What ``import crocuta`` offers: every name, and the few lines of its docstring on a tiny model."""

from __future__ import annotations

import importlib
import inspect

import numpy as np
import pytest
import torch
from tiny_models import tiny_config, tiny_model

import crocuta
from crocuta.tokenizers.bytes import ByteTokenizer


def test_every_name_is_the_thing_itself():
    assert len(crocuta.__all__) >= 18
    assert len(set(crocuta.__all__)) == len(crocuta.__all__)
    for name in crocuta.__all__:
        home = importlib.import_module(f"crocuta.{crocuta._HOMES[name]}")
        value = getattr(crocuta, name)
        assert value is getattr(home, name), name
        assert value.__module__ == home.__name__, f"{name} is re-exported from where it is not defined"
        assert inspect.getdoc(value), f"{name} has no docstring"
    assert set(crocuta._HOMES) == set(crocuta.__all__)


def test_names_are_listed_and_others_refused():
    assert set(crocuta.__all__) | {"__version__"} <= set(dir(crocuta))
    with pytest.raises(AttributeError, match="module 'crocuta' has no attribute 'gnerate'"):
        _ = crocuta.gnerate
    namespace: dict[str, object] = {}
    exec("from crocuta import *", namespace)
    assert set(crocuta.__all__) <= set(namespace)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "demo-text"
    crocuta.save(tiny_model("complex-raw", vocabulary=256), ByteTokenizer(vocab_size=256), path)
    return path


def test_the_docstring_s_lines(folder, tmp_path):
    """Every line of the module's example, run as it stands but for the folder's name."""
    example = [line.strip() for line in (crocuta.__doc__ or "").splitlines() if line.startswith("    ")]
    assert len(example) == 7
    names = {"crocuta": crocuta, "ids": torch.randint(0, 256, (2, 11))}
    code = "\n".join(example).replace("runs/demo-text", str(folder))
    for name in ("folder", "other"):
        code = code.replace(f'"{name}"', repr(str(tmp_path / name)))
    exec(code, names)
    assert names["logits"].shape == (2, 11, 256)
    for name in ("folder", "other"):
        copy, _ = crocuta.load(tmp_path / name)
        assert torch.equal(copy.embedding.weight, names["model"].embedding.weight)


def test_from_a_folder_to_text_scores_and_embeddings(folder):
    model, tokenizer = crocuta.load(folder)
    assert isinstance(model, crocuta.Model)
    result = crocuta.generate(model, tokenizer, ["Call me"], max_tokens=5, seed=1)[0]
    assert isinstance(result, crocuta.Generation)
    assert len(result.ids) <= 5
    pieces = list(crocuta.stream(model, tokenizer, ["Call me"], max_tokens=5, seed=1))
    assert all(isinstance(piece, crocuta.Piece) for piece in pieces)
    assert "".join(piece.text for piece in pieces) == result.text
    scores = crocuta.score(model, tokenizer, ["ACGT", "GATTACA"])
    assert [type(s) for s in scores] == [crocuta.Score] * 2
    assert [s.tokens for s in scores] == [3, 6]
    assert all(s.total < 0 for s in scores)
    vectors = crocuta.embed(model, tokenizer, ["ACGT"])
    assert isinstance(vectors[0], np.ndarray)
    assert vectors[0].shape == (model.config.hidden_size,)


@torch.no_grad()
def test_a_model_by_hand():
    """Configuration, model, hidden states, and a text read piece by piece."""
    config = crocuta.ModelConfig.from_json(tiny_config("stripe").to_json())
    model = crocuta.build_model(config, dtype=torch.float64, seed=1).eval()
    ids = torch.randint(0, 16, (2, 20))
    logits = model(ids)
    assert model.hidden(ids, layer=2).shape == (2, 20, 8)
    state = model.init_state(2, 20)
    assert isinstance(state, crocuta.ModelState)
    pieces = torch.cat([model.extend(ids[:, :13], state), model.extend(ids[:, 13:], state)], dim=1)
    torch.testing.assert_close(pieces, logits, rtol=0, atol=1e-9)
    assert crocuta.preset("tiny-striped") == crocuta.preset("tiny-striped")
