"""Who may write into a folder of checkpoints, and what is left when the writer is killed."""

import json
import os
import random
import signal
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
from checkpoint_folders import check, contents, steps_in, unfinished

from crocuta.checkpoints.files import read_tensors
from crocuta.errors import CheckpointError
from crocuta.training.checkpoint import Restored, TrainingCheckpoints, read_latest

# --- one trainer a folder ---


def fork(action: Callable[[int], None]) -> tuple[int, int]:
    """Run ``action(write_end)`` in a forked process: its pid and the end to read its reports from."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(read_end)
            action(write_end)
            status = 0
        finally:
            os._exit(status)
    os.close(write_end)
    return pid, read_end


def hold(folder: Path) -> Callable[[int], None]:
    def action(reports: int) -> None:
        with TrainingCheckpoints(folder):
            os.write(reports, b"held")
            time.sleep(60)

    return action


def test_a_second_trainer_is_refused_until_the_first_is_dead(tmp_path):
    pid, reports = fork(hold(tmp_path))
    assert os.read(reports, 4) == b"held"
    with pytest.raises(CheckpointError, match=rf"in use by another trainer: got pid {pid}, started \d{{4}}-"):
        TrainingCheckpoints(tmp_path)
    os.kill(pid, signal.SIGKILL)
    assert os.read(reports, 1) == b""  # all its files are closed
    TrainingCheckpoints(tmp_path).close()  # though nobody has waited for it: a zombie holds nothing
    os.waitpid(pid, 0)
    os.close(reports)


def test_the_same_process_is_refused_too_until_it_closes(tmp_path):
    first = TrainingCheckpoints(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    for path in (tmp_path, tmp_path / "link", tmp_path / "x" / ".."):
        (tmp_path / "x").mkdir(exist_ok=True)
        with pytest.raises(CheckpointError, match="in use by another trainer: got this process"):
            TrainingCheckpoints(path)
    first.close()
    second = TrainingCheckpoints(tmp_path)
    first.close()  # again: must not let anybody in
    with pytest.raises(CheckpointError, match="in use"):
        TrainingCheckpoints(tmp_path)
    second.close()


def test_a_dropped_trainer_lets_the_next_in(tmp_path):
    checkpoints = TrainingCheckpoints(tmp_path)
    del checkpoints
    TrainingCheckpoints(tmp_path).close()


def test_a_worker_that_outlives_its_trainer_does_not_hold_the_folder(tmp_path):
    def trainer(reports: int) -> None:
        with TrainingCheckpoints(tmp_path):
            worker, _ = fork(lambda _: time.sleep(60))
            os.write(reports, struct.pack("<q", worker))
            time.sleep(60)

    pid, reports = fork(trainer)
    worker = struct.unpack("<q", os.read(reports, 8))[0]
    with pytest.raises(CheckpointError, match="in use"):
        TrainingCheckpoints(tmp_path)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    TrainingCheckpoints(tmp_path).close()
    os.kill(worker, signal.SIGKILL)
    os.close(reports)


def test_ten_trainers_race_and_one_wins(tmp_path):
    def racer(reports: int) -> None:
        try:
            checkpoints = TrainingCheckpoints(tmp_path)
        except CheckpointError:
            os.write(reports, b"0")
            return
        os.write(reports, b"1")
        time.sleep(60)
        checkpoints.close()

    started = [fork(racer) for _ in range(10)]
    assert sorted(os.read(reports, 1) for _, reports in started) == [b"0"] * 9 + [b"1"]
    for pid, reports in started:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reports)


# --- kill -9 ---

SIZE = 20_000


def save_in_a_loop(folder: Path) -> Callable[[int], None]:
    def action(reports: int) -> None:
        checkpoints = TrainingCheckpoints(folder)
        newest = checkpoints.latest()
        step = newest.step if newest else 0
        while True:
            step += 1
            checkpoints.save(step, *contents(step, SIZE))
            os.write(reports, struct.pack("<q", step))

    return action


def kill_at_random(action: Callable[[int], None], rng: random.Random) -> int:
    """The newest step that the process had reported when it was killed."""
    pid, reports = fork(action)
    time.sleep(rng.uniform(0.02, 0.25))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    data = b""
    while chunk := os.read(reports, 1 << 16):
        data += chunk
    os.close(reports)
    return struct.unpack("<q", data[-8:])[0] if data else 0


def test_30_kills_lose_nothing_that_was_reported(tmp_path):
    rng, newest, saves = random.Random(5), 0, 0
    for _ in range(30):
        reported = kill_at_random(save_in_a_loop(tmp_path), rng)
        saves += reported > newest
        newest = max(newest, reported)
        restored = read_latest(tmp_path)
        found = check(restored) if restored else 0
        assert found in (newest, newest + 1)
        newest = found
    assert saves >= 10  # else the kills came before the saves
    with TrainingCheckpoints(tmp_path, keep=2) as checkpoints:  # kills may have come before old ones were removed
        checkpoints.save(newest + 1, *contents(newest + 1, SIZE))
    assert unfinished(tmp_path) == []
    assert len(steps_in(tmp_path)) == 2


@pytest.mark.parametrize("written", range(1, 7))
def test_the_check_of_those_kills_notices_every_mixture_of_two_saves(tmp_path, written):
    """The control: files of a save written over those of the one before, and stopped after each half of a file."""
    files = {}
    for step in (1, 2):
        tensors, state = contents(step, SIZE)
        whole = {group: safetensors.torch.save(named) for group, named in tensors.items()}
        whole["state"] = json.dumps({"step": step, "state": state}).encode()
        files[step] = whole
    halves = [(name, half) for name in files[1] for half in (0, 1)]
    for name, data in files[1].items():
        (tmp_path / name).write_bytes(data)
    for name, half in halves[:written]:
        data = files[2][name]
        (tmp_path / name).write_bytes(data if half else data[: len(data) // 2])

    def found() -> int:
        content = json.loads((tmp_path / "state").read_text())
        tensors = {group: read_tensors(tmp_path / group) for group in ("model", "optimizer")}
        return check(Restored(content["step"], tmp_path, tensors, content["state"]))

    if written == len(halves):
        assert found() == 2
    else:
        with pytest.raises((ValueError, OSError, AssertionError)):
            found()
