"""Conversion keeps every bit, in every layout that the published code reads, and says so where it cannot."""

import dataclasses
import io
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import crocuta
from crocuta.checkpoints.convert import TARGETS, convert, verify
from crocuta.checkpoints.load import load
from crocuta.config import ModelConfig
from crocuta.errors import CheckpointError, ConfigError, InputError
from crocuta.model.build import build_model
from crocuta.presets import preset
from crocuta.tokenizers.dna import DNATokenizer

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
HOME = {
    "stripedhyena-tiny-standalone": "stripedhyena",
    "evo1-131k-tiny-hf": "evo1-hf",
    "evo2-8k-tiny": "evo2",
    "hyenadna-tiny-hf": "hyenadna-hf",
    "hyenadna-tiny-ckpt": "hyenadna-hf",
}
JUNK = ".mixer.mixer.filter.t"


def published_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Everything that the weights of a published folder hold, read with other code than ours."""
    if (folder / "model.safetensors").exists():
        return load_file(folder / "model.safetensors")
    files = [folder / "pytorch-model.bin", folder / "model.pt", *sorted(folder.glob("*.pt.part*"))]
    data = b"".join(file.read_bytes() for file in files if file.exists())
    return torch.load(io.BytesIO(data), weights_only=True)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


@pytest.mark.parametrize("name", [name for name in HOME if not name.endswith("ckpt")])
def test_a_round_trip_gives_the_same_bits_per_tensor(name, tmp_path):
    convert(GOLDEN / name, tmp_path / "native", "native")
    convert(tmp_path / "native", tmp_path / "back", HOME[name])
    before, after = published_tensors(GOLDEN / name), published_tensors(tmp_path / "back")
    assert [key for key in before.keys() - after.keys() if not key.endswith(JUNK)] == []
    assert after.keys() <= before.keys()
    assert [key for key in after if not same_bits(before[key], after[key])] == []
    assert verify(GOLDEN / name, tmp_path / "back") == 0


@pytest.mark.parametrize("name", HOME)
def test_the_converted_folder_loads_as_the_same_model(name, tmp_path):
    convert(GOLDEN / name, tmp_path / "converted", HOME[name])
    (first, _), (second, _) = load(GOLDEN / name), load(tmp_path / "converted")
    assert first.config == second.config
    for key, tensor in first.state_dict().items():
        assert same_bits(tensor, second.state_dict()[key])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_dtype_casts_once(dtype, tmp_path):
    convert(GOLDEN / "evo2-8k-tiny", tmp_path / "cast", "evo2", dtype=dtype)
    expected, _ = load(GOLDEN / "evo2-8k-tiny", dtype=dtype)
    found, _ = load(tmp_path / "cast", dtype=dtype)
    assert all(torch.equal(t, found.state_dict()[key]) for key, t in expected.state_dict().items())
    assert published_tensors(tmp_path / "cast")["embedding_layer.weight"].dtype == dtype


def test_taps_that_came_in_bfloat16_leave_in_bfloat16(tmp_path):
    stored = published_tensors(GOLDEN / "evo2-8k-tiny")
    narrow = {
        key: tensor if key.endswith(("poles", "residues", "inv_freq")) else tensor.bfloat16()
        for key, tensor in stored.items()
    }
    (tmp_path / "a").mkdir()
    torch.save(narrow, tmp_path / "a" / "model.pt")
    (tmp_path / "a" / "config.yml").write_bytes((GOLDEN / "evo2-8k-tiny" / "config.yml").read_bytes())
    convert(tmp_path / "a", tmp_path / "b", "evo2")
    after = published_tensors(tmp_path / "b")
    assert [key for key in after if not same_bits(narrow[key], after[key])] == []


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["tiny-striped", "tiny-explicit", "tiny-implicit", "tiny-modal-real"])
def test_a_model_of_ours_converts_where_the_layout_can_hold_it(name, target, tmp_path):
    model = build_model(preset(name), seed=3)
    crocuta.save(model, None, tmp_path / "ours")
    fits = {
        "native": True,
        "stripedhyena": name == "tiny-striped",
        "evo1-hf": name == "tiny-striped",
        "evo2": name == "tiny-modal-real",  # fewer taps than 128 with a D are none of vortex's
        "hyenadna-hf": False,
    }
    if not fits[target]:
        with pytest.raises(ConfigError, match=r"this model cannot be an? \S+ checkpoint"):
            convert(tmp_path / "ours", tmp_path / "theirs", target)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["ours"]
        return
    if target in ("stripedhyena", "evo1-hf"):
        with pytest.raises(ConfigError, match="short_filter_bias"):  # published ones always have it
            convert(tmp_path / "ours", tmp_path / "theirs", target)
        return
    convert(tmp_path / "ours", tmp_path / "theirs", target)
    assert verify(tmp_path / "ours", tmp_path / "theirs") <= 1e-5


def test_poles_trained_here_become_published_ones(tmp_path):
    value = preset("tiny-stripedhyena").to_json()
    for block in value["blocks"]:
        if block["mixer"]["type"] == "hyena":
            block["mixer"]["filter"]["poles"] = "stable"
    model = build_model(ModelConfig.from_json(value), seed=2)
    crocuta.save(model, None, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", "stripedhyena")
    loaded, _ = load(tmp_path / "theirs")
    assert loaded.config.blocks[0].mixer.filter.poles == "raw"
    assert verify(tmp_path / "ours", tmp_path / "theirs") < 1e-4


def test_verify_notices_one_changed_weight(tmp_path):
    convert(GOLDEN / "evo2-8k-tiny", tmp_path / "native", "native")
    model, tokenizer = load(tmp_path / "native")
    with torch.no_grad():
        model.blocks[4].mlp.up.weight[3, 5] += 1.0
    crocuta.save(model, tokenizer, tmp_path / "changed")
    with pytest.raises(CheckpointError, match="computes other logits"):
        verify(GOLDEN / "evo2-8k-tiny", tmp_path / "changed")


def test_what_exists_is_never_overwritten(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="exists"):
        convert(GOLDEN / "evo2-8k-tiny", tmp_path / "there", "native")
    with pytest.raises(InputError, match="unknown layout"):
        convert(GOLDEN / "evo2-8k-tiny", tmp_path / "new", "gguf")


def test_the_description_holds_what_the_published_code_reads(tmp_path):
    convert(GOLDEN / "evo1-131k-tiny-hf", tmp_path / "hf", "evo1-hf")
    ours = json.loads((tmp_path / "hf" / "config.json").read_text())
    theirs = json.loads((GOLDEN / "evo1-131k-tiny-hf" / "config.json").read_text())
    decisive = ("vocab_size", "hidden_size", "attn_layer_idxs", "num_layers", "state_size", "eps", "tie_embeddings")
    assert {key: ours[key] for key in decisive} == {key: theirs[key] for key in decisive}
    assert ours["rotary_emb_scaling_factor"] == 16
    assert ours["use_flashfft"] is False


# --- what must not be lost on the way ---


@pytest.mark.parametrize("to", ["evo1-hf", "stripedhyena"])
def test_a_tokenizer_that_the_layout_does_not_imply_is_refused(to, tmp_path):
    model, _ = load(GOLDEN / "evo1-131k-tiny-hf")
    crocuta.save(model, DNATokenizer(), tmp_path / "ours")
    with pytest.raises(ConfigError, match=rf"the layout {to} cannot keep this model's tokenizer: got .*dna"):
        convert(tmp_path / "ours", tmp_path / "theirs", to)
    crocuta.save(model, None, tmp_path / "none")
    convert(tmp_path / "none", tmp_path / "theirs", to)


def test_the_mark_of_unverified_models_stays(tmp_path):
    model, tokenizer = load(GOLDEN / "evo2-8k-tiny")
    config = dataclasses.replace(model.config, unverified="for this test")
    marked = build_model(config)
    marked.load_state_dict(model.state_dict())
    crocuta.save(marked, tokenizer, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", "evo2")
    assert load(tmp_path / "theirs")[0].config.unverified == "for this test"


def test_matrices_keep_dtypes_that_differ_from_the_embedding_s(tmp_path):
    stored = published_tensors(GOLDEN / "evo2-8k-tiny")
    for key in ("embedding_layer.weight", "unembed.weight"):
        stored[key] = stored[key].bfloat16()
    (tmp_path / "a").mkdir()
    torch.save(stored, tmp_path / "a" / "model.pt")
    (tmp_path / "a" / "config.yml").write_bytes((GOLDEN / "evo2-8k-tiny" / "config.yml").read_bytes())
    convert(tmp_path / "a", tmp_path / "b", "evo2")
    after = published_tensors(tmp_path / "b")
    assert [key for key in after if not same_bits(stored[key], after[key])] == []


def test_upstream_precision_does_not_disturb_the_proof(tmp_path):
    model, tokenizer = load(GOLDEN / "evo2-8k-tiny", dtype=torch.bfloat16, precision="upstream")
    crocuta.save(model, tokenizer, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", "evo2")
    assert verify(tmp_path / "ours", tmp_path / "theirs") == 0


def test_the_context_is_that_of_the_rotary_scale(tmp_path):
    convert(GOLDEN / "evo1-131k-tiny-hf", tmp_path / "hf", "evo1-hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["max_seqlen"] == 131_072


@pytest.mark.parametrize("bad", ["a\0b", "x" * 300])
def test_impossible_destinations(bad, tmp_path):
    with pytest.raises((InputError, CheckpointError)):
        convert(GOLDEN / "hyenadna-tiny-hf", tmp_path / bad, "hyenadna-hf")
