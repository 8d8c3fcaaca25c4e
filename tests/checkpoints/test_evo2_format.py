"""Evo 2: parts, published names, padding of MLPs, FP8 scales and the options of vortex."""

import io
import pickle
import shutil

import pytest
import torch
from published_folders import EVO2, GOLDEN, expected, read_config, read_weights, rewrite, setting

from crocuta.checkpoints.families import evo2
from crocuta.checkpoints.load import load
from crocuta.checkpoints.native import save
from crocuta.config import AttentionConfig, GatedMLPConfig, HyenaConfig
from crocuta.errors import ConfigError, CrocutaWarning, InputError, WeightsFormatError
from crocuta.model.fp8 import FP8Linear
from crocuta.published import Published


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(expected(EVO2)["input_ids"])


def distance(model) -> float:
    return float((logits(model) - expected(EVO2)["logits"]).abs().max())


# --- files ---


def test_one_file_parts_and_the_file_itself(tmp_path):
    folder = rewrite(EVO2, tmp_path / "whole")
    for path in (folder, folder / "tiny.pt", GOLDEN / EVO2 / "evo2-8k-tiny.pt.part0"):
        assert distance(load(path)[0]) <= 2e-4


def test_parts_are_read_in_the_order_of_their_numbers_and_stay(tmp_path):
    data = (rewrite(EVO2, tmp_path) / "tiny.pt").read_bytes()
    (tmp_path / "tiny.pt").unlink()
    size = -(-len(data) // 12)
    for part in range(12):
        (tmp_path / f"tiny.pt.part{part}").write_bytes(data[part * size : (part + 1) * size])
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert distance(load(tmp_path)[0]) <= 2e-4
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    (tmp_path / "tiny.pt.part7").unlink()
    with pytest.raises(WeightsFormatError, match=r"parts of .*tiny.pt are missing.*expected 0, 1, 2"):
        load(tmp_path)


def test_a_merged_file_beside_its_parts_is_taken(tmp_path):
    shutil.copytree(GOLDEN / EVO2, tmp_path / "both")
    torch.save(read_weights(EVO2), tmp_path / "both" / "evo2-8k-tiny.pt")
    (tmp_path / "both" / "evo2-8k-tiny.pt.part1").unlink()
    assert distance(load(tmp_path / "both")[0]) <= 2e-4


# --- published names, whose repositories hold no configuration ---


def known_as(monkeypatch, fp8: str) -> None:
    def published_of_file(stem: str) -> Published | None:
        if not stem.startswith("evo2_tiny.pt"):
            return None
        return Published(name=stem, repo="a/b", preset="tiny", layout="evo2", files=(), fp8=fp8)

    config = load(GOLDEN / EVO2)[0].config
    monkeypatch.setattr(evo2, "published_of_file", published_of_file)
    monkeypatch.setattr(evo2, "preset", {"tiny": config}.__getitem__)


def test_a_file_is_known_by_its_published_name(tmp_path, monkeypatch):
    known_as(monkeypatch, "no")
    torch.save(read_weights(EVO2), tmp_path / "evo2_tiny.pt")
    (tmp_path / "config.json").write_text("{}")
    for path in (tmp_path, tmp_path / "evo2_tiny.pt"):
        assert distance(load(path)[0]) <= 2e-4


def test_a_renamed_file_is_known_by_the_config_json_beside_it(tmp_path, monkeypatch):
    known_as(monkeypatch, "no")
    torch.save(read_weights(EVO2), tmp_path / "model.pt")
    with pytest.raises(WeightsFormatError, match="or a published name"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"architecture": ["StripedHyena2"], "_name_or_path": "evo2_tiny.pt"}')
    assert distance(load(tmp_path)[0]) <= 2e-4


def test_fp8_by_name_is_required_or_optional(tmp_path, monkeypatch):
    torch.save(read_weights(EVO2), tmp_path / "evo2_tiny.pt")
    known_as(monkeypatch, "required")
    with pytest.raises(WeightsFormatError, match="lacks the FP8 scales"):
        load(tmp_path)
    known_as(monkeypatch, "optional")
    model, _ = load(tmp_path)
    assert model.config.unverified == ""
    assert distance(model) <= 2e-4
    torch.save(with_scales(read_weights(EVO2)), tmp_path / "evo2_tiny.pt")
    assert uses_fp8(load(tmp_path)[0])


# --- padding ---


def pad(tensors, to: int = 208) -> None:
    for key in list(tensors):
        if ".mlp.l" in key:
            axis = 1 if "l3" in key else 0
            shape = list(tensors[key].shape)
            shape[axis] = to - shape[axis]
            tensors[key] = torch.cat([tensors[key], torch.zeros(shape)], axis)


def widths(model) -> set[int]:
    return {b.mlp.intermediate_size for b in model.config.blocks if isinstance(b.mlp, GatedMLPConfig)}


def test_zero_units_are_sliced_away_or_kept(tmp_path):
    path = rewrite(EVO2, tmp_path, weights=pad, config=setting(inner_mlp_size=208))
    plain, _ = load(GOLDEN / EVO2)
    sliced, _ = load(path)
    kept, _ = load(path, keep_padding=True)
    assert (widths(sliced), widths(kept)) == ({176}, {208})
    for key, tensor in plain.state_dict().items():
        assert torch.equal(tensor, sliced.state_dict()[key])
    assert torch.equal(logits(sliced), logits(plain))
    assert distance(kept) <= 2e-4


@pytest.mark.parametrize("key", ["l1", "l2"])
def test_a_unit_that_is_not_zero_everywhere_stays(key, tmp_path):
    def almost(tensors):
        pad(tensors)
        tensors[f"blocks.5.mlp.{key}.weight"][190, 7] = 1e-30

    path = rewrite(EVO2, tmp_path, weights=almost, config=setting(inner_mlp_size=208))
    assert widths(load(path)[0]) == {192}


def test_layers_that_are_all_zero_do_not_vanish(tmp_path):
    def silent(tensors):
        for key in tensors:
            if ".mlp.l" in key:
                tensors[key] = torch.zeros_like(tensors[key])

    model, _ = load(rewrite(EVO2, tmp_path, weights=silent))
    assert widths(model) == {16}


# --- FP8 ---

KEY = "projections._extra_state"


def te_state(input_scale: float, weight_scale: float) -> dict[str, object]:
    scales = torch.tensor([input_scale, weight_scale, 1.0])
    return {
        "scale_fwd": scales,
        "scale_inv_fwd": 1 / scales,
        "amax_history_fwd": torch.zeros(16, 3),
        "extra_fp8_variables": {"fp8_max_fwd": 448.0, "num_gemms": 1},
    }


def saved(state: object) -> io.BytesIO:
    blob = io.BytesIO()
    torch.save(state, blob)
    return blob


def pickled(state: object) -> torch.Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)


def with_scales(tensors, wrap=saved, state=te_state):
    for index in range(7):
        if f"blocks.{index}.projections.weight" in tensors:
            tensors[f"blocks.{index}.{KEY}"] = wrap(state(2.0**index, 2.0 ** (index + 3)))
            tensors[f"blocks.{index}.mlp.l1._extra_state"] = saved(None)
    return tensors


def uses_fp8(model) -> bool:
    return all(b.mixer.fp8_projection for b in model.config.blocks if isinstance(b.mixer, HyenaConfig))


FP8 = setting(use_fp8_input_projections=True)


@pytest.mark.parametrize("wrap", [saved, pickled])
def test_scales_are_read_out_of_what_transformer_engine_pickled(wrap, tmp_path):
    model, _ = load(rewrite(EVO2, tmp_path, weights=lambda t: with_scales(t, wrap) and None, config=FP8))
    assert uses_fp8(model)
    for index, block in enumerate(model.blocks):
        if isinstance(model.config.blocks[index].mixer, HyenaConfig):
            projection = block.mixer.projection
            assert isinstance(projection, FP8Linear)
            assert (float(projection.input_scale), float(projection.weight_scale)) == (2.0**index, 2.0 ** (index + 3))
    assert 1e-3 < distance(model) < 20  # rounding to E4M3 shows, and is only rounding


def test_without_scales_it_is_refused_unless_told(tmp_path):
    for number, blob in enumerate((None, saved(None), io.BytesIO(), torch.zeros(0, dtype=torch.uint8))):
        path = rewrite(EVO2, tmp_path / str(number), config=FP8)
        if blob is not None:
            tensors = read_weights(EVO2)
            for index in (0, 1, 2, 4, 5, 6):
                tensors[f"blocks.{index}.{KEY}"] = blob
            torch.save(tensors, path / "tiny.pt")
        with pytest.raises(WeightsFormatError, match=r"lacks the FP8 scales .* in 6 places.*fp8='off'"):
            load(path)
    model, _ = load(path, fp8="off")
    assert "FP8" in model.config.unverified
    assert distance(model) <= 2e-4
    assert load(GOLDEN / EVO2, fp8="off")[0].config.unverified == ""


def test_scales_that_were_saved_without_a_pickle_of_their_own(tmp_path):
    model, _ = load(rewrite(EVO2, tmp_path, weights=lambda t: with_scales(t, dict) and None, config=FP8))
    assert uses_fp8(model)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_scales_are_refused(bad, tmp_path):
    weights = lambda t: with_scales(t, state=lambda a, b: te_state(bad, b)) and None  # noqa: E731
    with pytest.raises(WeightsFormatError, match="impossible scales"):
        load(rewrite(EVO2, tmp_path, weights=weights, config=FP8))


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('ran')",))


@pytest.mark.parametrize("wrap", [saved, pickled])
def test_code_in_the_extra_state_is_not_run(wrap, tmp_path):
    weights = lambda t: with_scales(t, wrap, lambda *_: {"scale_fwd": Evil()}) and None  # noqa: E731
    with pytest.raises(WeightsFormatError, match="exec"):
        load(rewrite(EVO2, tmp_path, weights=weights, config=FP8))


# --- options of vortex ---


def rows(change):
    def apply(tensors):
        for key in tensors:
            if "projections.weight" in key or "short_filter_weight" in key:
                tensors[key] = change(tensors[key])

    return apply


def test_projections_that_are_not_interleaved(tmp_path):
    weights = rows(lambda t: torch.cat([t[0::3], t[1::3], t[2::3]]))
    assert distance(load(rewrite(EVO2, tmp_path / "a", weights, setting(interleave=False)))[0]) <= 2e-4

    def without_the_key(values):
        del values["interleave"]

    assert distance(load(rewrite(EVO2, tmp_path / "b", weights, without_the_key))[0]) <= 2e-4


def test_wqkv_in_three_thirds(tmp_path):
    def thirds(tensors):
        key = "blocks.3.inner_mha_cls.Wqkv.weight"
        heads = tensors[key].view(4, 3, 16, 64)
        tensors[key] = heads.transpose(0, 1).reshape(192, 64).contiguous()

    assert distance(load(rewrite(EVO2, tmp_path, thirds, setting(column_split=False)))[0]) <= 2e-4


def test_flipped_gates(tmp_path):
    weights = rows(lambda t: torch.stack([t[1::3], t[0::3], t[2::3]], 1).flatten(0, 1))
    assert distance(load(rewrite(EVO2, tmp_path, weights, setting(hyena_flip_x1x2=True)))[0]) <= 2e-4


def test_frequencies_are_those_of_the_file_and_computed_without_them(tmp_path):
    def without(tensors):
        del tensors["blocks.3.inner_mha_cls.rotary_emb.inv_freq"]

    model, _ = load(rewrite(EVO2, tmp_path, weights=without))
    mixer = model.config.blocks[3].mixer
    assert isinstance(mixer, AttentionConfig)
    assert mixer.rope is not None
    assert not mixer.rope.stored
    assert 2e-4 < distance(model) < 1  # the rounding of the file's frequencies


def test_gates_are_linear_after_the_first_layer_only_where_the_configuration_says_so(tmp_path):
    model, _ = load(rewrite(EVO2, tmp_path, config=setting(evo2_style_activations=False)))
    assert {b.mlp.activation for b in model.config.blocks if isinstance(b.mlp, GatedMLPConfig)} == {"gelu"}
    assert distance(model) > 0.1


def test_the_repeated_head_must_be_the_embedding(tmp_path):
    def other(tensors):
        tensors["unembed.weight"] = tensors["unembed.weight"] + 1

    with pytest.raises(
        WeightsFormatError, match=r"unembed.weight .* differs from embedding_layer.weight.*tie_embeddings"
    ):
        load(rewrite(EVO2, tmp_path, weights=other))
    model, _ = load(rewrite(EVO2, tmp_path, weights=other, config=setting(tie_embeddings=False)))
    assert model.head is not None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hcl_layer_idxs": [2]}, "layer 6 in no list"),
        ({"hcs_layer_idxs": [0, 4, 5]}, "layer 5 in hcs_layer_idxs, hcm_layer_idxs"),
        ({"proj_groups": 2}, "proj_groups: got 2; expected 1 where column_split is true"),
        ({"hcm_filter_groups": 7}, "hcm_filter_groups: got 7; expected a divisor of hidden_size=64"),
        ({"mlp_activation": "swish"}, "mlp_activation"),
    ],
)
def test_configurations_that_describe_no_model(values, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        load(rewrite(EVO2, tmp_path, config=setting(**values)))


def test_the_tokenizer_is_the_bytes_of_evo(tmp_path):
    _, tokenizer = load(GOLDEN / EVO2)
    assert tokenizer is not None
    assert tokenizer.encode("ACGT").tolist() == [65, 67, 71, 84]
    assert read_config(EVO2)["vocab_size"] == tokenizer.vocab_size == 512
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 0, 1)


def published_dtypes(tensors) -> None:
    """bfloat16, but for what is float32 in the files."""
    for key in tensors:
        if not key.endswith(("poles", "residues", "inv_freq")):
            tensors[key] = tensors[key].bfloat16()


def test_a_file_in_the_published_dtypes_runs_as_stored(tmp_path):
    model, _ = load(rewrite(EVO2, tmp_path, published_dtypes))
    state = model.state_dict()
    assert state["blocks.0.mixer.projection.weight"].dtype == torch.bfloat16
    assert state["blocks.1.mixer.filter.weight"].dtype == torch.float32
    assert state["blocks.3.mixer.rope.inverse"].dtype == torch.float32
    assert logits(model).dtype == torch.float32
    exact, _ = load(tmp_path, dtype=torch.float32)
    error = (logits(model) - logits(exact)).pow(2).mean().sqrt() / logits(exact).pow(2).mean().sqrt()
    assert error < 0.03  # seven layers of bfloat16


def test_matrices_that_are_wider_than_the_embedding_run_too(tmp_path):
    """As the projections of evo2_20b."""

    def wide(tensors):
        published_dtypes(tensors)
        for key in tensors:
            if key.endswith("projections.weight"):
                tensors[key] = tensors[key].float()

    model, _ = load(rewrite(EVO2, tmp_path / "plain", wide))
    assert model.blocks[0].mixer.projection.weight.dtype == torch.bfloat16
    assert torch.isfinite(logits(model)).all()

    def scaled(tensors):
        wide(tensors)
        with_scales(tensors)

    model, _ = load(rewrite(EVO2, tmp_path / "fp8", scaled, FP8))
    assert model.blocks[0].mixer.projection.weight.dtype == torch.float32
    assert torch.isfinite(logits(model)).all()


def test_upstream_precision_is_an_option_of_loading(tmp_path):
    path = rewrite(EVO2, tmp_path, published_dtypes)
    exact, upstream = load(path)[0], load(path, precision="upstream")[0]
    assert (exact.config.precision, upstream.config.precision) == ("exact", "upstream")
    assert logits(upstream).dtype == torch.bfloat16
    assert not torch.equal(logits(upstream).float(), logits(exact))
    assert torch.equal(logits(load(GOLDEN / EVO2, precision="upstream")[0]), logits(load(GOLDEN / EVO2)[0]))


@pytest.mark.parametrize("option", ["fp8", "precision", "unstable"])
def test_unknown_options_are_refused(option):
    with pytest.raises(InputError, match=f"{option} is unknown: got 'maybe'"):
        load(GOLDEN / EVO2, **{option: "maybe"})


def test_fp8_and_precision_of_a_saved_model_can_be_chosen_again(tmp_path):
    def scaled(tensors):
        with_scales(tensors)

    model, tokenizer = load(rewrite(EVO2, tmp_path / "a", scaled, FP8), precision="upstream")
    save(model, tokenizer, tmp_path / "b")
    again, _ = load(tmp_path / "b")
    assert again.config == model.config
    assert torch.equal(logits(again), logits(model))
    plain, _ = load(tmp_path / "b", fp8="off", precision="exact")
    assert "FP8" in plain.config.unverified
    assert plain.config.precision == "exact"
    assert torch.equal(logits(plain), logits(load(tmp_path / "a", fp8="off")[0]))


# --- explicit filters of other lengths: vortex decides by 128 taps what they are ---


def cut(taps: int, *, with_d: bool):
    def apply(tensors):
        for index in (1, 5):
            tensors[f"blocks.{index}.filter.h"] = tensors[f"blocks.{index}.filter.h"][..., :taps].clone()
            if not with_d:
                del tensors[f"blocks.{index}.filter.D"]

    return apply


def test_few_taps_without_d_are_a_correlation(tmp_path):
    model, _ = load(rewrite(EVO2, tmp_path, cut(64, with_d=False), setting(hcm_filter_length=64)))
    block = model.config.blocks[1].mixer
    assert isinstance(block, HyenaConfig)
    assert not block.skip
    stored = read_weights(EVO2)["blocks.1.filter.h"][:, 0, :64]
    assert torch.equal(model.blocks[1].mixer.filter.weight, stored.flip(-1))


def test_few_taps_with_d_are_what_was_trained_and_said_to_be_so(tmp_path):
    path = rewrite(EVO2, tmp_path, cut(64, with_d=True), setting(hcm_filter_length=64))
    with pytest.warns(CrocutaWarning, match=r"filter.D beside fewer than 128 taps in blocks \[1, 5\]"):
        model, _ = load(path)
    stored = read_weights(EVO2)["blocks.1.filter.h"][:, 0, :64]
    assert torch.equal(model.blocks[1].mixer.filter.weight, stored)
    assert model.blocks[1].mixer.skip is not None


def test_many_taps_need_their_d(tmp_path):
    def long(tensors):
        for index in (0, 4):
            tensors[f"blocks.{index}.filter.h"] = torch.randn(8, 1, 130)

    with pytest.raises(WeightsFormatError, match=r"2 missing: blocks.0.filter.D, blocks.4.filter.D"):
        load(rewrite(EVO2, tmp_path, long, setting(hcs_filter_length=130)))


def test_biases_default_as_in_vortex(tmp_path):
    def without(values):
        del values["hyena_out_proj_bias"], values["qkv_proj_bias"]

    with pytest.raises(WeightsFormatError, match=r"1 missing: blocks.3.inner_mha_cls.Wqkv.bias.*6 unexpected"):
        load(rewrite(EVO2, tmp_path, config=without))
