"""What stops a fine-tune, and what it leaves behind then: one clear error, and nothing that looks finished."""

from __future__ import annotations

import json
import math

import pytest
import torch
from labelled_files import events, three_files, tiny_fine_tune, write_examples
from tiny_run import PIECES

import crocuta.training.finetune as finetune
from crocuta.data.splits import FileSplits
from crocuta.errors import ConfigError, InputError, NonFiniteError
from crocuta.schema import decode, encode
from crocuta.training.config import ModelSpec
from crocuta.training.finetune import fine_tune
from crocuta.training.finetune_config import (
    ClassificationTask,
    FineTuneConfig,
    LabelledDataConfig,
    LoRATuning,
    TokenClassificationTask,
)


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    return write_examples(tmp_path_factory.mktemp("classes"), "class")


def test_updates_that_are_not_finite_are_skipped_and_then_end_the_run(classes, tmp_path, monkeypatch):
    count, real = [0], finetune.task_loss

    def loss(outputs, targets):
        count[0] += 1
        return real(outputs, targets) * (math.nan if count[0] == 2 else 1)

    monkeypatch.setattr(finetune, "task_loss", loss)
    outcome = fine_tune(tiny_fine_tune(classes, epochs=1), tmp_path / "one")
    assert [line["step"] for line in events(tmp_path / "one", "skipped")] == [2]
    assert all(torch.isfinite(p).all() for p in outcome.encoder.parameters())
    monkeypatch.setattr(finetune, "task_loss", lambda outputs, targets: real(outputs, targets) * math.inf)
    with pytest.raises(NonFiniteError, match="10 updates in a row were not finite, up to step 10"):
        fine_tune(tiny_fine_tune(classes), tmp_path / "all")
    assert not (tmp_path / "all" / "result.json").exists()


def test_a_metric_that_validation_cannot_give_is_an_error(tmp_path):
    data = three_files(tmp_path)
    path = data.splits.validation[0]
    lines = open(path).read().splitlines()  # noqa: SIM115
    with open(path, "w") as stream:
        stream.write("\n".join([lines[0], *(line for line in lines if line.endswith("rich"))]) + "\n")
    config = tiny_fine_tune("", data=data, task=ClassificationTask(metric="auroc"))
    with pytest.raises(InputError, match="the validation split has no auroc: got no AUROC: no example of 'poor'"):
        fine_tune(config, tmp_path / "run")


def test_a_run_that_cannot_start_leaves_nothing_behind(classes, tmp_path):
    task = ClassificationTask(positive="unknown")
    for changes in ({"task": task}, {"tokenizer": {"type": "dna"}, "model": ModelSpec(load=str(tmp_path / "none"))}):
        with pytest.raises((InputError, ConfigError)):
            fine_tune(tiny_fine_tune(classes, **changes), tmp_path / "run")
        assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes").write_text("mine")
    with pytest.raises(InputError, match="is not empty"):
        fine_tune(tiny_fine_tune(classes), tmp_path / "run")


@pytest.mark.parametrize("strands", ["augment", "shared"])
def test_strands_need_nucleotides(tmp_path, strands):
    (tmp_path / "tokenizer.json").write_text(PIECES)
    (tmp_path / "x.tsv").write_text("sequence\tlabel\nwhale\ta\nship\tb\n")
    splits = FileSplits(train=(str(tmp_path / "x.tsv"),), validation=(str(tmp_path / "x.tsv"),))
    data = LabelledDataConfig(splits=splits, allow_shared=True)
    tokenizer = {"type": "pieces", "file": str(tmp_path / "tokenizer.json")}
    config = tiny_fine_tune("", data=data, tokenizer=tokenizer, reverse_complement=strands)
    with pytest.raises(ConfigError, match="needs a tokenizer of nucleotides"):
        fine_tune(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"epochs": 0}, "epochs must be positive"),
        ({"batch_size": 0}, "batch_size must be positive"),
        ({"patience": 0}, "patience must be positive"),
        ({"evaluate_every": 0}, "evaluate_every must be positive"),
        ({"head_learning_rate": 0.0}, "head_learning_rate must be positive"),
        ({"dropout": 1.0}, "dropout is impossible"),
        ({"task": ClassificationTask(dropout=-0.1)}, r"task\.dropout is impossible"),
        ({"seed": -1}, "seed is impossible"),
    ],
)
def test_impossible_descriptions(changes, reason):
    with pytest.raises(ConfigError, match=reason):
        tiny_fine_tune("x.tsv", **changes)


def test_a_description_survives_json():
    config = tiny_fine_tune("x.tsv", tuning=LoRATuning(rank=3), task=TokenClassificationTask(metric="f1"))
    assert decode(FineTuneConfig, json.loads(json.dumps(encode(config)))) == config


def test_nothing_of_an_interrupted_run_looks_finished(classes, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "task_loss", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        fine_tune(tiny_fine_tune(classes), tmp_path / "run")
    assert not (tmp_path / "run" / "result.json").exists()
