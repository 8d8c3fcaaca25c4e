"""From a name to a folder, against a stand-in for the Hub on this machine: the real one is never asked."""

from __future__ import annotations

import errno
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub.constants
import huggingface_hub.file_download
import pytest
from hub_stand_in import Hub, Revision, serve

from crocuta.checkpoints import hub
from crocuta.checkpoints.hub import Download, looks_like_hub_name, resolve
from crocuta.errors import InputError, MissingExtraError
from crocuta.published import PUBLISHED

DEAD = "http://127.0.0.1:9"  # nothing listens on the port that discards
SHARD = b"s" * 300
INDEX = json.dumps({"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}).encode()
EVO1 = {
    "config.json": b"{}",
    "model.safetensors.index.json": INDEX,
    "model-1-of-2.safetensors": SHARD + b"1",
    "model-2-of-2.safetensors": SHARD + b"2",
    "tokenizer_config.json": b"{ }",
    # not wanted:
    "README.md": b"#",
    ".gitattributes": b"*",
    "modeling_hyena.py": b"raise SystemExit",
    "pytorch_model.pt": SHARD + b"3",
    "pytorch_model-1-of-1.bin": SHARD + b"4",
    "global_step/optim_states.json": b"[]",
}
EVO1_WANTED = [
    "config.json",
    "model-1-of-2.safetensors",
    "model-2-of-2.safetensors",
    "model.safetensors.index.json",
    "tokenizer_config.json",
]
BASE = "togethercomputer/evo-1-8k-base"


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test reaches the network or the user's cache and token by oversight."""
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    point_to(DEAD, monkeypatch)


def point_to(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    # Versions before 1.0 keep a copy of their own.
    monkeypatch.setattr(huggingface_hub.file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve() as hub:
        hub.repositories[BASE] = [
            Revision(EVO1, names=("1.1_fix",)),
            Revision(EVO1 | {"model-2-of-2.safetensors": SHARD + b"old"}),
        ]
        point_to(hub.endpoint, monkeypatch)
        yield hub


@contextmanager
def unplugged(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        point_to(DEAD, patch)
        yield


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- downloading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["evo-1-8k-base", BASE, "Evo-1-8K-Base"])
def test_the_pinned_revision_is_downloaded_and_nothing_that_is_not_needed(server: Hub, name: str) -> None:
    folder = resolve(name)
    assert names(folder) == EVO1_WANTED
    assert (folder / "model-2-of-2.safetensors").read_bytes() == SHARD + b"2"
    assert server.fetched() == EVO1_WANTED


def test_another_revision_fetches_only_what_differs(server: Hub) -> None:
    first = resolve(BASE)
    server.fetched()
    plans: list[Download] = []
    second = resolve(BASE, revision="main", announce=plans.append)
    assert second != first
    assert (second / "model-2-of-2.safetensors").read_bytes() == SHARD + b"old"
    assert server.fetched() == ["model-2-of-2.safetensors"]
    assert [plan.missing_bytes for plan in plans] == [303]


def test_a_commit_is_a_revision(server: Hub) -> None:
    commit = server.repositories[BASE][1].commit
    assert resolve(BASE, revision=commit).name == commit
    assert resolve(BASE, revision=commit, download=False).name == commit


def test_what_comes_is_announced_first(server: Hub) -> None:
    plans: list[Download] = []

    def announce(plan: Download) -> None:
        assert server.fetched() == []
        plans.append(plan)

    resolve(BASE, announce=announce)
    resolve(BASE, announce=plans.append)
    total = sum(len(EVO1[name]) for name in EVO1_WANTED)
    assert [(p.repo, p.revision, list(p.files)) for p in plans] == 2 * [(BASE, "1.1_fix", EVO1_WANTED)]
    assert [(p.total_bytes, p.missing_bytes) for p in plans] == [(total, total), (total, 0)]


def test_an_interrupted_download_goes_on_with_what_is_missing(server: Hub, monkeypatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)  # huggingface_hub waits between attempts
    server.broken.add("model-2-of-2.safetensors")
    with pytest.raises(InputError, match=r"cannot reach .*complete files are kept"):
        resolve(BASE)
    assert set(server.fetched()) == set(EVO1_WANTED)
    with pytest.raises(InputError, match=r"not in the cache .*: got model-2-of-2\.safetensors missing; run crocuta"):
        resolve(BASE, download=False)
    server.broken.clear()
    folder = resolve(BASE)
    assert server.fetched() == ["model-2-of-2.safetensors"]
    assert (folder / "model-2-of-2.safetensors").read_bytes() == SHARD + b"2"


REPOSITORIES = {
    "safetensors before pickles": (
        ["a.safetensors", "a.bin", "a.pt", "a.ckpt", "config.json", "pytorch_model.bin.index.json"],
        ["a.safetensors", "config.json"],
    ),
    "parts": (["x.pt.part0", "x.pt.part1", "x.pt.part10", "config.json", "x.py"], None),
    "pickles where there is nothing else": (["a.bin", "config.yml", "merges.txt", "tokenizer.model"], None),
    "nothing of the training": (
        ["model.pt", "optimizer.pt", "zero_optim_states.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin"],
        ["model.pt"],
    ),
    "no code": (["model.pt", "tokenizer.py", "x.pt.py", "x.pt.part0.py", "config.py", "run.sh"], ["model.pt"]),
    "no folders": (["model.pt", "other/model.pt", "other/config.json"], ["model.pt"]),
}


@pytest.mark.parametrize("case", REPOSITORIES)
def test_any_repository_with_what_a_model_needs(server: Hub, case: str) -> None:
    files, wanted = REPOSITORIES[case]
    wanted = sorted(name for name in files if not name.endswith(".py")) if wanted is None else wanted
    server.repositories["some/thing"] = [Revision({name: name.encode() for name in files})]
    assert names(resolve("some/thing")) == wanted
    assert server.fetched() == wanted


PUBLISHED_FILES = {
    "StripedHyena-Nous-7B": (
        ["config.json", "model-1-of-1.safetensors", "model.safetensors.index.json", "tokenizer.json", "vocab.json"],
        ["model.py", "pytorch_model-1-of-1.bin", "pytorch-model.bin"],
    ),
    "evo2_7b": (["config.json", "evo2_7b.pt"], ["README.md", "model.safetensors", "tokenizer.json"]),
    "evo2_40b": (["config.json", "evo2_40b.pt.part0", "evo2_40b.pt.part1"], ["RECONSTRUCTION.md"]),
    "savanna_evo2_1b_base": (["config.json", "savanna_evo2_1b_base.pt"], []),
    "hyenadna-tiny-1k-seqlen": (["config.json", "weights.ckpt"], ["last.ckpt", ".DS_Store"]),
    "hyenadna-tiny-1k-seqlen-hf": (["config.json", "model.safetensors", "tokenizer_config.json"], ["modeling.py"]),
}


@pytest.mark.parametrize("name", PUBLISHED_FILES)
def test_the_patterns_of_each_layout(server: Hub, name: str) -> None:
    wanted, rest = PUBLISHED_FILES[name]
    files = {file: b"{}" for file in (*wanted, *rest)}
    server.repositories[PUBLISHED[name].repo] = [Revision(files)]
    assert names(resolve(name)) == sorted(wanted)


def test_every_layout_is_tried() -> None:
    assert {PUBLISHED[name].layout for name in PUBLISHED_FILES} == {entry.layout for entry in PUBLISHED.values()}


# --- without a network ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["no server", "HF_HUB_OFFLINE", "download=False"])
def test_the_second_use_needs_no_network(server: Hub, monkeypatch, caplog, how: str) -> None:
    folder = resolve(BASE)
    server.fetched()
    with unplugged(monkeypatch):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", how == "HF_HUB_OFFLINE")
        assert resolve(BASE, download=how != "download=False") == folder
    warnings = [record.getMessage() for record in caplog.records if record.name.startswith("crocuta")]
    assert len(warnings) == (how == "no server")
    assert all(f"using the copy in the cache: cannot reach {DEAD}" in warning for warning in warnings)
    assert not server.requests


@pytest.mark.parametrize(("offline", "words"), [(False, f"cannot reach {DEAD}"), (True, "is not in the cache")])
def test_no_network_and_nothing_in_the_cache(monkeypatch, offline: bool, words: str) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(InputError, match=rf"{words}.*run crocuta download evo2_7b on a machine with network"):
        resolve("evo2_7b")


def test_a_network_that_goes_away_meanwhile(server: Hub, monkeypatch) -> None:
    with pytest.raises(InputError, match=rf"cannot reach {DEAD} for {BASE}: got Connect\w*Error") as caught:
        resolve(BASE, announce=lambda _: point_to(DEAD, monkeypatch))
    assert "LocalEntryNotFoundError" not in str(caught.value)  # the cause is told, not what huggingface_hub makes of it


def test_another_revision_is_not_the_one_in_the_cache(server: Hub) -> None:
    resolve(BASE)
    with pytest.raises(InputError, match="evo-1-8k-base at main is not in the cache"):
        resolve(BASE, revision="main", download=False)


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        (["model-1-of-2.safetensors"], r"got model-1-of-2\.safetensors missing"),
        (["model-1-of-2.safetensors", "model-2-of-2.safetensors"], "got weights missing"),
    ],
)
def test_a_snapshot_that_lost_files_is_not_used_offline(server: Hub, lost: list[str], words: str) -> None:
    folder = resolve(BASE)
    for name in lost:
        (folder / name).resolve().unlink()  # the bytes; the link stays
    with pytest.raises(InputError, match=words):
        resolve(BASE, download=False)


def test_a_missing_part_is_seen_offline(server: Hub) -> None:
    server.repositories["arcinstitute/evo2_40b"] = [Revision({f"evo2_40b.pt.part{i}": b"%d" % i for i in range(3)})]
    folder = resolve("evo2_40b")
    (folder / "evo2_40b.pt.part1").unlink()
    with pytest.raises(InputError, match=r"got evo2_40b\.pt\.part1 missing"):
        resolve("evo2_40b", download=False)


def test_a_broken_index_is_left_to_loading(server: Hub) -> None:
    server.repositories["some/thing"] = [Revision({"a.safetensors": b"a", "a.safetensors.index.json": b"[1"})]
    assert resolve("some/thing") == resolve("some/thing", download=False)


# --- what goes wrong ------------------------------------------------------------------------------------------


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(InputError, match=r"unknown checkpoint: got 'evo2-7b'.*did you mean 'evo2_7b'\?"):
        resolve("evo2-7b")
    with pytest.raises(InputError, match="crocuta download --list"):
        resolve("zzzzzz")


def test_an_unknown_repository(server: Hub) -> None:
    with pytest.raises(InputError, match=r"no repository arcinstitute/evo2_7.*did you mean 'evo2_7b'\?"):
        resolve("arcinstitute/evo2_7")
    with pytest.raises(InputError, match=r"no repository zz/yy.*hf auth login"):
        resolve("zz/yy")


def test_a_name_that_no_repository_can_have(server: Hub) -> None:
    with pytest.raises(InputError, match="'a--b/c'"):
        resolve("a--b/c")


def test_an_unknown_revision(server: Hub) -> None:
    with pytest.raises(InputError, match=f"no such revision: got '1.2'; expected a branch, tag or commit of {BASE}"):
        resolve(BASE, revision="1.2")


def test_a_gated_repository(server: Hub) -> None:
    server.gated.add(BASE)
    with pytest.raises(InputError, match=f"{BASE} is gated.*accept its terms at {server.endpoint}/{BASE}, then"):
        resolve(BASE)


def test_a_repository_without_weights(server: Hub) -> None:
    server.repositories["some/thing"] = [Revision({"config.json": b"{}", "README.md": b"#"})]
    with pytest.raises(InputError, match=r"some/thing at main has no weights: got README\.md, config\.json; expected"):
        resolve("some/thing")


def test_a_disk_without_room_is_seen_before_a_byte_is_fetched(server: Hub) -> None:
    server.repositories[BASE][0].sizes["model-1-of-2.safetensors"] = 1 << 60
    with pytest.raises(InputError, match=r"not enough space .* bytes free; expected 1,152,921,.*HF_HOME"):
        resolve(BASE)
    assert server.fetched() == []


def test_what_is_there_needs_no_room(server: Hub, monkeypatch) -> None:
    folder = resolve(BASE)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))  # type: ignore[attr-defined]
    assert resolve(BASE) == folder


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, r"the disk of .* is full; make room"), (errno.EACCES, "cannot write to the cache .*set HF_HOME")],
)
def test_a_disk_that_refuses(server: Hub, monkeypatch, number: int, words: str) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise OSError(number, "refused")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(InputError, match=words):
        resolve(BASE)


@pytest.mark.parametrize("status", [403, 500])
def test_a_hub_that_refuses(server: Hub, monkeypatch, status: int) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)  # huggingface_hub waits between attempts
    server.status = status
    with pytest.raises(InputError, match=f"the Hub refused {BASE}: got .*{status}"):
        resolve(BASE)
    server.status = 200
    folder = resolve(BASE)
    server.status = status
    assert resolve(BASE) == folder


def test_our_own_bugs_are_not_taken_for_the_network(server: Hub, monkeypatch) -> None:
    monkeypatch.setattr(hub, "_plan", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        resolve(BASE)


def test_without_the_package(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r"need the package huggingface_hub; pip install 'crocuta\[hub\]'"):
        resolve("evo2_7b")


# --- what is a name -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["evo2_7b", "EVO2_7B", BASE, "some-org/some.model_1", *PUBLISHED])
def test_names(text: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert looks_like_hub_name(text)


@pytest.mark.parametrize(
    "text",
    ["", "model", "evo2-7b", "./org/name", "/org/name", "org/name/x", "org/", "~/name", "../name", "org/config.json",
     "org/model.safetensors", "org/x.pt.part0", "runs/mistyped", "a b/c", "C:\\x"],
)  # fmt: skip
def test_not_names(text: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert not looks_like_hub_name(text)


@pytest.mark.parametrize("text", ["evo2_7b", BASE, "some/thing"])
def test_a_path_that_exists_wins(text: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / text).mkdir(parents=True)
    assert not looks_like_hub_name(text)
