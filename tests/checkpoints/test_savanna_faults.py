"""Savanna checkpoints with a part too many, too few or of another kind are refused, with the part named."""

import pytest
import torch
from savanna_models import ATTENTION, HIDDEN, LI, MR, SE, SH1, refusal, tiny, write
from savanna_writer import (
    SavannaCheckpoint,
    write_layers,
    write_ranks,
    write_settings,
)

import crocuta
from crocuta.errors import ConfigError, WeightsFormatError
from crocuta.model.lm import Model


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny(SE, MR, LI, ATTENTION)


# --- what does not fit ---


def test_every_missing_and_every_unknown_key_is_refused(model, tmp_path):
    checkpoint = SavannaCheckpoint(model)
    whole, optional = dict(checkpoint.tensors), ("post_attention", "outer_mlp", "filter.t", "inv_freq", "filter.decay")
    for number, name in enumerate(whole):
        if any(word in name for word in optional):
            continue
        folder = tmp_path / str(number)
        folder.mkdir()
        checkpoint.tensors = {other: tensor for other, tensor in whole.items() if other != name}
        write(folder, checkpoint)
        with pytest.raises((WeightsFormatError, ConfigError)) as caught:
            crocuta.load(folder)
        assert f"1 missing: sequential.{name}" in str(caught.value)
    for extra in ("2.mixer.mixer.filter.h", "6.word_embeddings.weight", "3.mixer.surprise", "9.norm.weight", "loose"):
        folder = tmp_path / extra
        folder.mkdir()
        checkpoint.tensors = whole | {extra: torch.zeros(2)}
        assert "1 unexpected: " in refusal(write(folder, checkpoint))
        assert extra in refusal(folder)


def test_a_norm_under_both_names(model, tmp_path):
    checkpoint = SavannaCheckpoint(model)
    checkpoint.tensors["2.input_layernorm.scale"] = torch.ones(HIDDEN)
    assert "sequential.2.input_layernorm.weight and sequential.2.input_layernorm.scale" in refusal(
        write(tmp_path, checkpoint)
    )


def test_a_decay_that_is_missing_is_not_made_up(model, tmp_path):
    checkpoint = SavannaCheckpoint(model)
    del checkpoint.tensors["3.mixer.mixer.filter.decay"]
    text = refusal(write(tmp_path, checkpoint))
    assert "filter.decay is missing" in text
    assert "sequential.3.mixer.mixer.filter.h [8, 24]" in text


@pytest.mark.parametrize("name", ["p", "gamma", "R"])
@pytest.mark.parametrize("shape", [(HIDDEN, 5), (1, 3)], ids=["other order", "one row for all"])
def test_poles_that_do_not_fit_their_residues_are_refused(shape, name, model, tmp_path):
    checkpoint = SavannaCheckpoint(model)
    checkpoint.tensors[f"4.mixer.mixer.filter.{name}"] = torch.zeros(shape)
    text = refusal(write(tmp_path, checkpoint))
    assert "blocks.2.filter." in text
    assert str(list(shape)) in text


@pytest.mark.parametrize("name", ["inv_A_real", "A_imag", "log_dt", "B", "C"])
def test_a_complex_system_of_several_sizes_is_refused(name, tmp_path):
    checkpoint = SavannaCheckpoint(tiny(SH1))
    key = f"2.mixer.mixer.filter.inner_cls.{name}"
    checkpoint.tensors[key] = checkpoint.tensors[key][..., :1, :] if name in "BC" else checkpoint.tensors[key][..., :1]
    text = refusal(write(tmp_path, checkpoint))
    assert "cannot be computed" in text
    assert f"sequential.{key} {list(checkpoint.tensors[key].shape)}" in text


def test_the_settings_that_decide_are_named(model, tmp_path):
    checkpoint = SavannaCheckpoint(model)
    checkpoint.settings["num_groups_hyena_medium"] = 4
    text = refusal(write(tmp_path, checkpoint))
    assert "blocks.1.filter.h has shape [8, 1, 9], expected [4, 1, 9]" in text
    assert "num_groups_hyena_medium" in text


def test_names_of_an_older_savanna_are_refused(model, tmp_path):
    checkpoint = SavannaCheckpoint(model)
    checkpoint.tensors = {name.replace(".mixer.", ".attention.", 1): t for name, t in checkpoint.tensors.items()}
    assert "older savanna" in refusal(write(tmp_path, checkpoint))


# --- shards that do not belong together ---


def test_norms_that_drifted_apart_are_refused(model, tmp_path):
    checkpoint = SavannaCheckpoint(model)
    shards = checkpoint.shards(2)
    shards[1]["3.input_layernorm.weight"] = shards[1]["3.input_layernorm.weight"] + 1e-6
    write_settings(tmp_path / "tiny.yml", checkpoint.settings)
    write_ranks(tmp_path, shards)
    text = refusal(tmp_path)
    assert "sequential.3.input_layernorm.weight" in text
    assert "differs among its 2 shards" in text


@pytest.mark.parametrize("layout", [write_layers, write_ranks])
def test_a_missing_shard(layout, model, tmp_path):
    checkpoint = SavannaCheckpoint(model)
    write_settings(tmp_path / "tiny.yml", checkpoint.settings)
    layout(tmp_path, checkpoint.shards(4))
    next(iter(sorted(tmp_path.glob("layer_03-model_02*")) or sorted(tmp_path.glob("mp_rank_02*")))).unlink()
    text = refusal(tmp_path)
    assert "are missing" in text
    assert "[0, 1, 3]" in text


def test_a_missing_layer(model, tmp_path):
    path = write(tmp_path, SavannaCheckpoint(model), "layers")
    next(path.glob("layer_00-*")).unlink()
    assert "sequential.0.word_embeddings.weight" in refusal(path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("3.mixer.dense.weight", lambda t: t[:-1], "do not fit together"),
        ("3.mixer.dense.weight", lambda t: t.double(), "do not fit together"),
        ("3.mixer.dense.bias", lambda t: t[:-1], "do not fit together"),
        ("3.mixer.dense.weight", None, "hold different tensors"),
    ],
)
def test_shards_of_other_shapes(name, change, message, model, tmp_path):
    checkpoint = SavannaCheckpoint(model)
    shards = checkpoint.shards(2)
    if change is None:
        del shards[1][name]
    else:
        shards[1][name] = change(shards[1][name])
    write_settings(tmp_path / "tiny.yml", checkpoint.settings)
    write_ranks(tmp_path, shards)
    text = refusal(tmp_path)
    assert f"sequential.{name}" in text
    assert message in text


def test_a_tensor_that_is_there_twice(model, tmp_path):
    path = write(tmp_path, SavannaCheckpoint(model), "layers")
    file = next(path.glob("layer_03-*"))
    torch.save(torch.load(file) | {"sequential.2.mixer.dense.bias": torch.zeros(HIDDEN)}, file)
    assert "sequential.2.mixer.dense.bias twice" in refusal(path)
