"""The table of published checkpoints: complete, without contradictions, and found by every name that people use."""

from pathlib import Path

import pytest
import torch

from crocuta.config import AttentionConfig
from crocuta.model import count
from crocuta.presets import PRESETS, preset
from crocuta.published import (
    PUBLISHED,
    Published,
    find_published,
    nearest_published,
    published_of_file,
)

# Repository, revision, preset: from the code of the publishers (evo/models.py, evo2/utils.py) and their pages.
STRIPEDHYENA = {
    "togethercomputer/StripedHyena-Hessian-7B": ("main", "stripedhyena-7b"),
    "togethercomputer/StripedHyena-Nous-7B": ("main", "stripedhyena-7b"),
    "togethercomputer/evo-1-8k-base": ("1.1_fix", "evo1-8k"),
    "togethercomputer/evo-1-131k-base": ("1.1_fix", "evo1-131k"),
    "LongSafari/evo-1-8k-crispr": ("main", "evo1-8k"),
    "LongSafari/evo-1-8k-transposon": ("main", "evo1-8k"),
    "evo-design/evo-1.5-8k-base": ("main", "evo1-8k"),
}
EVO2 = {
    "arcinstitute/evo2_1b_base": ("evo2-1b-8k", "required"),
    "arcinstitute/evo2_7b_base": ("evo2-7b-8k", "optional"),
    "arcinstitute/evo2_7b": ("evo2-7b-1m", "optional"),
    "arcinstitute/evo2_7b_262k": ("evo2-7b-262k", "optional"),
    "evo-design/evo-2-7b-8k-microviridae": ("evo2-7b-8k", "optional"),
    "arcinstitute/evo2_20b": ("evo2-20b-1m", "required"),
    "arcinstitute/evo2_40b_base": ("evo2-40b-8k", "required"),
    "arcinstitute/evo2_40b": ("evo2-40b-1m", "required"),
}
SAVANNA = {
    f"arcinstitute/savanna_evo2_{size}": EVO2[f"arcinstitute/evo2_{size}"]
    for size in ("1b_base", "7b_base", "7b", "20b", "40b_base", "40b")
}
HYENADNA = {
    "LongSafari/hyenadna-tiny-1k-seqlen": "hyenadna-tiny-1k",
    "LongSafari/hyenadna-tiny-1k-seqlen-d256": "hyenadna-tiny-1k-d256",
    "LongSafari/hyenadna-tiny-16k-seqlen-d128": "hyenadna-tiny-16k-d128",
    "LongSafari/hyenadna-small-32k-seqlen": "hyenadna-small-32k",
    "LongSafari/hyenadna-medium-160k-seqlen": "hyenadna-medium-160k",
    "LongSafari/hyenadna-medium-450k-seqlen": "hyenadna-medium-450k",
    "LongSafari/hyenadna-large-1m-seqlen": "hyenadna-large-1m",
}


def facts(layout: str) -> dict[str, Published]:
    return {entry.repo: entry for entry in PUBLISHED.values() if entry.layout == layout}


def test_stripedhyena_and_evo1() -> None:
    found = {repo: (entry.revision, entry.preset) for repo, entry in facts("stripedhyena-hf").items()}
    assert found == STRIPEDHYENA
    assert {entry.fp8 for entry in facts("stripedhyena-hf").values()} == {"no"}


@pytest.mark.parametrize(("layout", "expected"), [("evo2", EVO2), ("savanna", SAVANNA)])
def test_evo2(layout: str, expected: dict[str, tuple[str, str]]) -> None:
    assert {repo: (entry.preset, entry.fp8) for repo, entry in facts(layout).items()} == expected
    assert {entry.revision for entry in facts(layout).values()} == {"main"}


@pytest.mark.parametrize(("layout", "suffix"), [("hyenadna-ckpt", ""), ("hyenadna-hf", "-hf")])
def test_hyenadna(layout: str, suffix: str) -> None:
    expected = {repo + suffix: name for repo, name in HYENADNA.items()}
    assert {repo: entry.preset for repo, entry in facts(layout).items()} == expected


def test_there_is_nothing_else() -> None:
    assert len(PUBLISHED) == 7 + 8 + 6 + 2 * 7


def test_names_and_repositories_are_unique() -> None:
    aliases = [
        alias.lower() for entry in PUBLISHED.values() for alias in {entry.name, entry.repo, entry.repo.split("/")[1]}
    ]
    assert len(set(aliases)) == len(aliases)


def test_the_presets_exist_and_every_large_one_has_a_checkpoint() -> None:
    used = {entry.preset for entry in PUBLISHED.values()}
    assert used == {name for name in PRESETS if not name.startswith(("tiny-", "deep-dive-"))}


def test_the_preset_of_the_131k_model_has_its_scale_of_rope() -> None:
    assert [entry.name for entry in PUBLISHED.values() if entry.preset == "evo1-131k"] == ["evo-1-131k-base"]
    mixers = [block.mixer for block in preset("evo1-131k").blocks]
    assert {m.rope.scale for m in mixers if isinstance(m, AttentionConfig) and m.rope} == {16.0}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_alias_finds_the_checkpoint(name: str) -> None:
    entry = PUBLISHED[name]
    assert entry.name == name
    for alias in (name, entry.repo, entry.repo.split("/")[1]):
        assert find_published(alias) is entry
        assert find_published(alias.upper()) is entry
        assert find_published(alias.lower()) is entry


@pytest.mark.parametrize("name", ["", "evo2", "evo2-7b", "someone/evo2_7b", "evo2_7b ", "evo2_7b.pt", "evo2-7b-8k"])
def test_other_names_find_none(name: str) -> None:
    assert find_published(name) is None


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("evo2-7b", "evo2_7b"),
        ("EVO2_40", "evo2_40b"),
        ("hyenadna-tiny-1k", "hyenadna-tiny-1k-seqlen"),
        ("arcinstitute/evo2_7b-base", "evo2_7b_base"),
        ("togethercomputer/evo-1-8k", "evo-1-8k-base"),
        ("stripedhyena-7b", "StripedHyena-Nous-7B"),
        ("qqq", None),
        ("", None),
    ],
)
def test_the_nearest_name(name: str, nearest: str | None) -> None:
    assert nearest_published(name) == nearest


@pytest.mark.parametrize("layout", ["evo2", "savanna"])
def test_a_local_file_is_known_by_its_name(layout: str) -> None:
    for entry in facts(layout).values():
        for suffix in ("", ".pt", ".pt.part0", ".pt.part12", ".part3"):
            assert published_of_file(entry.name + suffix) is entry


@pytest.mark.parametrize(
    "name",
    ["", ".pt", "model.pt", "evo2_7b.pth", "evo2_7b.pt.part", "my_evo2_7b.pt", "evo2_7b-tuned.pt",
     "evo2_7b.pt.part0.bak", "evo-1-8k-base", "hyenadna-tiny-1k-seqlen", "EVO2_7B.pt"],
)  # fmt: skip
def test_other_files_are_not(name: str) -> None:
    assert published_of_file(name) is None


README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
ROWS = [line for line in README.splitlines() if line.startswith("| `")]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_readme_lists_every_checkpoint_with_its_size(name: str) -> None:
    (row,) = (line for line in ROWS if f"`{name.removesuffix('-hf')}`" in line)
    if name.startswith("savanna_"):
        assert "as above" in row
        return
    total = sum(count.parameters(preset(PUBLISHED[name].preset)).values())
    unit, letter = next((unit, letter) for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if total >= unit)
    assert f"| {total / unit:.3g} {letter} |" in row
    dtype, mark = (torch.float32, "fp32") if "hyenadna" in name else (torch.bfloat16, "bf16")
    size = count.weight_bytes(preset(PUBLISHED[name].preset), dtype)
    shown = f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
    assert f"| {shown} {mark} |" in row
