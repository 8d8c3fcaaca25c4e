"""HyenaDNA: the infix of checkpointed layers, what may be trained in the port, and what is refused."""

import pytest
import torch
from published_folders import GOLDEN, LIGHTNING, PORT, expected, read_config, rewrite, setting

from crocuta.checkpoints.load import load
from crocuta.config import HyenaConfig, ImplicitFilterConfig
from crocuta.errors import ConfigError, TokenizerError, WeightsFormatError
from crocuta.inference.embed import embed
from crocuta.tokenizers.dna import DNATokenizer

NAMES = (LIGHTNING, PORT)


@torch.no_grad()
def distance(model, name: str) -> float:
    tensors = expected(name)
    return float((model(tensors["input_ids"]) - tensors["logits"]).abs().max())


def filters(model) -> list[ImplicitFilterConfig]:
    found = [b.mixer.filter for b in model.config.blocks if isinstance(b.mixer, HyenaConfig)]
    assert all(isinstance(filter_, ImplicitFilterConfig) for filter_ in found)
    return found


def test_checkpointed_layers_have_an_infix(tmp_path):
    def infix(tensors):
        for key in list(tensors):
            for part in ("mixer", "mlp"):
                if f".{part}." in key:
                    tensors[key.replace(f".{part}.", f".{part}.layer.")] = tensors.pop(key)

    path = rewrite(LIGHTNING, tmp_path, infix, setting(checkpoint_mixer=True, checkpoint_mlp=True))
    assert distance(load(path)[0], LIGHTNING) <= 2e-4


def test_both_spellings_of_one_tensor_are_refused(tmp_path):
    def twice(tensors):
        key = "model.backbone.layers.0.mlp.fc1.weight"
        tensors[key.replace("mlp.", "mlp.layer.")] = tensors[key].clone()

    with pytest.raises(WeightsFormatError, match=r"hold both .*fc1.weight and .*layer.fc1.weight"):
        load(rewrite(LIGHTNING, tmp_path, twice))


@pytest.mark.parametrize("place", [1, 3, 5])
def test_the_shared_frequency_may_be_stored_once_in_any_place(place, tmp_path):
    def once(tensors):
        for key in list(tensors):
            if key.endswith(".1.freq"):
                tensors[key.replace(".1.freq", f".{place}.freq")] = tensors.pop(key)

    assert distance(load(rewrite(PORT, tmp_path, once))[0], PORT) <= 2e-4


def test_frequencies_that_are_not_shared_are_refused(tmp_path):
    def other(tensors):
        tensors["model.backbone.layers.1.mixer.filter_fn.implicit_filter.3.freq"] += 1

    with pytest.raises(WeightsFormatError, match=r"implicit_filter.3.freq .* differs from .*implicit_filter.1.freq"):
        load(rewrite(LIGHTNING, tmp_path, other))


@pytest.mark.parametrize("name", NAMES)
def test_features_are_those_of_the_formula_or_else_of_the_file(name, tmp_path):
    assert not any(filter_.positions.trained for filter_ in filters(load(GOLDEN / name)[0]))

    def trained(tensors):
        key = next(key for key in tensors if key.endswith("layers.1.mixer.filter_fn.pos_emb.z"))
        tensors[key] = tensors[key] + 0.01

    model, _ = load(rewrite(name, tmp_path / "z", trained))
    assert [filter_.positions.trained for filter_ in filters(model)] == [False, True]
    assert distance(model, name) > 2e-4

    def without(tensors):
        for key in list(tensors):
            if ".pos_emb." in key or key.endswith(".deltas"):
                del tensors[key]

    assert distance(load(rewrite(name, tmp_path / "none", without))[0], name) <= 2e-4


def test_a_window_with_other_rates_is_refused(tmp_path):
    def other(tensors):
        key = "hyena.backbone.layers.0.mixer.filter_fn.modulation.deltas"
        tensors[key] = tensors[key] * 1.01

    with pytest.raises(WeightsFormatError, match=r"modulation.deltas holds other rates"):
        load(rewrite(PORT, tmp_path, other))


def test_a_tied_head_in_the_port(tmp_path):
    def tie(tensors):
        del tensors["lm_head.weight"]

    model, _ = load(rewrite(PORT, tmp_path, tie, setting(tie_word_embeddings=True)))
    assert model.head is None
    with pytest.raises(WeightsFormatError, match=r"1 missing: lm_head.weight.*tie_word_embeddings"):
        load(rewrite(PORT, tmp_path / "untied", tie))


def test_keys_of_the_trainer_are_dropped_and_others_are_not(tmp_path):
    def metrics(tensors):
        tensors["train_torchmetrics.perplexity.total_log_probs"] = torch.zeros(())
        tensors["val_torchmetrics.num_tokens.count"] = torch.zeros(())

    assert distance(load(rewrite(LIGHTNING, tmp_path / "a", metrics))[0], LIGHTNING) <= 2e-4
    with pytest.raises(WeightsFormatError, match=r"1 unexpected: model.score.weight"):
        load(rewrite(LIGHTNING, tmp_path / "b", lambda t: t.update({"model.score.weight": torch.zeros(2)})))


@pytest.mark.parametrize("name", NAMES)
def test_the_tokenizer_has_the_published_ids(name):
    _, tokenizer = load(GOLDEN / name)
    assert isinstance(tokenizer, DNATokenizer)
    assert tokenizer.encode("ACGTN").tolist() == [7, 8, 9, 10, 11]
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id) == (16, 1, 4)
    assert tokenizer.prefix_ids == ((0,) if name == LIGHTNING else ())
    assert tokenizer.suffix_ids == (1,)


@pytest.mark.parametrize(("name", "ids"), [(LIGHTNING, [0, 7, 8, 9, 1]), (PORT, [7, 8, 9, 1])])
def test_embeddings_with_the_special_tokens_of_the_publisher(name, ids):
    model, tokenizer = load(GOLDEN / name)
    (found,) = embed(model, tokenizer, ["ACG"], pooling="none", special_tokens=True)
    (expected_,) = embed(model, None, [ids], pooling="none")
    assert (found == expected_).all()
    assert len(embed(model, tokenizer, ["ACG"], pooling="none")[0]) == 3
    with pytest.raises(TokenizerError, match="puts no special tokens"):
        embed(model, DNATokenizer(), ["ACG"], special_tokens=True)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        (PORT, {"hyena_order": 3}, "hyena_order: got 3; expected 2"),
        (PORT, {"short_filter_order": 4}, "short_filter_order: got 4; expected 3"),
        (PORT, {"emb_dim": 4}, "features is impossible: got 4"),
        (PORT, {"max_seq_len": 0}, "max_seq_len: got 0"),
        (LIGHTNING, {"layer": {"_name_": "mamba", "l_max": 258}}, "layer: _name_"),
        (LIGHTNING, {"layer": {"_name_": "hyena", "l_max": 258, "modulate": False}}, "modulate"),
        (LIGHTNING, {"layer": {"_name_": "hyena", "bidirectional": True}}, "bidirectional"),
        (LIGHTNING, {"layer": {"_name_": "hyena"}}, "lacks l_max"),
        (LIGHTNING, {"embed_dropout": 1.0}, "embed_dropout"),
    ],
)
def test_configurations_that_describe_no_model(name, values, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        load(rewrite(name, tmp_path, config=setting(**values)))


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"d_inner": 100}, "d_inner"),
        ({"n_layer": 3}, "n_layer"),
        ({"n_layer": 1}, "n_layer"),
        ({"num_inner_mlps": 1}, "num_inner_mlps"),
        ({"filter_order": 32}, "filter_order"),
        ({"vocab_size": 20}, "vocab_size"),
    ],
)
def test_configurations_of_another_model_name_the_field(values, field, tmp_path):
    with pytest.raises(WeightsFormatError, match=field):
        load(rewrite(PORT, tmp_path, config=setting(**values)))


def test_the_port_gives_its_epsilon_to_the_last_norm_alone(tmp_path):
    model, _ = load(rewrite(PORT, tmp_path / "a", config=setting(layer_norm_epsilon=0.1)))
    assert {block.norm.eps for block in model.config.blocks} == {1e-5}
    assert model.config.norm.eps == 0.1
    model, _ = load(rewrite(LIGHTNING, tmp_path / "b", config=setting(layer_norm_epsilon=0.1)))
    assert {block.norm.eps for block in model.config.blocks} == {model.config.norm.eps} == {0.1}


def test_settings_that_no_published_code_reads(tmp_path):
    layer = {**read_config(LIGHTNING)["layer"], "local_order": 7}
    assert distance(load(rewrite(LIGHTNING, tmp_path / "a", config=setting(layer=layer)))[0], LIGHTNING) <= 2e-4
    assert distance(load(rewrite(PORT, tmp_path / "b", config=setting(use_bias=False)))[0], PORT) <= 2e-4


def test_vocabularies_are_padded_as_the_two_configurations_say(tmp_path):
    def without(values):
        del values["pad_vocab_size_multiple"]

    assert distance(load(rewrite(PORT, tmp_path / "a", config=without))[0], PORT) <= 2e-4
    with pytest.raises(WeightsFormatError, match="pad_vocab_size_multiple"):  # 1 in the original
        load(rewrite(LIGHTNING, tmp_path / "b", config=without))


def test_a_window_in_half_precision_is_not_another_window(tmp_path):
    def half(tensors):
        for key in tensors:
            tensors[key] = tensors[key].bfloat16()

    with pytest.raises(WeightsFormatError, match=r"of the wrong dtype: .*need the float32 that they were trained in"):
        load(rewrite(PORT, tmp_path, half))


@pytest.mark.parametrize(
    ("end", "change", "message"),
    [
        ("pos_emb.t", lambda t: t * 5, "holds other times"),
        ("pos_emb.t", lambda t: t * float("nan"), "holds other times"),
        ("pos_emb.t", lambda t: t[:, 1:].clone(), "holds other times"),
        ("modulation.deltas", lambda t: t[..., 1:].clone(), "is misshapen"),
    ],
)
def test_what_is_computed_must_be_what_is_stored(end, change, message, tmp_path):
    def other(tensors):
        key = f"hyena.backbone.layers.1.mixer.filter_fn.{end}"
        tensors[key] = change(tensors[key])

    with pytest.raises(WeightsFormatError, match=message):
        load(rewrite(PORT, tmp_path, other))


@pytest.mark.parametrize("key", ["activation", "fast_decay_pct", "target"])
def test_layers_of_another_kind_are_refused(key, tmp_path):
    layer = {**read_config(LIGHTNING)["layer"], key: "gelu" if key == "activation" else 0.7}
    with pytest.raises(ConfigError, match=key):
        load(rewrite(LIGHTNING, tmp_path, config=setting(layer=layer)))
