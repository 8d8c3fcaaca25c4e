"""What reading decides by the content of a published file: padding, scales, frequencies, positional features."""

import functools
import io
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import published_configs as configs
import published_keys as keys
import pytest
import torch
from published_cases import CASES, Listed, mapped, ours, with_units
from published_keys import BYTES, Keys
from torch import Tensor

from crocuta.checkpoints.families import evo2, evo2_layout, hyenadna, stripedhyena
from crocuta.checkpoints.files import TensorInfo
from crocuta.checkpoints.format import Contents, ReadOptions
from crocuta.checkpoints.settings import Settings
from crocuta.config import HyenaConfig, ImplicitFilterConfig, ModelConfig
from crocuta.errors import WeightsFormatError

SH1 = [name for name, case in CASES.items() if case.family in ("stripedhyena", "evo1")]
EVO2 = list(configs.EVO2)
SHORT = ["hyenadna-tiny-1k", "hyenadna-tiny-1k-d256", "hyenadna-tiny-16k-d128", "hyenadna-small-32k"]
USED = {"evo2-7b-1m": 11008, "evo2-20b-1m": 21888, "evo2-40b-1m": 21888}
"""MLP units that are not zero, in files that have some that are."""


class Given(Listed):
    """A source whose values a function makes."""

    def __init__(self, stored: Keys, values: Callable[[str, slice | None], Tensor]):
        super().__init__({n: TensorInfo(s.dtype, s.shape) for n, s in stored.items() if s.dtype != BYTES})
        self._values = values

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        return self._values(name, rows)


def check(contents: Contents, name: str) -> None:
    assert contents.key_map is not None
    contents.key_map.check(name, contents.tensors.infos, ours(contents.config)[0])


# --- StripedHyena-7B, Evo 1 ---


@pytest.mark.parametrize("name", SH1)
def test_the_prefix_of_a_file_is_found(name: str) -> None:
    case = CASES[name]
    settings = Settings(name, case.settings)
    contents = stripedhyena.contents_of(settings, case.expected, Listed(case.found()), None)
    assert contents.key_map == mapped(name)
    check(contents, name)


HUB_FOLDER = "models--togethercomputer--evo-1-131k-base/snapshots/c206aab77ae5967a069c4200ecb1858588528c9d"


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("weights", {"max_seqlen": 131072}),
        ("weights", {"max_sequence_len": 131072}),
        ("weights", {"_name_or_path": "togethercomputer/evo-1-131k-base"}),
        ("evo-1-131k-base", {}),
        (HUB_FOLDER, {}),
    ],
)
def test_evo1_131k_is_known_by_each_of_its_marks_alone(path: str, told: dict[str, Any], tmp_path: Path) -> None:
    marks = ("max_seqlen", "max_sequence_len", "_name_or_path")
    silent = {key: value for key, value in configs.EVO1_131K_HF.items() if key not in marks}
    assert stripedhyena._published_scale(tmp_path / path, Settings("config.json", silent | told)) == 16.0
    assert stripedhyena._published_scale(tmp_path / "weights", Settings("config.json", silent)) is None


# --- Evo 2 ---


@functools.cache
def pickled_scales(layer: int) -> bytes:
    """What Transformer Engine left of one projection: input, weight and an unused third."""
    scales = torch.tensor([2.0 + layer, 4.0 + layer, 1.0])
    state = {
        "scale_fwd": scales,
        "scale_inv_fwd": 1 / scales,
        "amax_history_fwd": torch.ones(16, 3),
        "extra_fp8_variables": {"fp8_checkpoint": True, "num_gemms": 1, "fp8_max_fwd": 448.0, "fp8_max_bwd": 57344.0},
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def read_evo2(name: str, options: ReadOptions) -> Contents:
    case, used = CASES[name], USED.get(name, 1 << 30)

    def values(key: str, rows: slice | None) -> Tensor:
        assert rows is not None, key  # only ever parts of the gates
        return (torch.arange(rows.start, rows.stop) < used).float()[:, None]

    extras: Mapping[str, bytes] = {
        key: pickled_scales(int(key.split(".")[1])) for key, stored in case.stored.items() if stored.dtype == BYTES
    }
    settings = Settings(name, case.settings)
    config, layout = evo2_layout.model_config(settings), evo2_layout.layout_of(settings)
    return evo2.contents_of(Path(name), config, layout, Given(case.stored, values), extras, options)


@pytest.mark.parametrize("name", EVO2)
def test_zero_units_are_cut_away(name: str) -> None:
    contents, case = read_evo2(name, ReadOptions()), CASES[name]
    assert contents.config == with_units(case.expected, USED.get(name, case.settings["inner_mlp_size"]))
    check(contents, name)


@pytest.mark.parametrize("name", EVO2)
def test_zero_units_may_be_kept(name: str) -> None:
    contents = read_evo2(name, ReadOptions(keep_padding=True))
    assert contents.config == CASES[name].expected
    assert contents.key_map == mapped(name)
    check(contents, name)


@pytest.mark.parametrize("name", EVO2)
def test_the_scales_are_those_of_input_and_weight(name: str) -> None:
    contents, case = read_evo2(name, ReadOptions(keep_padding=True)), CASES[name]
    hyena = [i for i, block in enumerate(case.expected.blocks) if isinstance(block.mixer, HyenaConfig)]
    assert len(hyena) == case.settings["num_layers"] - len(case.settings["attn_layer_idxs"])
    for layer in hyena:
        assert contents.tensors.read(f"blocks.{layer}.projections.input_scale") == 2 + layer
        assert contents.tensors.read(f"blocks.{layer}.projections.weight_scale") == 4 + layer


@pytest.mark.parametrize("name", EVO2)
def test_without_fp8_no_scale_is_wanted_and_the_model_is_marked(name: str) -> None:
    contents, case = read_evo2(name, ReadOptions(fp8="off", keep_padding=True)), CASES[name]
    mixers = [block.mixer for block in contents.config.blocks if isinstance(block.mixer, HyenaConfig)]
    assert not any(mixer.fp8_projection for mixer in mixers)
    assert "FP8" in contents.config.unverified
    assert contents.key_map is not None
    assert {entry.theirs for entry in contents.key_map.entries} == {
        key for key, stored in case.stored.items() if stored.kind == "weight"
    }
    check(contents, name)


def test_frequencies_that_a_file_lacks_are_computed() -> None:
    case = CASES["evo2-7b-8k"]
    stored = {key: s for key, s in case.stored.items() if not key.endswith("inv_freq")}
    settings = Settings(case.name, case.settings)
    config, layout = evo2_layout.model_config(settings), evo2_layout.layout_of(settings)
    options = ReadOptions(fp8="off", keep_padding=True)
    contents = evo2.contents_of(Path(case.name), config, layout, Given(stored, refuse), {}, options)
    check(contents, case.name)


def refuse(name: str, rows: slice | None) -> Tensor:
    raise AssertionError(f"{name} was read")


# --- HyenaDNA ---


def published_features(length: int) -> Tensor:
    """[1 l 5]: the time, and the real and imaginary parts of exp(-i f w) in two bands."""
    w = 2 * math.pi * torch.linspace(0, length - 1, length)[:, None] / length
    waves = torch.exp(-1j * torch.linspace(1e-4, 1, 2)[None] * w)
    return torch.cat([torch.linspace(0, 1, length)[:, None], waves.real, waves.imag], -1)[None]


def published_rates(width: int) -> Tensor:
    return torch.linspace(math.log(1e-2) / 1.5, math.log(1e-2) / 0.3, width)[None, None]


def read_hyenadna(name: str, layout: str, changed: dict[str, Callable[[Tensor], Tensor]]) -> Contents:
    width, layers, length = configs.HYENADNA_SIZES[name]

    def values(key: str, rows: slice | None) -> Tensor:
        if key.endswith("pos_emb.t"):
            return torch.linspace(0, 1, length)[None, :, None]
        tensor = published_features(length) if key.endswith("pos_emb.z") else published_rates(width)
        change = next((change for end, change in changed.items() if key.endswith(end)), None)
        return tensor if change is None else change(tensor)

    if layout == "hf":
        config = hyenadna.port_config(Settings(name, configs.HYENADNA_HF[name]))
        return hyenadna.contents_of(config, "hyena.", Given(keys.hyenadna_hf(width, layers, length), values), "sep")
    config = hyenadna.original_config(Settings(name, configs.HYENADNA[name]))
    stored = keys.hyenadna(width, layers, length, checkpointed=layout == "checkpointed")
    return hyenadna.contents_of(config, "model.", Given(stored, values), "sep")


def trained(config: ModelConfig) -> list[bool]:
    filters = [block.mixer.filter for block in config.blocks if isinstance(block.mixer, HyenaConfig)]
    return [filter_.positions.trained for filter_ in filters if isinstance(filter_, ImplicitFilterConfig)]


@pytest.mark.parametrize("layout", ["ckpt", "checkpointed", "hf"])
@pytest.mark.parametrize("name", SHORT)
def test_features_of_the_published_formula_are_computed(name: str, layout: str) -> None:
    contents = read_hyenadna(name, layout, {})
    assert contents.config == CASES[f"{name}-{'hf' if layout == 'hf' else 'ckpt'}"].expected
    check(contents, name)


@pytest.mark.parametrize("layout", ["ckpt", "checkpointed", "hf"])
def test_features_of_another_value_are_those_of_the_file(layout: str) -> None:
    def nudge(features: Tensor) -> Tensor:
        features[0, 700, 3] += 1e-6
        return features

    contents = read_hyenadna(
        "hyenadna-small-32k",
        layout,
        {"layers.2.mixer.filter_fn.pos_emb.z": nudge, "layers.2.mixer.layer.filter_fn.pos_emb.z": nudge},
    )
    assert trained(contents.config) == [False, False, True, False]
    check(contents, layout)


@pytest.mark.parametrize("layout", ["ckpt", "hf"])
def test_another_window_is_refused(layout: str) -> None:
    with pytest.raises(WeightsFormatError, match=r"layers\.1\.mixer\.filter_fn\.modulation\.deltas holds other rates"):
        read_hyenadna("hyenadna-tiny-1k", layout, {"layers.1.mixer.filter_fn.modulation.deltas": lambda t: t * 1.01})


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kept", [1, 3, 5])
def test_the_shared_frequency_may_stand_under_any_of_its_names(kept: int, checkpointed: bool) -> None:
    name = "hyenadna-tiny-1k"
    file = keys.hyenadna(*configs.HYENADNA_SIZES[name], checkpointed=checkpointed)
    stored = {n: s for n, s in file.items() if not n.endswith(".freq") or n.endswith(f".{kept}.freq")}
    asked: list[str] = []

    def values(key: str, rows: slice | None) -> Tensor:
        asked.append(key)
        return torch.ones(1, 64)

    plain = hyenadna._Plain(Given(stored, values))
    mapped(f"{name}-ckpt").check(name, plain.infos, ours(CASES[f"{name}-ckpt"].expected)[0])
    plain.read("model.backbone.layers.0.mixer.filter_fn.implicit_filter.1.freq")
    infix = ".layer" if checkpointed else ""
    assert asked == [f"model.backbone.layers.0.mixer{infix}.filter_fn.implicit_filter.{kept}.freq"]
    assert asked[0] in stored
