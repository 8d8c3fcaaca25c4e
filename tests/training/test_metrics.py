"""metrics.jsonl: one whole JSON object a line, none lost by a resume and none twice."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from crocuta.checkpoints import commit
from crocuta.training.metrics import Metrics


def lines(folder: Path) -> list[tuple[str, int]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(record["event"], record["step"]) for record in records]


def write(folder: Path, *events: tuple[str, int], resume_step: int | None = None) -> None:
    metrics = Metrics(folder, resume_step=resume_step, tensorboard=False)
    for event, step in events:
        metrics.write(event, step, loss=0.5)
    metrics.close()


EVENTS = [("train", 1), ("train", 2), ("eval", 2), ("skipped", 3), ("train", 3), ("final", 3)]


@pytest.mark.parametrize(
    ("resume_step", "kept"), [(None, 0), (0, 0), (1, 1), (2, 3), (3, 5), (100, 5)], ids=lambda value: str(value)
)
def test_a_resume_keeps_what_the_run_will_not_write_again(tmp_path, resume_step, kept):
    write(tmp_path, *EVENTS)
    write(tmp_path, ("train", 50), resume_step=resume_step)
    assert lines(tmp_path) == [*EVENTS[:kept], ("train", 50)]


@pytest.mark.parametrize(
    "tail",
    ['{"event": "train", "st', '{"event": "train", "step": 2}', "\0\0\0", "[1]\n", '{"a": 1}\n', "7\n", "\xff\n"],
)
def test_a_line_that_a_crash_cut_off_is_dropped(tmp_path, tail):
    write(tmp_path, *EVENTS[:2])
    with (tmp_path / "metrics.jsonl").open("a", encoding="latin1") as file:
        file.write(tail)
    write(tmp_path, ("train", 3), resume_step=2)
    assert lines(tmp_path) == [("train", 1), ("train", 2), ("train", 3)]


def test_kept_lines_keep_every_byte(tmp_path):
    write(tmp_path, *EVENTS[:3])
    before = (tmp_path / "metrics.jsonl").read_bytes()
    write(tmp_path, resume_step=2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_kill_while_resuming_loses_nothing(tmp_path, monkeypatch):
    """The shortened file takes the place of the old one whole; what a kill leaves of it goes with the next resume."""
    write(tmp_path, *EVENTS)

    class Killed(BaseException):
        pass

    def killed(self, old, new):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(commit.Disk, "rename", killed)
        patch.setattr(commit.Disk, "remove", lambda self, path: None)
        with pytest.raises(Killed):
            Metrics(tmp_path, resume_step=2, tensorboard=False)
    assert lines(tmp_path) == EVENTS
    assert len(list(tmp_path.iterdir())) == 2
    write(tmp_path, resume_step=2)
    assert lines(tmp_path) == EVENTS[:3]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_lines_are_on_disk_before_the_next_step(tmp_path):
    metrics = Metrics(tmp_path, resume_step=None, tensorboard=False)
    metrics.write("train", 1, loss=0.5, names=["a"], ok=True)
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "event": "train",
        "step": 1,
        "loss": 0.5,
        "names": ["a"],
        "ok": True,
    }
    metrics.close()


@pytest.mark.parametrize(("value", "text"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
def test_numbers_that_json_has_not_are_text(tmp_path, value, text):
    metrics = Metrics(tmp_path, resume_step=None, tensorboard=False)
    metrics.write("train", 1, loss=value)
    metrics.close()

    def refuse(constant):
        raise AssertionError(constant)

    assert json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)["loss"] == text


def test_tensorboard_gets_the_same_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = Metrics(tmp_path, resume_step=None, tensorboard=True)
    for step in (1, 2):
        metrics.write("train", step, loss=step / 4, ok=True, note="text")
    metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["train/loss"]
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 0.25), (2, 0.5)]
