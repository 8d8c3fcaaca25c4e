"""Checkpoints of savanna give the model that they were written from, whatever their layout."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from savanna_models import ATTENTION, LI, MR, SE, SH1, SH1_BIASED, assert_same, refusal, tiny, write
from savanna_writer import (
    SavannaCheckpoint,
    extra_state,
    write_flat,
    write_ranks,
    write_settings,
)

import crocuta
from crocuta.checkpoints.families import savanna_files
from crocuta.checkpoints.families.savanna import SAVANNA
from crocuta.checkpoints.load import FORMATS, find_format
from crocuta.checkpoints.torch_save.file import TorchFile, open_torch
from crocuta.config import (
    ComplexModalFilterConfig,
    RealModalFilterConfig,
)
from crocuta.errors import ConfigError
from crocuta.model.lm import Model

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny(SE, MR, LI, ATTENTION)


# --- every layout is the same model ---


@pytest.mark.parametrize(("norm", "interleaved"), [("weight", True), ("scale", False)])
@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("layout", ["layers", "ranks"])
def test_shards_of_any_number_in_any_layout(layout, shards, interleaved, norm, model, tmp_path):
    checkpoint = SavannaCheckpoint(model, norm=norm, interleaved=interleaved)
    assert_same(write(tmp_path, checkpoint, layout, shards), model)


@pytest.mark.parametrize("layout", ["flat", "module", "bare"])
def test_prefixes(layout, model, tmp_path):
    assert_same(write(tmp_path, SavannaCheckpoint(model), layout), model)


def test_the_file_itself_may_be_given(model, tmp_path):
    write(tmp_path, SavannaCheckpoint(model), "flat")
    assert_same(tmp_path / "anything.pt", model)


def test_settings_in_a_folder_of_their_own_beside_those_of_the_data(model, tmp_path):
    checkpoint = SavannaCheckpoint(model)
    write_ranks(tmp_path, checkpoint.shards(1))
    write_settings(tmp_path / "configs" / "model.yml", checkpoint.settings)
    write_settings(tmp_path / "configs" / "data.yml", {"data-path": "/data"})
    assert_same(tmp_path, model)


def test_decays_that_are_multiplied_in_and_taps_without_an_axis(model, tmp_path):
    assert_same(write(tmp_path, SavannaCheckpoint(model, folded=True, flat_taps=True)), model)


@pytest.mark.parametrize("shards", [1, 2])
def test_an_untied_head_and_grouped_poles(shards, tmp_path):
    grouped = dataclasses.replace(LI, filter=RealModalFilterConfig(modes=3, groups=4, poles="raw"))
    untied = tiny(grouped, SE, tied=False)
    assert_same(write(tmp_path, SavannaCheckpoint(untied), shards=shards), untied)


def test_a_head_that_is_cut_along_channels_as_is_the_default(tmp_path):
    untied = tiny(LI, tied=False)
    checkpoint = SavannaCheckpoint(untied)
    del checkpoint.settings["output_layer_parallelism"]
    shards = checkpoint.shards(2)
    for shard, part in zip(shards, untied.head.weight.detach().chunk(2, dim=1), strict=True):
        shard["5.final_linear.weight"] = part
    write_settings(tmp_path / "tiny.yml", checkpoint.settings)
    write_ranks(tmp_path, shards)
    assert_same(tmp_path, untied)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("mixer", [SH1, SH1_BIASED], ids=["unbiased", "biased"])
def test_stripedhyena_1(mixer, shards, tmp_path):
    first = tiny(mixer, ATTENTION)
    loaded = assert_same(write(tmp_path, SavannaCheckpoint(first), shards=shards), first)
    assert isinstance(loaded.config.blocks[0].mixer.filter, ComplexModalFilterConfig)


def test_stripedhyena_1_in_its_older_parametrisation(tmp_path):
    first = tiny(SH1, ATTENTION)
    assert_same(write(tmp_path, SavannaCheckpoint(first, rule="bilinear")), first)


def test_a_bfloat16_checkpoint_keeps_what_decides_in_float32(model, tmp_path):
    checkpoint = SavannaCheckpoint(model)
    kept = dict(checkpoint.tensors)
    checkpoint.tensors = {name: tensor.bfloat16() for name, tensor in kept.items()}
    loaded, _ = crocuta.load(write(tmp_path, checkpoint))
    weights = loaded.state_dict()
    p, gamma = (checkpoint.tensors[f"4.mixer.mixer.filter.{name}"].float() for name in ("p", "gamma"))
    assert torch.equal(weights["blocks.2.mixer.filter.log_poles"], -torch.exp(p) * torch.exp(gamma))
    h, decay = (checkpoint.tensors[f"3.mixer.mixer.filter.{name}"] for name in ("h", "decay"))
    taps = weights["blocks.1.mixer.filter.weight"]
    assert taps.dtype == torch.float32
    assert torch.equal(taps, (h * decay)[:, :9].float())  # rounded as the trainer rounds it
    assert weights["blocks.3.mixer.rope.inverse"].dtype == torch.float32
    assert weights["blocks.0.mixer.projection.weight"].dtype == torch.bfloat16


@torch.no_grad()
def test_the_golden_model_of_vortex_in_the_clothes_of_savanna(tmp_path):
    golden = GOLDEN / "evo2-8k-tiny"
    expected = load_file(golden / "expected.safetensors")
    vortex, _ = crocuta.load(golden)
    loaded, tokenizer = crocuta.load(write(tmp_path, SavannaCheckpoint(vortex), "layers", shards=2))
    assert (loaded(expected["input_ids"]) - expected["logits"]).abs().max() <= 2e-4
    assert tokenizer is not None
    assert tokenizer.vocab_size == 512


def test_all_values_are_read_in_every_way_of_cutting_rows(model, tmp_path):
    checkpoint = SavannaCheckpoint(model)
    pieces = savanna_files.find_pieces(write(tmp_path, checkpoint, shards=4))
    shards = savanna_files.Shards(tmp_path, pieces, interleaved=True, head_axis=0)
    for name, tensor in checkpoint.tensors.items():
        if name.endswith("filter.t") or "post_attention" in name or "outer_mlp" in name:
            continue
        assert shards.infos[name].shape == tuple(tensor.shape)
        for rows in (None, slice(0, 1), slice(3, 11), slice(5, 5), slice(-2, None), slice(0, 100)):
            assert torch.equal(shards.read(name, rows), tensor if rows is None else tensor[rows])
    shards.close()


# --- what only savanna has ---


def test_norms_that_no_forward_pass_uses_are_not_taken_for_the_norm_before_the_mlp(model, tmp_path):
    checkpoint = SavannaCheckpoint(model)
    # In the order in which a converter would overwrite the right one.
    for index in range(4):
        name = f"{index + 2}.post_attention_layernorm.weight"
        checkpoint.tensors[name] = checkpoint.tensors.pop(name)
    loaded = assert_same(write(tmp_path, checkpoint), model)
    for index, block in enumerate(loaded.blocks):
        assert torch.equal(block.post_norm.scale, checkpoint.tensors[f"{index + 2}.pre_mlp_layernorm.weight"])


def test_nor_do_they_stand_in_for_it(model, tmp_path):
    checkpoint = SavannaCheckpoint(model)
    del checkpoint.tensors["3.pre_mlp_layernorm.weight"]
    text = refusal(write(tmp_path, checkpoint))
    assert "1 missing: sequential.3.pre_mlp_layernorm.weight" in text


def fp8_checkpoint() -> SavannaCheckpoint:
    checkpoint = SavannaCheckpoint(tiny(SE, MR, ATTENTION))
    checkpoint.settings["use_fp8_input_projections"] = True
    for layer in (2, 3, 4):
        checkpoint.tensors[f"{layer}.mixer.dense_projection._extra_state"] = extra_state(2.0**layer, 8.0)
        checkpoint.tensors[f"{layer}.mlp.w1._extra_state"] = extra_state(1.0, 1.0)
    return checkpoint


@pytest.mark.parametrize("layout", ["layers", "ranks"])
@pytest.mark.parametrize("shards", [1, 2])
def test_scales_of_fp8_projections(shards, layout, tmp_path):
    loaded, _ = crocuta.load(write(tmp_path, fp8_checkpoint(), layout, shards))
    projections = [block.mixer.projection for block in loaded.blocks[:2]]
    assert [p.input_scale.item() for p in projections] == [4.0, 8.0]
    assert [p.weight_scale.item() for p in projections] == [8.0, 8.0]
    assert [mixer.fp8_projection for mixer in (b.mixer for b in loaded.config.blocks[:2])] == [True, True]


def test_fp8_off_marks_the_model_and_needs_no_scales(tmp_path):
    checkpoint = fp8_checkpoint()
    del checkpoint.tensors["2.mixer.dense_projection._extra_state"]
    path = write(tmp_path, checkpoint)
    assert "blocks.0.projections._extra_state" in refusal(path)
    loaded, _ = crocuta.load(path, fp8="off")
    assert "FP8" in loaded.config.unverified


def test_shards_with_scales_of_their_own_have_no_common_one(tmp_path):
    checkpoint = fp8_checkpoint()
    shards = checkpoint.shards(2)
    shards[1]["3.mixer.dense_projection._extra_state"] = extra_state(1.0, 1.0)
    write_settings(tmp_path / "tiny.yml", checkpoint.settings)
    write_ranks(tmp_path, shards)
    text = refusal(tmp_path)
    assert "sequential.3.mixer.dense_projection._extra_state" in text
    assert "fp8='off'" in text
    crocuta.load(tmp_path, fp8="off")


def test_zeros_that_widen_the_mlps_are_sliced_away(model, tmp_path):
    checkpoint = SavannaCheckpoint(model)
    for name, tensor in checkpoint.tensors.items():
        if ".mlp." in name:
            axis = 1 if ".w3." in name else 0
            shape = list(tensor.shape)
            shape[axis] = 16
            checkpoint.tensors[name] = torch.cat([tensor, torch.zeros(shape)], axis)
    loaded = assert_same(write(tmp_path, checkpoint, shards=2), model)
    assert loaded.config.blocks[0].mlp.intermediate_size == 32


# --- detection ---


def test_partitions_of_zero_3_are_explained(model, tmp_path):
    write_settings(tmp_path / "tiny.yml", SavannaCheckpoint(model).settings)
    file = tmp_path / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    torch.save({"module": {}}, file)
    for path in (tmp_path, file):
        text = refusal(path)
        assert "ZeRO-3" in text
        assert "zero_to_fp32.py" in text


def test_states_of_optimisers_beside_the_weights_are_left_alone(model, tmp_path):
    path = write(tmp_path, SavannaCheckpoint(model))
    (path / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"not weights")
    assert_same(path, model)


def test_weights_without_settings_say_what_is_needed(model, tmp_path):
    write_ranks(tmp_path, SavannaCheckpoint(model).shards(1))
    text = refusal(tmp_path, ConfigError)
    assert "no configuration" in text
    assert "operator-config" in text


def test_two_settings_are_one_too_many(model, tmp_path):
    checkpoint = SavannaCheckpoint(model)
    write_settings(tmp_path / "other.yml", checkpoint.settings)
    text = refusal(write(tmp_path, checkpoint), ConfigError)
    assert "other.yml" in text
    assert "tiny.yml" in text


def test_settings_that_are_broken_are_reported_and_not_overlooked(model, tmp_path):
    path = write(tmp_path, SavannaCheckpoint(model), "flat")
    (path / "tiny.yml").write_text('{"num_layers": 4, "num_layers": 4, "operator-config": []}')
    with pytest.raises(ConfigError, match="duplicate key 'num_layers'"):
        crocuta.load(path)


@pytest.mark.parametrize("suffix", [".pt", ".pt.part0"])
def test_a_published_name_needs_no_settings(suffix, tmp_path, monkeypatch):
    small = tiny(SE, MR, LI, ATTENTION, vocabulary=512)
    monkeypatch.setattr("crocuta.checkpoints.families.savanna.preset", lambda name: {"evo2-7b-1m": small.config}[name])
    checkpoint = SavannaCheckpoint(small)
    for layer in (2, 3, 4):
        checkpoint.tensors[f"{layer}.mixer.dense_projection._extra_state"] = extra_state(1.0, 1.0)
    file = tmp_path / f"savanna_evo2_7b{suffix}"
    write_flat(file, checkpoint.tensors)
    for path in (tmp_path, file):
        loaded, tokenizer = crocuta.load(path)
        assert loaded.config.blocks[0].mixer.fp8_projection
        assert tokenizer is not None
        config = dataclasses.replace(crocuta.load(path, fp8="off")[0].config, unverified="")
        assert config == small.config


def test_a_published_name_of_vortex_is_not_ours(model, tmp_path):
    write_settings(tmp_path / "tiny.yml", SavannaCheckpoint(model).settings)
    (tmp_path / "evo2_7b.pt").write_bytes(b"")
    assert find_format(tmp_path).name == "evo2"


@pytest.mark.parametrize("folder", sorted(path.name for path in GOLDEN.iterdir() if path.is_dir()))
def test_checkpoints_of_others_are_not_ours(folder):
    assert not SAVANNA.detect(GOLDEN / folder)


@pytest.mark.parametrize("layout", ["layers", "ranks", "flat"])
def test_ours_are_not_those_of_others(layout, model, tmp_path):
    path = write(tmp_path, SavannaCheckpoint(model), layout)
    assert [format_.name for format_ in FORMATS if format_.detect(path)] == ["savanna"]
    (path / "config.yml").write_text("hcl_layer_idxs: [1]\nhyena_layer_idxs: [1]\n")
    assert not SAVANNA.detect(path)


def test_detection_never_raises(tmp_path):
    (tmp_path / "configs").write_text("a file")
    (tmp_path / "a.yml").write_bytes(b"\xff\xfe operator-config")
    (tmp_path / "b.yml").mkdir()
    (tmp_path / "mp_rank_00_model_states.pt").mkdir()
    (tmp_path / "a.pt.part1").write_bytes(b"")
    for path in (tmp_path, tmp_path / "a.pt.part1", tmp_path / "a.yml", tmp_path / "none"):
        SAVANNA.detect(path)


@pytest.mark.parametrize("early", [True, False])
def test_no_file_stays_open_after_a_refusal(early, model, tmp_path, monkeypatch):
    opened: list[TorchFile] = []
    closed: list[TorchFile] = []
    monkeypatch.setattr(savanna_files, "open_torch", lambda paths: opened.append(open_torch(paths)) or opened[-1])
    monkeypatch.setattr(TorchFile, "close", lambda file: closed.append(file))
    checkpoint = SavannaCheckpoint(model)
    if early:  # while the files are compared
        path = write(tmp_path, checkpoint, "layers", shards=2)
        (path / "layer_03-model_00-model_states.pt").unlink()
        (path / "layer_04-model_00-model_states.pt").rename(path / "layer_03-model_00-model_states.pt")
        (path / "layer_04-model_01-model_states.pt").unlink()
        refusal(path)
    else:
        checkpoint.settings["num_layers"] = None
        refusal(write(tmp_path, checkpoint, "layers"), ConfigError)
    assert len(opened) == (10 if early else 6)  # the embedding, blocks, the last norm
    assert closed == opened
