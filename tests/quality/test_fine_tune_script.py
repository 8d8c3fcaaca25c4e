"""The measurement of what pretraining is worth runs, keeps the test stretch apart, and fails if there is no gain."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from crocuta.data.splits import ColumnSplits, read_splits
from crocuta.training.task_metrics import ClassificationMetrics

SCRIPT = Path(__file__).resolve().parents[2] / "quality" / "fine_tune.py"


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("quality_fine_tune", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_a_smoke_run_prints_both_starts_with_their_seeds(script, monkeypatch, capsys, tmp_path):
    output = tmp_path / "result.json"
    monkeypatch.setattr(sys, "argv", ["fine_tune.py", "--smoke", "--seeds", "4", "--output", str(output)])
    assert script.main() == 0
    printed = capsys.readouterr().out.splitlines()
    value = json.loads(output.read_text())
    rows = {line.split()[0]: line.split() for line in printed}
    for run in value["runs"]:
        assert rows[run["start"]][1] == str(run["seed"]) == "4"
        assert rows[run["start"]][4] == f"{run['test_mcc']:.3f}"
        assert value["mean_test_mcc"][run["start"]] == run["test_mcc"]
    assert [run["start"] for run in value["runs"]] == ["pretrained", "scratch"]
    assert printed[-1].startswith("test MCC, mean over seeds 4: pretrained ")


def test_pretraining_sees_the_training_stretch_alone(script, monkeypatch, tmp_path):
    outcome = SimpleNamespace(held_out=SimpleNamespace(bits_per_token=1.9))
    monkeypatch.setattr(script, "train", lambda config, folder: outcome)
    assert script.pretrain(script.SMOKE, tmp_path, 0)[1] == 1.9
    bases = "".join((tmp_path / "stretch.fa").read_text().split("\n")[1:])
    assert len(bases) == 500_000
    splits = read_splits(ColumnSplits(files=(str(script.EXAMPLES / "ecoli_genes.tsv.gz"),)), "class")
    assert all(example.sequence in bases for example in splits.train)
    assert not any(example.sequence in bases for name in ("validation", "test") for example in splits[name])


@pytest.mark.parametrize(("gain", "code"), [(0.1, 0), (0.0, 1), (-0.1, 1)])
def test_without_a_gain_it_fails(script, monkeypatch, capsys, gain, code):
    def arm(sizes, start, model, seed, folder):
        figure = 0.5 + (gain if start == "pretrained" else 0)
        return script.Arm(start, seed, 0.001, 0.5, figure, 0.5, 1, 1.0)

    monkeypatch.setattr(script, "pretrain", lambda sizes, folder, seed: (script.ModelSpec(load="x"), 1.9))
    monkeypatch.setattr(script, "tune", arm)
    monkeypatch.setattr(sys, "argv", ["fine_tune.py"])
    assert script.main() == code
    assert "mean over seeds 0, 1, 2" in capsys.readouterr().out


def test_the_rate_is_chosen_by_validation_whatever_the_test_says(script, monkeypatch, tmp_path):
    figures = {1e-3: (0.4, 0.9), 3e-3: (0.6, 0.2)}  # validation, test

    def run(config, folder):
        validation, test = (
            ClassificationMetrics(count=1, loss=1.0, accuracy=0.5, f1=0.5, mcc=mcc, auroc=None)
            for mcc in figures[config.optimizer.learning_rate]
        )
        return script.FineTuneOutcome(
            validation=validation,
            test=test,
            step=1,
            steps=1,
            stopped_early=False,
            examples={},
            parameters=1,
            trained_parameters=1,
            labels=None,
            encoder=None,
            tokenizer=None,
            config=config,
        )

    monkeypatch.setattr(script, "fine_tune", run)
    sizes = dataclasses.replace(script.SMOKE, rates=(1e-3, 3e-3))
    arm = script.tune(sizes, "scratch", script.ModelSpec(preset="tiny-modal"), 0, tmp_path)
    assert (arm.learning_rate, arm.validation_mcc, arm.test_mcc) == (3e-3, 0.6, 0.2)
