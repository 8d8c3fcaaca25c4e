"""An adapter's file makes a plain model the adapted one again, to the bit; any other file changes nothing."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from bits import same_bits
from failing_disk import Crash, FailingDisk
from tiny_models import random_ids, tiny_config, tiny_model
from torch import nn

from crocuta.checkpoints import commit, native
from crocuta.checkpoints.adapters import load_adapter, save_adapter
from crocuta.checkpoints.files import open_tensors, read_tensors, write_tensors
from crocuta.errors import CheckpointError, InputError, NonFiniteError, WeightsFormatError
from crocuta.model.build import build_model
from crocuta.model.lm import Model
from crocuta.model.lora import LoRAConfig, add_lora, lora_layers, merge_lora, remove_lora

CONFIG = LoRAConfig(rank=2, alpha=3.0, targets=("projections", "mlp"))
IDS = random_ids(2, 30, seed=5)


@torch.no_grad()
def adapted(kind: str = "attention", dtype: torch.dtype = torch.float32, config: LoRAConfig | None = None) -> Model:
    """Loud, adapted, and with values in B."""
    model = tiny_model(kind, dtype, seed=1)
    add_lora(model, config or LoRAConfig(rank=2, alpha=3.0), seed=2)
    for layer in lora_layers(model).values():
        b = layer.low_rank.b
        b.copy_(0.3 * torch.randn(b.shape, generator=torch.Generator().manual_seed(b.numel())))
    return model


def snapshot(model: nn.Module) -> tuple[object, ...]:
    """Everything that a failed load might have changed."""
    modules = [(name, type(m)) for name, m in model.named_modules()]
    return modules, [(name, p.requires_grad, p.sum().item(), p.dtype) for name, p in model.named_parameters()]


# --- round trips ---


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["stripe", "attention-gqa", "implicit"])
def test_a_loaded_adapter_is_the_saved_one(kind, dtype, tmp_path):
    model, config = adapted(kind, dtype), LoRAConfig(rank=2, alpha=3.0)
    save_adapter(model, tmp_path / "a.safetensors")
    other = tiny_model(kind, dtype, seed=1)
    assert load_adapter(other, tmp_path / "a.safetensors") == config
    assert torch.equal(other(IDS), model(IDS))
    mine, theirs = model.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(same_bits(theirs[name], mine[name]) for name in mine)
    requires = [{name for name, p in m.named_parameters() if p.requires_grad} for m in (model, other)]
    assert requires[0] == requires[1]


@torch.no_grad()
def test_what_else_was_trained_is_in_the_file(tmp_path):
    model = adapted()
    extra = [model.head.weight, model.blocks[0].pre_norm.scale]
    for parameter in extra:
        parameter.requires_grad_().mul_(1.25)
    expected = model(IDS)
    save_adapter(model, tmp_path / "a")
    names = {name for name in read_tensors(tmp_path / "a") if name.startswith("trained.")}
    assert names == {"trained.head.weight", "trained.blocks.0.pre_norm.scale"}
    other = tiny_model("attention", seed=1)
    load_adapter(other, tmp_path / "a")
    assert torch.equal(other(IDS), expected)
    assert other.head.weight.requires_grad
    assert not other.embedding.weight.requires_grad


@torch.no_grad()
def test_a_bias_inside_an_adapted_layer_keeps_its_plain_name(tmp_path):
    model = adapted("attention-gqa")
    lora_layers(model)["blocks.1.mixer.qkv"].plain.bias.requires_grad_().add_(1)
    save_adapter(model, tmp_path / "a")
    assert "trained.blocks.1.mixer.qkv.bias" in read_tensors(tmp_path / "a")
    other = tiny_model("attention-gqa", seed=1)
    load_adapter(other, tmp_path / "a")
    assert torch.equal(other(IDS), model(IDS))


@torch.no_grad()
def test_loaded_adapters_merge_and_go(tmp_path):
    model = adapted()
    expected = model(IDS)
    save_adapter(model, tmp_path / "a")
    other = tiny_model("attention", seed=1)
    load_adapter(other, tmp_path / "a")
    merge_lora(other)
    assert torch.equal(other(IDS), expected)
    again = tiny_model("attention", seed=1)
    plain = again(IDS)
    load_adapter(again, tmp_path / "a")
    remove_lora(again)
    assert torch.equal(again(IDS), plain)


def test_the_file_is_small_and_says_what_it_is(tmp_path):
    save_adapter(adapted("stripe", config=CONFIG), tmp_path / "a")
    with open_tensors(tmp_path / "a") as file:
        head = file.metadata
        assert set(head) == {"format", "version", "lora", "model"}
        assert (head["format"], head["version"]) == ("crocuta-adapter", "1")
        assert json.loads(head["lora"]) == {"rank": 2, "alpha": 3.0, "targets": ["projections", "mlp"]}
        assert json.loads(head["model"]) == json.loads(json.dumps(tiny_config("stripe").to_json()))
        layers = [f"blocks.{i}.mixer.{own}" for i in (0, 2, 3, 4) for own in ("projection", "output")]
        layers += [f"blocks.{i}.mlp.{own}" for i in range(5) for own in ("up", "down")]
        assert set(file.infos) == {f"lora.{layer}.{part}" for layer in layers for part in "ab"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_an_adapter_of_one_precision_serves_another(dtype, tmp_path):
    saved = adapted("stripe", torch.float32)
    save_adapter(saved, tmp_path / "a")
    other = tiny_model("stripe", dtype, seed=1)
    load_adapter(other, tmp_path / "a")
    layers = lora_layers(saved)
    for name, layer in lora_layers(other).items():
        assert layer.weight.dtype == dtype
        for part in ("a", "b"):
            found, expected = (getattr(of.low_rank, part) for of in (layer, layers[name]))
            assert found.dtype == torch.promote_types(dtype, torch.float32)
            assert torch.equal(found.float(), expected)


# --- writing ---


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    old, new = adapted(), adapted()
    with torch.no_grad():
        lora_layers(new)["blocks.0.mixer.qkv"].low_rank.b.add_(1)
    save_adapter(old, tmp_path / "old")
    save_adapter(new, tmp_path / "new")
    texts = [(tmp_path / name).read_bytes() for name in ("old", "new")]
    counter = FailingDisk()
    monkeypatch.setattr(commit, "disk", counter)
    save_adapter(new, tmp_path / "counted")
    for number in range(len(counter.operations)):
        target = tmp_path / f"{number}"
        target.write_bytes(texts[0])
        monkeypatch.setattr(commit, "disk", FailingDisk(number, "crash within"))
        with pytest.raises(Crash):
            save_adapter(new, target)
        assert target.read_bytes() in texts
    monkeypatch.setattr(commit, "disk", FailingDisk(1, "no space"))
    with pytest.raises(CheckpointError, match="cannot write"):
        save_adapter(new, tmp_path / "old")
    assert (tmp_path / "old").read_bytes() == texts[0]


def mixed() -> Model:
    """Two halves adapted in two ways."""
    model = tiny_model("attention")
    add_lora(model.blocks[0], CONFIG)
    add_lora(model.blocks[1], LoRAConfig(rank=1, alpha=1.0))
    return model


def half() -> Model:
    model = tiny_model("attention")
    add_lora(model.blocks[1], LoRAConfig(rank=1, alpha=1.0))
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny_model("attention"), "no adapters to save: got Model"),
        (mixed, "come from one add_lora of the whole model: got 2 configurations"),
        (half, "come from one add_lora of the whole model: got 1 configurations, 5 layers without adapter"),
        (lambda: adapted().blocks[0], "belongs to a whole model: got Block without a configuration"),
    ],
    ids=["plain", "mixed", "half", "block"],
)
def test_what_cannot_be_saved(make, message, tmp_path):
    with pytest.raises(InputError, match=message):
        save_adapter(make(), tmp_path / "a")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_not_saved(value, tmp_path):
    model = adapted()
    with torch.no_grad():
        lora_layers(model)["blocks.0.mixer.qkv"].low_rank.b[0, 0] = value
    with pytest.raises(NonFiniteError, match=r"lora.blocks.0.mixer.qkv.b has NaN or infinite values"):
        save_adapter(model, tmp_path / "a")
    assert os.listdir(tmp_path) == []


# --- bad files ---


def file_of(path: Path, *, drop: str = "", head: dict[str, str] | None = None, **changed: torch.Tensor) -> Path:
    """A good adapter of the attention model, spoilt: tensors by names with __ for the dots."""
    save_adapter(adapted(), path)
    with open_tensors(path) as file:
        metadata, tensors = file.metadata | (head or {}), {name: file.read(name) for name in file.infos}
    tensors |= {name.replace("__", "."): tensor for name, tensor in changed.items()}
    tensors.pop(drop, None)
    write_tensors(path, tensors, {name: text for name, text in metadata.items() if text})
    return path


def lora_text(**fields: object) -> str:
    return json.dumps({"rank": 2, "alpha": 3.0, "targets": ["projections", "attention", "mlp"]} | fields)


def model_text(**fields: object) -> str:
    return json.dumps(dataclasses.replace(tiny_config("attention"), **fields).to_json())


QKV = "lora__blocks__0__mixer__qkv__a"
NAN = torch.full((2, 8), float("nan"))
BAD = {
    "no format": ({"head": {"format": ""}}, "is not an adapter: got format None"),
    "other format": ({"head": {"format": "pt"}}, "is not an adapter: got format 'pt'"),
    "later version": ({"head": {"version": "2"}}, "is not an adapter: got format 'crocuta-adapter', version '2'"),
    "no lora": ({"head": {"lora": ""}}, "is not an adapter"),
    "no model": ({"head": {"model": ""}}, "is not an adapter"),
    "lora no json": ({"head": {"lora": "{"}}, "describes no adapter"),
    "lora a list": ({"head": {"lora": "[]"}}, "describes no adapter"),
    "lora unknown field": ({"head": {"lora": lora_text(ranks=2)}}, "describes no adapter.*'ranks'"),
    "lora impossible": ({"head": {"lora": lora_text(rank=0)}}, "describes no adapter.*rank"),
    "lora too large": ({"head": {"lora": lora_text(rank=100)}}, "does not fit"),
    "lora fewer": ({"head": {"lora": lora_text(targets=["mlp"])}}, "holds lora.*, which the model has not"),
    "lora nothing": ({"head": {"lora": lora_text(targets=["projections"])}}, "which the model has not"),
    "model no json": ({"head": {"model": "nothing"}}, "belongs to another model"),
    "model of another kind": (
        {"head": {"model": '{"width": 3}'}},
        "another model.*expected an adapter of a ModelConfig",
    ),
    "model wider": ({"head": {"model": model_text(vocab_size=20)}}, "belongs to another model: got another vocab_size"),
    "model tied": ({"head": {"model": model_text(tie_embeddings=True)}}, "got another tie_embeddings"),
    "lacks one": ({"drop": "lora.blocks.1.mixer.output.b"}, "lacks lora.blocks.1.mixer.output.b"),
    "one too many": ({"lora__blocks__7__mixer__qkv__a": torch.zeros(2, 8)}, "holds lora.blocks.7.mixer.qkv.a"),
    "trained unknown": ({"trained__tail__weight": torch.zeros(2)}, "holds trained.tail.weight, which the model has"),
    "trained shape": ({"trained__head__weight": torch.zeros(2)}, r"trained.head.weight does not fit: got \[2\]"),
    "shape": ({QKV: torch.zeros(3, 8)}, r"lora.blocks.0.mixer.qkv.a does not fit: got \[3, 8\].*expected \[2, 8\]"),
    "dtype": ({QKV: torch.zeros(2, 8, dtype=torch.int32)}, r"does not fit: got \[2, 8\] torch.int32"),
    "not finite": ({QKV: NAN}, "lora.blocks.0.mixer.qkv.a has NaN or infinite values"),
}


@pytest.mark.parametrize(("spoil", "message"), BAD.values(), ids=BAD)
def test_a_bad_file_is_one_clear_error_and_changes_nothing(spoil, message, tmp_path):
    model = tiny_model("attention", seed=1)
    before = snapshot(model)
    with pytest.raises(WeightsFormatError, match=message) as caught:
        load_adapter(model, file_of(tmp_path / "a", **spoil))
    assert str(tmp_path / "a") in str(caught.value)
    assert snapshot(model) == before


def test_the_untouched_file_of_these_cases_is_good(tmp_path):
    load_adapter(tiny_model("attention", seed=1), file_of(tmp_path / "a"))


def test_a_file_that_is_missing_cut_or_something_else(tmp_path):
    model = tiny_model("attention", seed=1)
    before = snapshot(model)
    save_adapter(adapted(), tmp_path / "whole")
    data = (tmp_path / "whole").read_bytes()
    (tmp_path / "cut").write_bytes(data[:-5])
    (tmp_path / "text").write_text("this is no adapter at all")
    for name in ("missing", "cut", "text"):
        with pytest.raises(WeightsFormatError, match=str(tmp_path / name)):
            load_adapter(model, tmp_path / name)
    assert snapshot(model) == before


def test_another_model_is_refused_and_one_with_adapters(tmp_path):
    save_adapter(adapted(), tmp_path / "a")
    with pytest.raises(WeightsFormatError, match="belongs to another model: got another blocks"):
        load_adapter(tiny_model("implicit"), tmp_path / "a")
    with pytest.raises(InputError, match="has adapters already"):
        load_adapter(adapted(), tmp_path / "a")
    with pytest.raises(InputError, match="belongs to a whole model"):
        load_adapter(tiny_model("attention").blocks[0], tmp_path / "a")


def test_a_projection_in_fp8_is_refused_by_the_file_too(tmp_path):
    """The configuration alone decides, so a file cannot have been made for it; a forged one is refused."""
    config = tiny_config("complex-stable")
    blocks = [dataclasses.replace(b, mixer=dataclasses.replace(b.mixer, fp8_projection=True)) for b in config.blocks]
    config = dataclasses.replace(config, blocks=tuple(blocks))
    save_adapter(adapted("complex-stable"), tmp_path / "a")
    head = {"format": "crocuta-adapter", "version": "1", "lora": lora_text(), "model": json.dumps(config.to_json())}
    write_tensors(tmp_path / "a", read_tensors(tmp_path / "a"), head)
    model = build_model(config)
    before = snapshot(model)
    with pytest.raises(WeightsFormatError, match=r"does not fit the model.*cannot adapt"):
        load_adapter(model, tmp_path / "a")
    assert snapshot(model) == before


def test_a_model_with_adapters_is_not_saved_as_a_model(tmp_path):
    model = tiny_model("stripe", seed=1)
    add_lora(model, LoRAConfig(rank=2, alpha=2.0))
    with pytest.raises(InputError, match=r"has adapters.*merge_lora"):
        native.save(model, None, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    merge_lora(model)
    native.save(model, None, tmp_path / "model")
