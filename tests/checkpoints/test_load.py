"""Loading gives the saved bits back, is strict about everything, and holds one model and one tensor in memory."""

import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

from crocuta.checkpoints import load as load_module
from crocuta.checkpoints import native
from crocuta.checkpoints.files import TensorFile, TensorInfo, open_tensors, write_tensors
from crocuta.checkpoints.format import Contents, Format
from crocuta.checkpoints.load import load
from crocuta.checkpoints.native import save
from crocuta.config import ModelConfig
from crocuta.errors import InputError, WeightsFormatError
from crocuta.model.build import build_model
from crocuta.model.lm import Model
from crocuta.model.precision import Float32Module
from crocuta.presets import PRESETS, preset

TINY = [name for name in PRESETS if name.startswith("tiny-")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", TINY)
def test_save_then_load_gives_the_same_bits(name, dtype, tmp_path):
    model = build_model(preset(name), dtype=dtype, seed=5).eval()
    save(model, None, tmp_path)
    loaded, tokenizer = load(tmp_path)
    assert tokenizer is None
    assert loaded.config == model.config
    assert not loaded.training
    for (key, mine), (other, theirs) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert (key, mine.dtype) == (other, theirs.dtype)
        assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))
    ids = torch.arange(12)[None] % model.config.vocab_size
    assert torch.equal(loaded(ids), model(ids))
    assert all(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_dtype_casts_all_but_what_stays_wide_by_type(dtype, tmp_path):
    model = build_model(preset("tiny-striped"), seed=5)
    save(model, None, tmp_path)
    loaded, _ = load(tmp_path, dtype=dtype)
    expected = build_model(preset("tiny-striped"), seed=5).to(dtype).state_dict()
    found = loaded.state_dict()
    assert {name: t.dtype for name, t in found.items()} == {name: t.dtype for name, t in expected.items()}
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    narrow = dtype.itemsize < 4
    assert {t.dtype for t in found.values()} == ({dtype, torch.float32} if narrow else {dtype})


# --- strictness ---


class Altered:
    """A format whose weights are those of ``config``, changed by ``change``; notes what is alive at each read."""

    def __init__(self, config: ModelConfig, change=lambda tensors: None, dtype: torch.dtype = torch.float32):
        self.config = config
        self.tensors: dict[str, Tensor] = dict(build_model(config, dtype=dtype, seed=1).state_dict())
        change(self.tensors)
        self.given: list[weakref.ref] = []
        self.alive: list[int] = []
        self.closed = False

    @property
    def infos(self) -> dict[str, TensorInfo]:
        return {name: TensorInfo(t.dtype, tuple(t.shape)) for name, t in self.tensors.items()}

    def read(self, name: str) -> Tensor:
        self.alive.append(sum(ref() is not None for ref in self.given))
        tensor = self.tensors[name].clone()
        self.given.append(weakref.ref(tensor))
        return tensor

    def close(self) -> None:
        self.closed = True

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        contents = Contents(self.config, self, None)
        format_ = Format("altered", "anything", lambda path: True, lambda path, options: contents)
        monkeypatch.setattr(load_module, "FORMATS", (*load_module.FORMATS, format_))


def refusal(monkeypatch: pytest.MonkeyPatch, path: Path, source: Altered, **options) -> str:
    source.install(monkeypatch)
    with pytest.raises(WeightsFormatError) as caught:
        load(path, **options)
    assert source.closed
    return str(caught.value)


def test_all_misfits_are_in_one_error(tmp_path, monkeypatch):
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["embedding.weight"], tensors["norm.scale"]
        tensors["head.weight"] = torch.ones(1)
        tensors["blocks.0.mlp.down.weight"] = tensors["blocks.0.mlp.down.weight"].t()
        tensors["blocks.0.mixer.skip"] = tensors["blocks.0.mixer.skip"].to(torch.int32)

    source = Altered(preset("tiny-modal"), change)
    shape = list(source.tensors["blocks.0.mlp.down.weight"].shape)
    text = refusal(monkeypatch, tmp_path, source)
    assert str(tmp_path) in text
    assert "2 missing: embedding.weight, norm.scale." in text
    assert "1 unexpected: head.weight." in text
    assert f"1 misshapen: blocks.0.mlp.down.weight has shape {shape}, expected {shape[::-1]}." in text
    assert "1 of the wrong dtype: blocks.0.mixer.skip is torch.int32, expected floating point" in text
    assert source.given == []  # refused before anything was read


def test_a_long_list_is_cut_at_twenty_and_counted(tmp_path, monkeypatch):
    source = Altered(preset("tiny-modal"))
    keys = sorted(source.tensors)
    source.tensors.clear()
    text = refusal(monkeypatch, tmp_path, source)
    assert f"{len(keys)} missing: {', '.join(keys[:20])}, and {len(keys) - 20} more" in text
    assert keys[20] not in text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(value, tmp_path, monkeypatch):
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["blocks.1.mlp.down.weight"][-1, -1] = value

    text = refusal(monkeypatch, tmp_path, Altered(preset("tiny-modal"), change))
    assert "blocks.1.mlp.down.weight" in text
    assert "NaN or infinite" in text


def test_weights_too_large_for_the_dtype_asked_for_are_named(tmp_path, monkeypatch):
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["embedding.weight"][0, 0] = 1e5

    text = refusal(monkeypatch, tmp_path, Altered(preset("tiny-modal"), change), dtype=torch.float16)
    assert "embedding.weight" in text
    assert "overflows: got torch.float16" in text


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_filters_stored_in_16_bits_are_refused(dtype, tmp_path, monkeypatch):
    filters = {
        f"{name}.{key}"
        for name, module in build_model(preset("tiny-modal"), device="meta").named_modules()
        if isinstance(module, Float32Module)
        for key in module.state_dict()
    }

    def change(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            tensors[name] = tensors[name].to(torch.bfloat16)

    text = refusal(monkeypatch, tmp_path, Altered(preset("tiny-modal"), change), dtype=dtype)
    assert f"{len(filters)} of the wrong dtype" in text
    assert f"{min(filters)} is torch.bfloat16, expected floating point of at least 32 bits" in text


def test_a_tensor_that_was_cast_is_let_go_before_the_next_is_read(tmp_path, monkeypatch):
    source = Altered(preset("tiny-modal"), dtype=torch.float64)
    source.install(monkeypatch)
    load(tmp_path, dtype=torch.float32)
    assert len(source.alive) == len(source.tensors)
    assert max(source.alive) <= 1


def test_a_tensor_that_needs_no_cast_is_not_copied(tmp_path, monkeypatch):
    source = Altered(preset("tiny-modal"))
    source.read = source.tensors.__getitem__
    source.install(monkeypatch)
    model, _ = load(tmp_path)
    for name, tensor in model.state_dict().items():
        assert tensor.data_ptr() == source.tensors[name].data_ptr()


def test_a_new_format_is_one_entry_of_the_table(tmp_path, monkeypatch):
    source = Altered(preset("tiny-evo2"))
    source.install(monkeypatch)
    model, _ = load(tmp_path)
    assert isinstance(model, Model)
    assert source.closed
    assert all(torch.equal(t, source.tensors[name]) for name, t in model.state_dict().items())


# --- what cannot be loaded ---


def test_a_missing_path_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match=f"no such file or folder: got {tmp_path}/nothing"):
        load(tmp_path / "nothing")


def test_an_unknown_folder_says_what_was_looked_for(tmp_path):
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(WeightsFormatError, match=r'crocuta: "format": "crocuta" in config.json'):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "evo"}')
    with pytest.raises(WeightsFormatError, match="no known checkpoint"):
        load(tmp_path)


def test_a_single_file_says_to_give_the_folder(tmp_path):
    write_tensors(tmp_path / "model.safetensors", {"x": torch.ones(1)})
    with pytest.raises(WeightsFormatError, match="give the folder"):
        load(tmp_path / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.float8_e4m3fn])
def test_a_dtype_that_is_none_for_weights_is_an_input_error(dtype, tmp_path):
    with pytest.raises(InputError, match=str(dtype)):
        load(tmp_path, dtype=dtype)


def test_the_file_is_closed_however_loading_ends(tmp_path, monkeypatch):
    opened = []

    def open_and_note(path: Path) -> TensorFile:
        opened.append(open_tensors(path))
        return opened[-1]

    monkeypatch.setattr(native, "open_tensors", open_and_note)
    save(build_model(preset("tiny-modal")), None, tmp_path)
    load(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(WeightsFormatError, match=r"manifest.json is damaged.*remove manifest.json if you changed"):
        load(tmp_path)
    assert len(opened) == 2
    for file in opened:
        with pytest.raises(ValueError, match="closed"):
            file.read("embedding.weight")


# --- arguments ---


@pytest.mark.parametrize("path", [None, b"x", "a\0b", "x" * 5000, 7])
def test_what_is_no_path_is_an_input_error(path):
    with pytest.raises(InputError, match=r"no path and no name|no such file"):
        load(path)


@pytest.mark.parametrize("device", ["nonsense", "meta", "cuda:99", 1.5])
def test_a_device_that_is_not_there_is_an_input_error(device, tmp_path):
    save(build_model(preset("tiny-modal")), None, tmp_path)
    with pytest.raises(InputError, match="cannot load to this device"):
        load(tmp_path, device=device)


def test_a_name_that_is_nearly_one_is_suggested():
    with pytest.raises(InputError, match="did you mean 'evo2_7b_base'"):
        load("evo2_7b_bas")


def test_a_path_has_no_revisions(tmp_path):
    save(build_model(preset("tiny-modal")), None, tmp_path)
    with pytest.raises(InputError, match="has no revisions"):
        load(tmp_path, revision="main")
