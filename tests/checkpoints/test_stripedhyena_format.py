"""StripedHyena-7B and Evo 1: options of the published configurations, shards, and what is refused."""

import json

import pytest
import torch
from published_folders import EVO1, GOLDEN, STANDALONE, expected, read_config, read_weights, rewrite, setting
from safetensors.torch import load_file, save_file

from crocuta.checkpoints.load import load
from crocuta.config import AttentionConfig
from crocuta.errors import ConfigError, CrocutaWarning, WeightsFormatError


@torch.no_grad()
def distance(model, name: str) -> float:
    tensors = expected(name)
    return float((model(tensors["input_ids"]) - tensors["logits"]).abs().max())


def rope_of(model) -> tuple[float, float]:
    mixer = next(block.mixer for block in model.config.blocks if isinstance(block.mixer, AttentionConfig))
    assert mixer.rope is not None
    return mixer.rope.base, mixer.rope.scale


# --- layouts ---


def test_attention_is_not_permuted_whatever_column_split_says(tmp_path):
    for split in (True, False):
        model, _ = load(rewrite(EVO1, tmp_path / str(split), config=setting(column_split=split)))
        assert distance(model, EVO1) <= 2e-4


def test_projections_in_three_thirds(tmp_path):
    heads, size = 8, 8

    def thirds(tensors):
        for key, tensor in tensors.items():
            if "projections" in key or "short_filter" in key:
                rows = tensor.view(heads, 3, size, *tensor.shape[1:])
                tensors[key] = torch.cat([rows[:, part].flatten(0, 1) for part in range(3)])

    folder = rewrite(STANDALONE, tmp_path / "a", weights=thirds, config=setting(column_split_hyena=False))
    model, _ = load(folder)
    assert distance(model, STANDALONE) <= 2e-4
    wrong, _ = load(rewrite(STANDALONE, tmp_path / "b", weights=thirds))
    assert distance(wrong, STANDALONE) > 0.1


def test_published_layer_lists_may_go_past_the_last_layer(tmp_path):
    model, tokenizer = load(rewrite(STANDALONE, tmp_path, config=setting(attn_layer_idxs=[1, 3, 7])))
    assert tokenizer is None
    assert len(model.config.blocks) == 4


def test_weights_without_the_prefix_load_too(tmp_path):
    def strip(tensors):
        for key in list(tensors):
            tensors[key.removeprefix("backbone.")] = tensors.pop(key)

    model, _ = load(rewrite(EVO1, tmp_path, weights=strip))
    assert distance(model, EVO1) <= 2e-4


def test_stored_frequencies_are_not_used(tmp_path):
    def spoil(tensors):
        for key in tensors:
            if key.endswith("inv_freq"):
                tensors[key] = tensors[key] * 3

    model, _ = load(rewrite(EVO1, tmp_path, weights=spoil))
    assert distance(model, EVO1) <= 2e-4


@pytest.mark.parametrize(("said", "base"), [({}, 10_000.0), ({"rotary_emb_base": 77.0}, 77.0)])
def test_the_base_of_evo_is_ten_thousand_unless_it_says_otherwise(said, base, tmp_path):
    assert rope_of(load(rewrite(EVO1, tmp_path, config=setting(**said)))[0])[0] == base


def test_the_base_of_stripedhyena_7b_on_hugging_face_is_half_a_million(tmp_path):
    folder = rewrite(STANDALONE, tmp_path / "yml")
    values = dict(read_config(STANDALONE), model_type="stripedhyena")
    for key in ("rotary_emb_base", "eps", "proj_groups", "use_flash_rmsnorm", "state_size", "qkv_proj_bias"):
        del values[key]  # as transformers does with what equals the default
    hf = tmp_path / "hf"
    hf.mkdir()
    (hf / "config.json").write_text(json.dumps(values))
    tensors = torch.load(folder / "pytorch-model.bin", weights_only=True)
    save_file({f"backbone.{key}": tensor for key, tensor in tensors.items()}, hf / "model.safetensors")
    model, _ = load(hf)
    assert rope_of(model)[0] == 500_000.0
    assert distance(model, STANDALONE) <= 2e-4


def test_weights_of_hugging_face_in_a_pickled_file(tmp_path):
    folder = rewrite(EVO1, tmp_path)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert distance(load(folder)[0], EVO1) <= 2e-4


def test_the_swap_of_the_gates_is_unknown_to_this_generation(tmp_path):
    assert distance(load(rewrite(STANDALONE, tmp_path, config=setting(hyena_flip_x1x2=True)))[0], STANDALONE) <= 2e-4


def test_a_null_is_the_formula_and_not_the_default_of_the_class(tmp_path):
    values = {**read_config(STANDALONE), "model_type": "stripedhyena", "inner_mlp_size": None}
    values["inner_size_multiple_of"] = 16  # 176 for 64 channels, as stored
    (tmp_path / "config.json").write_text(json.dumps(values))
    tensors = read_weights(STANDALONE)
    save_file({f"backbone.{key}": tensor for key, tensor in tensors.items()}, tmp_path / "model.safetensors")
    assert distance(load(tmp_path)[0], STANDALONE) <= 2e-4


# --- the 131k model ---


@pytest.mark.parametrize(
    ("folder", "config"),
    [
        ("evo-1-131k-base", {}),
        ("models--togethercomputer--evo-1-131k-base/snapshots/0123abcd", {}),
        ("any", {"_name_or_path": "togethercomputer/evo-1-131k-base"}),
        ("any", {"max_seqlen": 131072}),
    ],
)
def test_the_scale_of_the_131k_model_is_that_of_the_published_yml(folder, config, tmp_path):
    wrong = setting(use_interpolated_rotary_pos_emb=False, rotary_emb_scaling_factor=1, **config)
    path = rewrite(EVO1, tmp_path / folder, config=wrong)
    with pytest.warns(CrocutaWarning, match=r"published for \(true, 16\)"):
        model, _ = load(path)
    assert rope_of(model)[1] == 16
    assert distance(model, EVO1) <= 2e-4


def test_no_other_model_gets_that_scale(tmp_path):
    further = setting(use_interpolated_rotary_pos_emb=True, rotary_emb_scaling_factor=32)
    assert rope_of(load(rewrite(EVO1, tmp_path / "evo-1-131k-mine", config=further))[0])[1] == 32
    path = rewrite(EVO1, tmp_path / "evo-1-8k-base", config=setting(use_interpolated_rotary_pos_emb=False))
    assert rope_of(load(path)[0])[1] == 1
    path = rewrite(EVO1, tmp_path / "other", config=setting(rotary_emb_scaling_factor=4))
    assert rope_of(load(path)[0])[1] == 4


# --- shards ---


def shard(folder, *, change=lambda weight_map: None) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    homes = {name: f"model-0000{1 + i % 3}-of-00003.safetensors" for i, name in enumerate(names)}
    for home in set(homes.values()):
        save_file({name: tensors[name] for name in names if homes[name] == home}, folder / home)
    change(homes)
    index = {"metadata": {"total_size": 1}, "weight_map": homes}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_shards(tmp_path):
    shard(rewrite(EVO1, tmp_path))
    model, tokenizer = load(tmp_path)
    assert distance(model, EVO1) <= 2e-4
    assert tokenizer is not None
    assert tokenizer.vocab_size == 512


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop(min(m)), "disagree about 1 tensors, first backbone.blocks.0.filter.D"),
        (lambda m: m.update(ghost=min(m.values())), "disagree about 1 tensors, first ghost"),
        (lambda m: m.update({min(m): max(m.values())}), "disagree about 1 tensors"),
        (lambda m: m.update({min(m): "../model.safetensors"}), "impossible shards"),
        (lambda m: m.update({min(m): "/etc/passwd"}), "impossible shards"),
        (lambda m: m.update({min(m): "absent.safetensors"}), "cannot read .*absent.safetensors"),
        (lambda m: m.update({min(m): 7}), "no weight_map"),
        (lambda m: m.clear(), "no weight_map"),
    ],
)
def test_an_index_that_is_wrong(change, message, tmp_path):
    shard(rewrite(EVO1, tmp_path), change=change)
    with pytest.raises(WeightsFormatError, match=message):
        load(tmp_path)


def test_whole_and_sharded_weights_in_one_folder_are_refused(tmp_path):
    shard(rewrite(EVO1, tmp_path))
    rewrite(EVO1, tmp_path)
    with pytest.raises(WeightsFormatError, match="has weights twice"):
        load(tmp_path)


# --- what is refused ---


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"smeared_gqa": True}, "smeared_gqa"),
        ({"final_norm": False}, "final_norm"),
        ({"short_filter_bias": False}, "short_filter_bias"),
        ({"long_fir_threshold": 2048}, "long_fir_threshold"),
        ({"hyena_filter_groups": 64}, "hyena_filter_groups: got 64; expected 1"),
        ({"mlp_activation": "relu"}, "mlp_activation: got 'relu'; expected silu or gelu"),
        ({"proj_groups": 3}, "proj_groups: got 3; expected a divisor of num_attention_heads=8"),
        ({"num_layers": 10**9}, "num_layers: got 1000000000; expected a whole number from 1 to 1000"),
        ({"num_layers": True}, "num_layers: got True"),
        ({"hidden_size": "64"}, "hidden_size: got '64'"),
        ({"eps": -1.0}, "eps: got -1.0"),
        ({"eps": float("inf")}, "eps: got inf"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"attn_layer_idxs": "1,3"}, "attn_layer_idxs"),
        ({"hyena_layer_idxs": [0, 1, 2]}, r"hyena_layer_idxs: got \[0, 1, 2\]"),
        ({"num_attention_heads": 12}, "num_heads must divide hidden_size"),
    ],
)
def test_configurations_that_describe_no_model(values, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        load(rewrite(STANDALONE, tmp_path, config=setting(**values)))


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"num_layers": 5}, "num_layers"),
        ({"num_layers": 3}, "num_layers"),
        ({"state_size": 4}, "state_size"),
        ({"inner_mlp_size": 160}, "inner_mlp_size"),
        ({"vocab_size": 256}, "vocab_size"),
        ({"tie_embeddings": True}, "tie_embeddings"),
        ({"proj_groups": 1}, "proj_groups"),
        ({"qkv_proj_bias": True}, "qkv_proj_bias"),
        ({"mha_out_proj_bias": True}, "mha_out_proj_bias"),
        ({"short_filter_length": 4}, "short_filter_length"),
        ({"attn_layer_idxs": [1], "hyena_layer_idxs": [0, 2, 3]}, "attn_layer_idxs"),
    ],
)
def test_configurations_of_another_model_name_the_field(values, field, tmp_path):
    with pytest.raises(WeightsFormatError, match=field):
        load(rewrite(STANDALONE, tmp_path, config=setting(**values)))


def test_a_folder_of_two_formats_says_so(tmp_path):
    rewrite(STANDALONE, tmp_path)
    rewrite(EVO1, tmp_path)
    with pytest.raises(WeightsFormatError, match=r"fits 2 formats: got stripedhyena: .*; stripedhyena-hf: "):
        load(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "config.yml is not YAML"),
        ("- 1", "config.yml must hold a mapping: got list"),
        ("a: &x 1\nb: *x", "aliases are not allowed"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("{a: 1, a: 2}", "duplicate key 'a'"),
        ("1: 2", "must hold a mapping"),
        ("a: " + "[" * 5000, "config.yml is not YAML"),
    ],
)
def test_a_broken_yaml_is_the_reason_given(text, message, tmp_path):
    rewrite(STANDALONE, tmp_path)
    (tmp_path / "config.yml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load(tmp_path)


def test_another_yaml_is_no_format(tmp_path):
    rewrite(STANDALONE, tmp_path)
    (tmp_path / "config.yml").write_text("a: 1")
    with pytest.raises(WeightsFormatError, match=r"no known checkpoint: expected .*hyena_layer_idxs"):
        load(tmp_path)


def test_poles_on_or_outside_the_circle_are_named_once(tmp_path):
    def unstable(tensors):
        tensors["blocks.0.filter.poles"][3, 1] = torch.tensor([[0.6, 0.8]])
        tensors["blocks.2.filter.poles"][5, 0] = torch.tensor([[-1.5, 0.0]])

    path = rewrite(STANDALONE, tmp_path, weights=unstable)
    with pytest.warns(
        CrocutaWarning, match=r"blocks.0.mixer.filter channel 3, blocks.2.mixer.filter channel 5;"
    ) as all_:
        load(path)
    assert len(all_) == 1
    with pytest.raises(WeightsFormatError, match=r"blocks.2.mixer.filter channel 5"):
        load(path, unstable="refuse")
    load(GOLDEN / STANDALONE, unstable="refuse")


def test_poles_in_bfloat16_are_refused(tmp_path):
    def narrow(tensors):
        tensors["blocks.0.filter.poles"] = tensors["blocks.0.filter.poles"].bfloat16()

    with pytest.raises(WeightsFormatError, match=r"blocks.0.filter.poles is torch.bfloat16"):
        load(rewrite(STANDALONE, tmp_path, weights=narrow))


def test_weights_that_are_not_finite_are_named_as_in_the_file(tmp_path):
    def spoil(tensors):
        tensors["blocks.2.mlp.l3.weight"][0, 0] = float("nan")

    with pytest.raises(WeightsFormatError, match=r"blocks.2.mlp.l3.weight of .* has NaN"):
        load(rewrite(STANDALONE, tmp_path, weights=spoil))
