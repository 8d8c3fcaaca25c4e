"""What savanna was run with decides what the model is; what is not supported is refused by its name."""

import dataclasses
import warnings
from pathlib import Path

import pytest
import torch
from savanna_models import ATTENTION, LI, MR, SE, assert_same, refusal, tiny, write
from savanna_writer import (
    SavannaCheckpoint,
)

import crocuta
from crocuta.config import (
    ModelConfig,
    RMSNormConfig,
    RopeConfig,
)
from crocuta.errors import ConfigError
from crocuta.model.lm import Model


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny(SE, MR, LI, ATTENTION)


def config_of(path: Path) -> ModelConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return crocuta.load(path)[0].config


@pytest.mark.parametrize(
    ("mixers", "changes", "expected"),
    [
        ((SE, ATTENTION, LI, SE), {}, "gelu gelu identity identity"),
        ((SE, MR), {}, "gelu identity"),
        ((LI,), {}, "identity"),
        ((SE, ATTENTION), {}, "gelu gelu"),
        ((SE, ATTENTION), {"activation": "silu"}, "silu silu"),
        ((SE, LI), {"gating-act": "swish"}, "gelu silu"),
        ((SE, LI, SE), {"parallel_glu_activation_default": "gelu"}, "gelu gelu gelu"),
    ],
)
def test_activations_follow_the_order_in_which_savanna_builds(mixers, changes, expected, tmp_path):
    checkpoint = SavannaCheckpoint(tiny(*mixers))
    checkpoint.settings |= changes
    config = config_of(write(tmp_path, checkpoint))
    assert " ".join(block.mlp.activation for block in config.blocks) == expected


def test_defaults(tmp_path):
    original = tiny(SE, LI)
    checkpoint = SavannaCheckpoint(original)
    for key in ("rms_norm_epsilon", "interleave_projections", "no_weight_tying", "num_groups_hyena", "prenorm"):
        del checkpoint.settings[key]
    loaded, _ = crocuta.load(write(tmp_path, checkpoint))
    assert loaded.config.norm == RMSNormConfig(eps=1e-8, eps_inside_root=False)
    assert loaded.config.tie_embeddings
    rows = [model.blocks[1].mixer.projection.weight for model in (loaded, original)]
    assert torch.equal(*rows)  # interleaved


@pytest.mark.parametrize(("kind", "scale"), [("rotary", 1.0), ("rotary2", 1.0), ("rotary_linear_scaled", 7.0)])
def test_positions(kind, scale, model, tmp_path):
    checkpoint = SavannaCheckpoint(model)
    checkpoint.settings |= {"pos-emb": kind, "rotary-emb-base": 1000, "rotary_emb_scaling_factor": 7.0}
    for key in ("pos_emb", "rotary_emb_base"):
        del checkpoint.settings[key]
    del checkpoint.tensors["5.mixer.rotary_emb.inv_freq"]
    config = config_of(write(tmp_path, checkpoint))
    assert config.blocks[3].mixer.rope == RopeConfig(base=1000.0, scale=scale)


@pytest.mark.parametrize("word", ["none", "None"])
def test_no_positions(word, tmp_path):
    bare = tiny(dataclasses.replace(ATTENTION, rope=None), LI)
    checkpoint = SavannaCheckpoint(bare)
    checkpoint.settings["pos_emb"] = word
    assert_same(write(tmp_path, checkpoint), bare)


@pytest.mark.parametrize(
    "operators",
    [
        [[["hyena_se", "hyena"], 2]],
        [[["hyena_se", "hyena"], "all"]],
        ["hyena_se", "hyena", "hyena_se", "hyena"],
        [[["hyena_se"], 1], [["hyena", "hyena_se"], 1], [["hyena"], 1]],
    ],
)
def test_operators_may_be_listed_in_several_ways(operators, tmp_path):
    alternating = tiny(SE, LI, SE, LI)
    checkpoint = SavannaCheckpoint(alternating)
    checkpoint.settings["operator-config"] = operators
    assert_same(write(tmp_path, checkpoint), alternating)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("operator-config", [[["hyena_doublegate"], 4]]),
        ("operator-config", [[["sparse_fixed"], 4]]),
        ("operator-config", [[["hyena_se"], 3]]),
        ("operator-config", [[["hyena_se"], -1]]),
        ("operator-config", "hyena"),
        ("operator-config", [["hyena_se", 4]]),
        ("mlp_type", "short_hyena"),
        ("mlp_type", None),
        ("norm", "layernorm"),
        ("pre_mlp_norm", None),
        ("postnorm", True),
        ("outer_mlp_norm", True),
        ("gpt_j_residual", True),
        ("identity_mlp", True),
        ("pos_emb", "alibi"),
        ("pos_emb", "rotary_ntk_scaled"),
        ("pos_emb", None),
        ("rotary_pct", 0.25),
        ("proj_groups", 4),
        ("use_slow_heads", True),
        ("bidirectional", True),
        ("pretraining_strategy", "MLM"),
        ("hyena_width_expansion", 2.0),
        ("hyena_se_pregate", False),
        ("use_cgcg", True),
        ("use_flashfft", True),
        ("bias-gelu-fusion", True),
        ("use_mup", True),
        ("activation", "relu"),
        ("gating_act", "sin"),
        ("pipe_parallel_size", 2),
        ("hyena_filter_cls", "implicit_real_modal"),
        ("hyena_filter_cls", None),
        ("hyena_medium_filter_cls", "implicit_modal"),
        ("output_layer_parallelism", "both"),
        ("short-conv-L", None),
        ("num_layers", None),
        ("hidden_size", 0),
        ("interleave_projections", "yes"),
    ],
)
def test_what_is_not_supported_is_named(key, value, model, tmp_path):
    checkpoint = SavannaCheckpoint(model)
    checkpoint.settings[key] = value
    text = refusal(write(tmp_path, checkpoint), ConfigError)
    assert key.replace("-", "_") in text


def test_a_setting_in_both_spellings_must_be_one(model, tmp_path):
    checkpoint = SavannaCheckpoint(model)
    checkpoint.settings["short_conv_L"] = 3
    assert_same(write(tmp_path, checkpoint), model)
    checkpoint.settings["short_conv_L"] = 4
    assert "short_conv_L: got '3 and 4'" in refusal(write(tmp_path, checkpoint), ConfigError)
