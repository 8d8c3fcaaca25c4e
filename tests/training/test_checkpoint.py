"""What was reported as saved can be loaded, whatever happens next; what is damaged is found and named."""

import json
import logging
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_folders import check, contents, make, steps_in, unfinished
from failing_disk import CRASHES, MODES, Crash, FailingDisk

from crocuta.checkpoints import commit
from crocuta.checkpoints.files import DTYPES
from crocuta.errors import CheckpointError, InputError
from crocuta.training.checkpoint import TrainingCheckpoints, read_latest

# --- what a save gives ---


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path):
    with TrainingCheckpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() is None
        path = checkpoints.save(7, *contents(7))
        assert path == tmp_path / "step-00000007"
        assert sorted(os.listdir(path)) == [
            "manifest.json",
            "model.safetensors",
            "optimizer.safetensors",
            "state.json",
        ]
        restored = checkpoints.latest()
        assert check(restored) == 7
        assert restored is not None
        assert restored.path == path


def test_every_dtype_and_bit_pattern_survives(tmp_path):
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(0, 256, [6, 16], dtype=torch.uint8, generator=generator)
    tensors = {name: patterns.view(dtype) for name, dtype in DTYPES.items() if dtype is not torch.bool}
    with TrainingCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(0, {"all": tensors}, {})
        restored = checkpoints.latest()
    assert restored is not None
    for name, tensor in tensors.items():
        assert restored.tensors["all"][name].dtype == tensor.dtype
        assert torch.equal(restored.tensors["all"][name].view(torch.uint8), tensor.view(torch.uint8))


def test_the_newest_step_counts_and_the_kept_ones_stay(tmp_path):
    make(tmp_path, range(8, 13), keep=3)
    assert steps_in(tmp_path) == ["step-00000010", "step-00000011", "step-00000012"]
    assert check(read_latest(tmp_path)) == 12


def test_a_step_saved_again_does_not_touch_the_first(tmp_path):
    with TrainingCheckpoints(tmp_path) as checkpoints:
        first = checkpoints.save(3, *contents(3))
        before = (first / "manifest.json").read_bytes()
        tensors, state = contents(3)
        again = checkpoints.save(3, tensors, {**state, "again": True})
        assert again != first
        assert (first / "manifest.json").read_bytes() == before
        restored = checkpoints.latest()
        assert restored is not None
        assert (restored.path, restored.step, restored.state["again"]) == (again, 3, True)


def test_a_save_of_an_earlier_step_is_not_pruned_at_once(tmp_path):
    make(tmp_path, range(5, 7))
    with TrainingCheckpoints(tmp_path) as checkpoints:
        path = checkpoints.save(1, *contents(1))
    commit.verify_folder(path)


@pytest.mark.parametrize(
    ("tensors", "state", "reason"),
    [
        ({"a/b": {}}, {}, "'a/b'"),
        ({"m": {"x": torch.ones(1, dtype=torch.complex64)}}, {}, "complex64"),
        ({}, {"loss": float("nan")}, r"state\.loss is no JSON value: got nan"),
        ({}, {"a": [1, {"b": {1: 2}}]}, r"key of state\.a\[1\]\.b: got 1 \(int\)"),
        ({}, {"rng": torch.ones(1)}, r"state\.rng is no JSON value"),
        ({}, {"rng": b"bytes"}, r"state\.rng is no JSON value"),
    ],
)
def test_what_would_come_back_otherwise_is_refused(tensors, state, reason, tmp_path):
    with TrainingCheckpoints(tmp_path) as checkpoints:
        with pytest.raises(InputError, match=reason):
            checkpoints.save(1, tensors, state)
        assert steps_in(tmp_path) + unfinished(tmp_path) == []
        with pytest.raises(InputError, match="impossible step"):
            checkpoints.save(-1, {}, {})


def test_one_kept_checkpoint_is_too_few(tmp_path):
    with pytest.raises(InputError, match=">= 2"):
        TrainingCheckpoints(tmp_path, keep=1)


# --- damage ---


def damage(path: Path, rng: random.Random) -> None:
    """One random bit of one random file."""
    file = rng.choice(sorted(path.iterdir()))
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def test_300_random_bit_flips_are_all_found_and_the_previous_one_is_taken(tmp_path, caplog):
    caplog.set_level(logging.CRITICAL)
    make(tmp_path / "good", range(1, 3))
    rng = random.Random(2)
    for trial in range(300):
        folder = shutil.copytree(tmp_path / "good", tmp_path / str(trial))
        damage(folder / "step-00000002", rng)
        assert check(read_latest(folder)) == 1
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda p: (p / "state.json").unlink(), "state.json is missing"),
        (lambda p: (p / "manifest.json").unlink(), "manifest.json"),
        (lambda p: (p / "optimizer.safetensors").unlink(), "optimizer.safetensors is missing"),
        (lambda p: (p / "more.safetensors").touch(), "more.safetensors is extra"),
        (lambda p: os.truncate(p / "model.safetensors", 100), "model.safetensors is damaged: got size 100"),
        (
            lambda p: shutil.copy(p.with_name("step-00000001") / "model.safetensors", p),
            "model.safetensors is damaged",
        ),
        (lambda p: (shutil.rmtree(p), p.touch()), "manifest.json"),
        (lambda p: (shutil.rmtree(p), shutil.copytree(p.with_name("step-00000001"), p)), "of another kind"),
        (lambda p: [f.unlink() for f in p.iterdir()], "manifest.json"),
    ],
)
def test_a_bad_newest_is_passed_over_with_a_warning(harm, reason, tmp_path, caplog):
    make(tmp_path, range(1, 3))
    harm(tmp_path / "step-00000002")
    assert check(read_latest(tmp_path)) == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "step-00000002" in caplog.text
    assert reason in caplog.text


def test_all_bad_is_an_error_and_never_a_fresh_start(tmp_path):
    make(tmp_path, range(1, 3))
    for name in steps_in(tmp_path):
        (tmp_path / name / "state.json").write_text("{}")
    with pytest.raises(CheckpointError) as caught:
        read_latest(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "step-00000001: " in str(caught.value)
    assert "step-00000002: " in str(caught.value)


def test_a_sealed_folder_of_another_kind_is_bad(tmp_path):
    def write(folder: Path) -> None:
        (folder / "state.json").write_text(json.dumps({"format": "other", "version": 1, "step": 1, "state": {}}))

    commit.write_folder(tmp_path / "step-00000001", write)
    with pytest.raises(CheckpointError, match="of another kind"):
        read_latest(tmp_path)


def test_pruning_counts_only_good_ones_and_removes_no_bad_ones(tmp_path):
    make(tmp_path, range(1, 4), keep=3)
    (tmp_path / "step-00000003" / "state.json").write_text("{}")
    (tmp_path / "step-notes").mkdir()
    make(tmp_path, range(4, 5))
    assert steps_in(tmp_path) == ["step-00000002", "step-00000003", "step-00000004", "step-notes"]
    make(tmp_path, range(5, 6))
    assert steps_in(tmp_path) == ["step-00000003", "step-00000004", "step-00000005", "step-notes"]


def test_once_a_good_one_exists_one_always_exists(tmp_path):
    """Random saves, failed saves, crashes, rot and restarts; rot spares the last good one, nothing else does."""
    rng = random.Random(4)
    good: set[str] = set()
    step = 0
    for _ in range(120):
        disk = FailingDisk()
        if rng.random() < 0.5:
            disk = FailingDisk(rng.randrange(60), rng.choice(MODES))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(commit, "disk", disk)
            step += 1
            try:
                make(tmp_path, range(step, step + 1))
                good.add(f"step-{step:08d}")
            except (Crash, CheckpointError):
                pass
        found = {name for name in steps_in(tmp_path) if verifies(tmp_path / name)}
        assert len(found) >= min(len(good), 2)
        good = found
        if len(good) > 1 and rng.random() < 0.3:
            name = rng.choice(sorted(good))
            damage(tmp_path / name, rng)
            good.remove(name)
        if good:
            assert check(read_latest(tmp_path)) == max(int(name[5:]) for name in good)


def verifies(path: Path) -> bool:
    try:
        commit.verify_folder(path)
    except CheckpointError:
        return False
    return True


# --- failing disks ---


@pytest.mark.parametrize("mode", MODES)
def test_the_newest_is_the_old_or_the_new_one_wherever_the_disk_fails(mode, tmp_path, monkeypatch):
    make(tmp_path / "before", range(1, 3))
    shutil.copytree(tmp_path / "before", tmp_path / "rehearsal")
    monkeypatch.setattr(commit, "disk", rehearsal := FailingDisk())
    make(tmp_path / "rehearsal", range(3, 4))
    assert len(rehearsal.operations) > 25
    seen = set()
    for k in range(len(rehearsal.operations)):
        folder = shutil.copytree(tmp_path / "before", tmp_path / str(k))
        monkeypatch.setattr(commit, "disk", FailingDisk(k, mode))
        outcome: BaseException | None = None
        try:
            make(folder, range(3, 4))
        except (Crash, CheckpointError) as error:
            outcome = error
        assert isinstance(outcome, Crash) <= (mode in CRASHES)
        if isinstance(outcome, CheckpointError):
            assert str(folder) in str(outcome)
            assert ("bytes free" in str(outcome)) == (mode == "no space")
            assert unfinished(folder) == []
        monkeypatch.setattr(commit, "disk", FailingDisk())
        with TrainingCheckpoints(folder) as checkpoints:
            assert unfinished(folder) == []
            newest = check(checkpoints.latest())
        assert newest == 3 or outcome is not None
        assert len(steps_in(folder)) >= 2
        assert all(verifies(folder / name) for name in steps_in(folder))
        seen.add(newest)
        shutil.rmtree(folder)
    assert seen == ({3} if mode == "short write" else {2, 3})


def test_a_full_disk_names_path_and_bytes(tmp_path, monkeypatch):
    with TrainingCheckpoints(tmp_path) as checkpoints:
        monkeypatch.setattr(commit, "disk", FailingDisk(2, "no space"))
        with pytest.raises(CheckpointError, match=r"step-00000001.*[\d,]+ bytes free; expected room for [\d,]+ bytes"):
            checkpoints.save(1, *contents(1))
