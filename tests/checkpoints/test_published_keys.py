"""The key maps cover every published file: each tensor of ours has its place there, and nothing there is left over.

``published_configs`` and ``published_keys`` hold what was published, written down independently of the key maps.
Models are built on the meta device, so that no weights exist.
"""

from collections import Counter

import published_configs as configs
import published_keys as keys
import pytest
import torch
from published_cases import CASES, Case, every_case, mapped, ours, with_units
from published_keys import BF16, F32, Stored
from torch import Tensor

from crocuta.checkpoints.families import evo2_layout, stripedhyena
from crocuta.checkpoints.files import TensorInfo
from crocuta.checkpoints.keymap import Entry, Padded
from crocuta.checkpoints.settings import Settings
from crocuta.errors import CrocutaWarning
from crocuta.presets import preset

SMALL = 1 << 16
"""Elements of a tensor that is small enough to be made."""

# --- what was published adds up ---


def test_the_evo2_files_have_the_published_numbers_of_tensors_and_bytes() -> None:
    def tally(name: str) -> tuple[int, int, int]:
        stored = CASES[name].stored.values()
        tensors = [s for s in stored if s.dtype != keys.BYTES]
        return len(tensors), len(stored) - len(tensors), sum(s.numbers * s.dtype.itemsize for s in tensors)

    assert tally("evo2-40b-1m") == (537, 258, 82_252_533_760)
    assert Counter(s.dtype for s in CASES["evo2-40b-1m"].stored.values())[BF16] == 400
    assert tally("evo2-20b-1m")[:2] == (261, 123)
    assert round(tally("evo2-20b-1m")[2] / 1e9, 1) == 47.9
    assert tally("evo2-1b-8k")[1] == 25


def test_the_evo1_file_has_the_published_numbers_of_tensors_and_bytes() -> None:
    stored = CASES["evo1-131k-hf"].stored.values()
    assert len(stored) == 438
    assert sum(s.numbers * s.dtype.itemsize for s in stored) == 12_913_164_672


# --- configurations ---


@every_case
def test_a_published_configuration_is_the_preset(name: str) -> None:
    case = CASES[name]
    assert case.read(Settings(name, case.settings)) == case.expected


def test_the_wrong_configuration_of_evo1_131k_is_put_right(tmp_path) -> None:
    settings = Settings(tmp_path / "config.json", configs.EVO1_131K_HF_WRONG)
    with pytest.warns(CrocutaWarning, match="rotary_emb_scaling_factor"):
        scale = stripedhyena._published_scale(tmp_path, settings)
    assert stripedhyena.model_config(settings, rope_base=10_000.0, rope_scale=scale) == preset("evo1-131k")


def test_the_right_configurations_of_evo1_give_no_warning(tmp_path) -> None:
    for published in (configs.EVO1_8K_HF, configs.EVO1_131K_HF):  # a warning of ours is an error in these tests
        scale = stripedhyena._published_scale(tmp_path, Settings(tmp_path / "config.json", published))
        assert scale == (16.0 if published["max_seqlen"] == 131_072 else None)


# --- coverage ---


@every_case
def test_the_published_file_passes_the_check(name: str) -> None:
    case = CASES[name]
    mapped(name).check(name, case.found(), ours(case.expected)[0])


@every_case
def test_the_published_file_passes_without_what_it_may_lack(name: str) -> None:
    case = CASES[name]
    kept = {n: info for n, info in case.found().items() if n not in case.stored or case.stored[n].kind == "weight"}
    mapped(name).check(name, kept, ours(case.expected)[0])


@every_case
def test_every_tensor_of_ours_is_in_the_file_once(name: str) -> None:
    entries = mapped(name).entries
    assert Counter(entry.ours for entry in entries) == Counter(ours(CASES[name].expected)[0].keys())
    assert max(Counter(entry.theirs for entry in entries).values()) == 1


@every_case
def test_every_tensor_of_the_file_is_a_weight_a_copy_or_junk(name: str) -> None:
    case, key_map = CASES[name], mapped(name)
    entries = {entry.theirs for entry in key_map.entries}
    for key, stored in case.stored.items():
        kinds = {"weight": key in entries, "copy": key in key_map.copies, "junk": key_map.is_junk(key)}
        assert [kind for kind, holds in kinds.items() if holds] == [stored.kind], key
    assert entries - case.stored.keys() == case.scales().keys()
    for copy, original in key_map.copies.items():
        assert original in entries, copy


@every_case
def test_the_parameters_are_those_of_the_file(name: str) -> None:
    case = CASES[name]
    kept = (s.numbers for n, s in case.stored.items() if s.kind == "weight" and not n.endswith("inv_freq"))
    assert ours(case.expected)[1] == sum(kept)


CORE = (436_096, 1_641_088, 436_096, 3_277_568, 6_550_528, 6_550_528, 6_550_528)
WITH_FEATURES = (448_404, 1_655_444, 602_004, 3_937_064, 12_954_704, 24_554_704, 46_554_704)


@pytest.mark.parametrize(("name", "core", "all_of_port"), list(zip(configs.HYENADNA, CORE, WITH_FEATURES, strict=True)))
def test_hyenadna_has_the_published_number_of_parameters(name: str, core: int, all_of_port: int) -> None:
    assert ours(CASES[f"{name}-ckpt"].expected)[1] == core
    assert ours(CASES[f"{name}-hf-trained"].expected)[1] == all_of_port


# --- layouts ---


@every_case
def test_every_entry_turns_their_shape_into_ours_and_back(name: str) -> None:
    case, key_map = CASES[name], mapped(name)
    wanted, found = ours(case.expected)[0], case.found()
    for entry in key_map.entries:
        theirs = torch.empty(found[entry.theirs].shape, device="meta")
        assert entry.load(theirs).shape == wanted[entry.ours].shape, entry
        assert entry.store(entry.load(theirs)).shape == theirs.shape, entry


@every_case
def test_storing_what_was_loaded_gives_the_same_bits(name: str) -> None:
    """With random values, in the published shape where it is small, else with two columns."""
    case, generator = CASES[name], torch.Generator().manual_seed(len(name))
    found, seen = case.found(), set()
    for entry in mapped(name).entries:
        dtype, shape = found[entry.theirs].dtype, found[entry.theirs].shape
        if Stored(shape, dtype).numbers > SMALL:
            shape = (shape[0], *(min(size, 2) for size in shape[1:]))
        if (entry.layouts, shape) in seen:
            continue
        seen.add((entry.layouts, shape))
        values = torch.randn(shape, generator=generator).to(dtype)
        again = entry.store(entry.load(values))
        assert same_bits(again, values), entry


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def places(entry: Entry, shape: tuple[int, ...]) -> list[int]:
    """For each number of ours, in order, its place in theirs."""
    count = Stored(shape, F32).numbers
    return entry.load(torch.arange(count).reshape(shape)).flatten().tolist()


def expected_rows(suffix: str, case: Case) -> list[int]:
    """Row of theirs for each row of ours: x2 | x1 | v, or q | k | v."""
    config, d = case.settings, case.expected.hidden_size
    if suffix == "Wqkv.weight":
        if case.family == "evo2":
            return per_head(d, config["num_attention_heads"])
        size = d // config["num_attention_heads"]
        return list(range(d + 2 * (d // config["proj_groups"] // size) * size))
    if case.family == "hyenadna":
        return list(range(3 * d))
    if case.family == "evo2":
        return [3 * channel + part for part in range(3) for channel in range(d)]
    return per_head(d, config["num_attention_heads"])


def per_head(d: int, heads: int) -> list[int]:
    size = d // heads
    return [head * 3 * size + part * size + i for part in range(3) for head in range(heads) for i in range(size)]


@every_case
def test_rows_and_taps_are_where_the_published_code_has_them(name: str) -> None:
    """In each kind of layer: the rows of projections, the last tap of the current token for what is correlated."""
    case = CASES[name]
    checked: set[tuple[str, int]] = set()
    found = case.found()
    for entry in mapped(name).entries:
        shape = found[entry.theirs].shape
        suffix = ".".join(entry.theirs.split(".")[-2:])
        kind = (suffix, shape[-1] if suffix == "filter.h" else 0)
        if kind in checked:
            continue
        if suffix in ("Wqkv.weight", "projections.weight", "in_proj.weight"):
            assert places(entry, (shape[0], 1)) == expected_rows(suffix, case)
        elif suffix in ("filter.short_filter_weight", "short_filter.weight"):
            rows = expected_rows(suffix, case)
            assert places(entry, shape) == [3 * row + tap for row in rows for tap in (2, 1, 0)]
        elif suffix in ("filter.short_filter_bias", "projections.bias", "in_proj.bias", "short_filter.bias"):
            assert places(entry, shape) == expected_rows(suffix, case)
        elif suffix == "filter.h":
            taps = range(shape[-1]) if shape[-1] == 128 else reversed(range(shape[-1]))
            order = list(taps)
            assert places(entry, shape) == [row * shape[-1] + tap for row in range(shape[0]) for tap in order]
        else:
            assert all(type(layout).__name__ == "Squeeze" for layout in entry.layouts), entry
        checked.add(kind)
    assert len(checked) > 10


@pytest.mark.parametrize(("name", "used"), [("evo2-7b-1m", 11008), ("evo2-20b-1m", 21888), ("evo2-40b-1m", 21888)])
def test_widened_mlps_may_be_cut_back(name: str, used: int) -> None:
    """Files of models for 1M tokens have units that are zero, which their counterparts for 8k lack."""
    case = CASES[name]
    narrow = with_units(case.expected, used)
    whole = case.settings["inner_mlp_size"]
    key_map = evo2_layout.key_map(narrow, evo2_layout.layout_of(Settings(name, case.settings)), whole)
    wanted = ours(case.expected)[0] | {
        f"blocks.{layer}.mlp.{part}.weight": TensorInfo(BF16, shape)
        for layer in range(len(narrow.blocks))
        for part, shape in (
            ("gate", (used, narrow.hidden_size)),
            ("up", (used, narrow.hidden_size)),
            ("down", (narrow.hidden_size, used)),
        )
    }
    key_map.check(name, case.found(), wanted)
    cut = [entry for entry in key_map.entries if any(isinstance(layout, Padded) for layout in entry.layouts)]
    assert len(cut) == 3 * len(narrow.blocks)
    for entry in cut[:3]:
        shape = (2, whole) if ".l3." in entry.theirs else (whole, 2)
        values = torch.zeros(shape)
        values[:used, :used] = torch.randn(values[:used, :used].shape)
        assert torch.equal(entry.store(entry.load(values)), values)
        assert torch.equal(entry.load(values), values[:used, :used])
