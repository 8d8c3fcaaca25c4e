"""A run that is stopped, killed and resumed ends in the bits, and the metrics, of the run that never was."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_run import metrics_of, tiny_run, write_text

from crocuta.config import ComplexModalFilterConfig, ImplicitFilterConfig
from crocuta.errors import CheckpointError, ConfigError, InputError
from crocuta.training import loop
from crocuta.training.checkpoint import TrainingCheckpoints, read_latest
from crocuta.training.config import DataConfig, ModelSpec, StripedSpec, TrainConfig
from crocuta.training.loop import train

KILLS = 20


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """(what killed_runs.py saw, the folder of its three runs)."""
    folder = tmp_path_factory.mktemp("killed")
    script = Path(__file__).with_name("killed_runs.py")
    command = [sys.executable, str(script), str(folder), str(KILLS), "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["failed"] == [], done.stderr
    return report, folder


@pytest.mark.timeout(180)
def test_twenty_kills_lose_no_checkpoint_that_was_reported(killed):
    report, _ = killed
    assert report["lost"] == []
    assert len(report["newest"]) == KILLS
    assert report["newest"] == sorted(report["newest"]), "a kill took a checkpoint away"
    assert len(set(report["newest"])) > 5, "the kills came before anything had happened"


@pytest.mark.parametrize("run", ["killed", "stopped"])
def test_the_final_weights_are_those_of_the_uninterrupted_run(killed, run):
    _, folder = killed
    for name in ("model.safetensors", "config.json", "tokenizer_config.json"):
        assert (folder / run / name).read_bytes() == (folder / "whole" / name).read_bytes()


@pytest.mark.parametrize("run", ["killed", "stopped"])
def test_no_line_of_the_metrics_is_lost_or_stands_twice(killed, run):
    _, folder = killed
    whole = metrics_of(folder / "whole")
    assert len({(line["event"], line["step"]) for line in whole}) == len(whole)
    assert {line["event"] for line in whole} == {"train", "eval", "final"}
    assert metrics_of(folder / run) == whole


@pytest.mark.parametrize("run", ["killed", "stopped"])
def test_nothing_unfinished_is_left(killed, run):
    _, folder = killed
    assert [p.name for p in (folder / run).rglob(".*")] == []
    assert len(list((folder / run / "checkpoints").glob("step-*"))) == 2


def test_signals_save_and_stop(killed):
    """SIGTERM and SIGINT end the step that is under way, and the checkpoint is of that very step."""
    report, _ = killed
    assert [stop["code"] for stop in report["stops"]] == [3, 3, 3]
    newest = [stop["newest"] for stop in report["stops"]]
    assert newest == [stop["reported"] for stop in report["stops"]]
    assert newest == sorted(set(newest))
    assert any(step % 4 for step in newest), "only where a checkpoint was due"


# --- in one process: every variant of a run ---


def variant(name: str, text: Path) -> TrainConfig:
    config = tiny_run(text, steps=12, evaluate_every=5, checkpoint_every=3)
    striped = config.model.striped
    match name:
        case "bfloat16":
            return dataclasses.replace(config, precision="bfloat16")
        case "recomputed":
            return dataclasses.replace(config, checkpoint_activations=True)
        case "strands":
            data = DataConfig(files=config.data.files, held_out=0.1, format="fasta", reverse_complement=True)
            return dataclasses.replace(config, data=data, tokenizer={"type": "dna"})
        case "implicit":
            filter_ = ImplicitFilterConfig(max_length=40, width=8)
            return dataclasses.replace(config, model=ModelSpec(striped=dataclasses.replace(striped, filter=filter_)))
        case "stored-rope":
            from crocuta.presets import preset

            return dataclasses.replace(config, model=ModelSpec(config=preset("tiny-evo2")))
    raise AssertionError(name)


def stop_at(step: int, number: int = signal.SIGTERM):
    """Patches the loop so that the signal arrives while the batch of ``step`` is being read."""
    original = loop._Trainer._batch

    def batch(self, micro):
        if self.progress.step == step and micro == 0:
            signal.raise_signal(number)
        return original(self, micro)

    return batch


@pytest.mark.parametrize("name", ["bfloat16", "recomputed", "strands", "implicit", "stored-rope"])
def test_every_variant_resumes_to_the_same_bits(name, tmp_path, monkeypatch):
    if name == "strands":
        text = tmp_path / "genome.fa"
        letters = "".join("ACGT"[b % 4] for b in write_text(tmp_path / "text").read_bytes())
        text.write_text(f">a\n{letters}\n")
    else:
        text = write_text(tmp_path / "text.txt")
    config = variant(name, text)
    whole = train(config, tmp_path / "whole")
    assert whole.finished
    for step in (4, 7):
        with monkeypatch.context() as patch:
            patch.setattr(loop._Trainer, "_batch", stop_at(step))
            outcome = train(config, tmp_path / "cut", resume=step > 4)
        assert (outcome.finished, outcome.step) == (False, step + 1)
    resumed = train(config, tmp_path / "cut", resume=True)
    assert (resumed.finished, resumed.step) == (True, 12)
    for (key, tensor), other in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), key
    weights = "model.safetensors"
    assert (tmp_path / "cut" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
    assert metrics_of(tmp_path / "cut") == metrics_of(tmp_path / "whole")
    assert whole.held_out == resumed.held_out


@pytest.mark.parametrize("forgotten", ["random", "optimizer"])
def test_bits_depend_on_all_that_a_checkpoint_holds(forgotten, tmp_path, monkeypatch):
    """The control: without the generator's state, or AdamW's, the resumed run is another one."""
    config = tiny_run(write_text(tmp_path / "text.txt"), steps=10)
    train(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(loop._Trainer, "_batch", stop_at(4))
        train(config, tmp_path / "cut")
        patch.setattr(loop, "_set_random_state" if forgotten == "random" else "load_optimizer_tensors", lambda *_: None)
        patch.setattr(loop._Trainer, "_batch", stop_at(-1))
        train(config, tmp_path / "cut", resume=True)
    weights = "model.safetensors"
    assert (tmp_path / "cut" / weights).read_bytes() != (tmp_path / "whole" / weights).read_bytes()


def test_a_second_signal_acts_at_once(tmp_path, monkeypatch):
    config = tiny_run(write_text(tmp_path / "text.txt"))
    original = loop._Trainer._batch

    def batch(self, micro):
        if self.progress.step == 5 and micro == 0:
            first = signal.getsignal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            while signal.getsignal(signal.SIGINT) == first:
                pass  # Python handles signals between two steps of its own, and two that come between as one
            signal.raise_signal(signal.SIGINT)
        return original(self, micro)

    monkeypatch.setattr(loop._Trainer, "_batch", batch)
    former = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it from birth
    try:
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "run")
    finally:
        signal.signal(signal.SIGINT, former)
    assert read_latest(tmp_path / "run" / "checkpoints").step == 4
    monkeypatch.undo()
    assert train(config, tmp_path / "run", resume=True).finished, "the folder's lock was not let go"


def test_handlers_of_signals_are_given_back(tmp_path):
    def mine(number, frame):
        raise AssertionError

    former = signal.signal(signal.SIGTERM, mine)
    try:
        train(tiny_run(write_text(tmp_path / "text.txt"), steps=2), tmp_path / "run")
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, former)


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    config = tiny_run(write_text(tmp_path / "text.txt"), steps=8)  # a checkpoint is due at its last step
    train(config, tmp_path / "run")
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    lines = metrics_of(tmp_path / "run")
    assert train(config, tmp_path / "run", resume=True).finished
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before
    assert metrics_of(tmp_path / "run") == lines


# --- what cannot be resumed or started ---


def test_a_run_of_another_configuration(tmp_path):
    config = tiny_run(write_text(tmp_path / "text.txt"), steps=4)
    train(config, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"run was started with another configuration: expected .*train\.json"):
        train(dataclasses.replace(config, seed=4), tmp_path / "run", resume=True)


def test_no_run_at_all(tmp_path):
    config = tiny_run(write_text(tmp_path / "text.txt"))
    with pytest.raises(InputError, match=r"there is no run to resume in .*run; start one without --resume"):
        train(config, tmp_path / "run", resume=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", ["", "{", "\udcff"])
def test_a_damaged_train_json(tmp_path, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "train.json").write_text(content, errors="surrogateescape")
    with pytest.raises(ConfigError, match=r"train\.json cannot be read: got .*; start a new run"):
        train(tiny_run(write_text(tmp_path / "text.txt")), tmp_path / "run", resume=True)


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    text = write_text(tmp_path.with_name("text.txt"))
    with pytest.raises(InputError, match=r"is not empty: expected a new folder; choose another, or --resume"):
        train(tiny_run(text), tmp_path)
    with pytest.raises(InputError, match="is not empty"):
        train(tiny_run(text), tmp_path / "thesis.txt")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_run_that_cannot_start_leaves_nothing_behind(tmp_path):
    config = tiny_run(tmp_path / "missing.txt")
    for _ in range(2):
        with pytest.raises(InputError, match=r"missing\.txt"):
            train(config, tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_what_a_kill_left_of_the_configuration_goes(tmp_path):
    config, left = tiny_run(write_text(tmp_path / "text.txt"), steps=1), tmp_path / "run" / ".tmp-train.json-1-a"
    left.parent.mkdir()
    left.write_text("{")
    assert train(config, tmp_path / "run").finished
    assert not left.exists()


def test_two_trainers_do_not_share_a_folder(tmp_path):
    config = tiny_run(write_text(tmp_path / "text.txt"), steps=4)
    train(config, tmp_path / "run")
    before = metrics_of(tmp_path / "run")
    with (
        TrainingCheckpoints(tmp_path / "run" / "checkpoints"),
        pytest.raises(CheckpointError, match="in use by another trainer"),
    ):
        train(config, tmp_path / "run", resume=True)
    assert metrics_of(tmp_path / "run") == before


def test_a_checkpoint_of_another_model(tmp_path):
    """The configuration file was edited by hand to fit, and does not."""
    config = tiny_run(write_text(tmp_path / "text.txt"), steps=4)
    train(config, tmp_path / "run")
    striped = config.model.striped
    assert isinstance(striped.filter, ComplexModalFilterConfig)
    other = dataclasses.replace(config, model=ModelSpec(striped=StripedSpec(**{**vars(striped), "num_layers": 3})))
    (tmp_path / "run" / "train.json").write_text(json.dumps(loop.encode(other)))
    with pytest.raises(CheckpointError, match=r"step-00000004 holds another model; resume with the configuration"):
        train(other, tmp_path / "run", resume=True)
