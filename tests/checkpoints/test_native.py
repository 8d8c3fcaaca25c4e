"""A model folder holds one model, old or new, whatever happens while it is saved, and files of others stay."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from failing_disk import Crash, FailingDisk

from crocuta.checkpoints import commit, native
from crocuta.checkpoints.load import load
from crocuta.checkpoints.native import read, read_config, save
from crocuta.errors import (
    CheckpointError,
    ConfigError,
    InputError,
    NonFiniteError,
    TokenizerError,
    WeightsFormatError,
)
from crocuta.model.build import build_model
from crocuta.model.lm import Model
from crocuta.presets import preset
from crocuta.tokenizers.bytes import ByteTokenizer
from crocuta.tokenizers.dna import DNATokenizer

CONFIG = dataclasses.replace(preset("tiny-modal"), blocks=preset("tiny-modal").blocks[:1])


def make(seed: int, hidden_size: int = CONFIG.hidden_size) -> Model:
    return build_model(dataclasses.replace(CONFIG, hidden_size=hidden_size), seed=seed)


def same(model: Model, other: Model) -> bool:
    mine, theirs = model.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


OLD, NEW = make(1, CONFIG.hidden_size // 2), make(2)


def holds(folder: Path, model: Model, tokenizer: object) -> bool:
    found, found_tokenizer = load(folder)
    return found.config == model.config and same(found, model) and found_tokenizer == tokenizer


def test_the_folder_is_what_the_documentation_says(tmp_path):
    save(NEW, ByteTokenizer(), tmp_path / "new" / "run")
    folder = tmp_path / "new" / "run"
    assert sorted(os.listdir(folder)) == [
        "config.json",
        "manifest.json",
        "model.safetensors",
        "tokenizer_config.json",
    ]
    config = json.loads((folder / "config.json").read_text())
    assert (config.pop("format"), config.pop("version")) == ("crocuta", 1)
    assert config == CONFIG.to_json()
    assert read_config(folder) == read_config(folder / "config.json") == CONFIG
    contents = read(folder)
    assert (contents.config, contents.tokenizer) == (CONFIG, ByteTokenizer())
    assert "embedding.weight" in contents.tensors.infos
    assert not [name for name in contents.tensors.infos if name.startswith("head")]  # tied: stored once
    contents.tensors.close()


def test_saving_twice_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        save(NEW, ByteTokenizer(), tmp_path / name)
    for file in os.listdir(tmp_path / "a"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_save_replaces_the_model_whole_and_leaves_other_files(tmp_path):
    run = tmp_path / "run"
    (run / "samples").mkdir(parents=True)
    (run / "metrics.jsonl").write_text("{}\n")
    (run / "samples" / "1.txt").write_text("call me")
    save(OLD, ByteTokenizer(), run)
    assert holds(run, OLD, ByteTokenizer())
    save(NEW, None, run)
    assert holds(run, NEW, None)  # the old tokenizer is gone
    assert (run / "metrics.jsonl").read_text() == "{}\n"
    assert (run / "samples" / "1.txt").read_text() == "call me"
    assert sorted(os.listdir(run)) == [
        "config.json",
        "manifest.json",
        "metrics.jsonl",
        "model.safetensors",
        "samples",
    ]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "manifest.json", "tokenizer_config.json"])
def test_files_of_others_are_never_overwritten(name, tmp_path):
    (tmp_path / name).write_text('{"model_type": "gpt2"}')
    with pytest.raises(InputError, match=f"not a crocuta model: got {name}"):
        save(NEW, ByteTokenizer(), tmp_path)
    assert os.listdir(tmp_path) == [name]
    assert (tmp_path / name).read_text() == '{"model_type": "gpt2"}'


def test_a_file_is_no_place_for_a_model(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="a file"):
        save(NEW, None, tmp_path / "file")


def test_weights_that_are_not_finite_never_replace_a_good_model(tmp_path):
    save(NEW, None, tmp_path / "run")
    broken = make(3)
    with torch.no_grad():
        broken.blocks[0].mlp.down.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"blocks.0.mlp.down.weight"):
        save(broken, None, tmp_path / "run")
    assert holds(tmp_path / "run", NEW, None)


def test_a_tokenizer_larger_than_the_model_is_refused_both_ways(tmp_path):
    with pytest.raises(TokenizerError, match="vocab_size=513"):
        save(NEW, ByteTokenizer(vocab_size=CONFIG.vocab_size + 1), tmp_path / "run")
    save(NEW, None, tmp_path / "run")
    ByteTokenizer(vocab_size=CONFIG.vocab_size + 1).save(tmp_path / "run")
    os.remove(tmp_path / "run" / "manifest.json")
    with pytest.raises(TokenizerError, match="vocab_size=513"):
        load(tmp_path / "run")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "run"
    save(OLD, DNATokenizer(), folder)
    return folder


@pytest.mark.parametrize("mode", ["crash after", "crash within", "no space", "short write"])
def test_the_folder_holds_the_old_or_the_new_model_wherever_the_disk_fails(mode, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(commit, "disk", disk := FailingDisk())
    save(NEW, ByteTokenizer(), shutil.copytree(saved, tmp_path / "rehearsal"))
    seen = set()
    for k in range(len(disk.operations)):
        run = shutil.copytree(saved, tmp_path / str(k))
        (run / "metrics.jsonl").touch()
        monkeypatch.setattr(commit, "disk", FailingDisk(k, mode))
        reported = False
        try:
            save(NEW, ByteTokenizer(), run)
            reported = True
        except (Crash, CheckpointError):
            pass
        model, tokenizer = load(run)
        new = model.config == NEW.config
        assert same(model, NEW if new else OLD)
        assert tokenizer == (ByteTokenizer() if new else DNATokenizer())
        assert new or not reported
        seen.add(new)
        monkeypatch.setattr(commit, "disk", FailingDisk())
        save(OLD, None, run)  # the next save copes with whatever is there
        assert sorted(os.listdir(run)) == [
            "config.json",
            "manifest.json",
            "metrics.jsonl",
            "model.safetensors",
        ]
        assert len(commit.verify_folder(run, allow_extra=True)) == 2
        shutil.rmtree(run)
    assert seen == ({True} if mode == "short write" else {False, True})


def test_a_file_system_without_hard_links_will_do(saved, tmp_path, monkeypatch):
    class Plain(FailingDisk):
        def link(self, old, new):
            raise PermissionError(1, "Operation not permitted")

    run = shutil.copytree(saved, tmp_path / "run")
    monkeypatch.setattr(commit, "disk", Plain())
    save(NEW, ByteTokenizer(), run)
    assert holds(run, NEW, ByteTokenizer())


def test_a_save_during_a_load_is_noticed(saved, tmp_path, monkeypatch):
    run = shutil.copytree(saved, tmp_path / "run")
    original = native.read_config

    def interrupted(path):
        config = original(path)
        save(NEW, ByteTokenizer(), run)  # the old weights are open, the old configuration is read
        return config

    monkeypatch.setattr(native, "read_config", interrupted)
    with pytest.raises(WeightsFormatError, match="saved to while it was read"):
        load(run)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer_config.json", "manifest.json"])
def test_a_flipped_bit_in_any_file_is_found(file, saved, tmp_path):
    run = shutil.copytree(saved, tmp_path / "run")
    size = os.path.getsize(run / file)
    for position in range(size // 2, size, max(1, size // 8)):
        data = bytearray((saved / file).read_bytes())
        data[position] ^= 1
        (run / file).write_bytes(data)
        with pytest.raises(WeightsFormatError, match=str(run)):
            load(run)


def hand_made(tmp_path: Path, saved: Path, **changes: object) -> Path:
    """A folder without a manifest, its config.json changed: what a person may put together."""
    run = shutil.copytree(saved, tmp_path / "run")
    os.remove(run / "manifest.json")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, **changes}))
    return run


def test_a_folder_put_together_by_hand_is_read(saved, tmp_path):
    run = hand_made(tmp_path, saved, embedding_dropout=0.5)
    model, tokenizer = load(run)
    assert model.config.embedding_dropout == 0.5
    assert tokenizer == DNATokenizer()


@pytest.mark.parametrize(
    ("changes", "error", "reason"),
    [
        ({"version": 2}, WeightsFormatError, "config.json is of another format.*newer"),
        (
            {"hiden_size": 3},
            ConfigError,
            "config.json: unknown field 'hiden_size'.*did you mean 'hidden_size'",
        ),
        ({"vocab_size": "512"}, ConfigError, "config.json: vocab_size has the wrong type"),
        ({"hidden_size": 1 << 39, "vocab_size": 1 << 39}, ConfigError, "cannot be built"),
    ],
)
def test_a_bad_configuration_is_one_clear_error(changes, error, reason, saved, tmp_path):
    with pytest.raises(error, match=reason):
        load(hand_made(tmp_path, saved, **changes))


@pytest.mark.parametrize(
    ("text", "reason"),
    [("{", "is not strict JSON"), ('{"format":1,"format":2}', "duplicate key"), ("[]", "JSON object")],
)
def test_a_broken_config_file_is_named(text, reason, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(WeightsFormatError, match=rf"config.json.*{reason}"):
        load(tmp_path)


def test_missing_weights_are_named(saved, tmp_path):
    run = shutil.copytree(saved, tmp_path / "run")
    os.remove(run / "model.safetensors")
    with pytest.raises(WeightsFormatError, match=r"cannot read .*/model.safetensors: got No such file"):
        load(run)
