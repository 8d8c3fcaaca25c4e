"""A fine-tune learns each of its tasks, and nothing but the validation split decides anything."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from labelled_files import events, labels_of, same, sequences, three_files, tiny_fine_tune, weights, write_examples

import crocuta.training.finetune as finetune
from crocuta.checkpoints.load import load_encoder
from crocuta.data.label_map import LabelMap
from crocuta.schema import decode
from crocuta.tokenizers.dna import DNATokenizer
from crocuta.training.finetune import fine_tune
from crocuta.training.finetune_config import ClassificationTask, FineTuneConfig, RegressionTask, TokenClassificationTask
from crocuta.training.finetune_report import report
from crocuta.training.task_data import Row
from crocuta.training.task_evaluate import predict
from crocuta.training.task_metrics import ClassificationMetrics


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    return write_examples(tmp_path_factory.mktemp("classes"), "class")


@pytest.fixture(scope="module")
def finished(classes, tmp_path_factory):
    """A run on classes from scratch."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    return folder, fine_tune(tiny_fine_tune(classes, epochs=6), folder)


# --- the three tasks ---


def test_classes_are_learned_and_everything_is_left_in_the_folder(finished):
    folder, outcome = finished
    assert outcome.test.accuracy > 0.8
    assert outcome.test.auroc > 0.9
    assert outcome.labels.names == ("poor", "rich")
    assert LabelMap.load(folder) == outcome.labels
    result = json.loads((folder / "result.json").read_text())
    assert result["validation"] == json.loads(json.dumps(dataclasses.asdict(outcome.validation)))
    assert result["test"] == json.loads(json.dumps(dataclasses.asdict(outcome.test)))
    assert (result["seed"], result["metric"], result["task"]) == (1, "mcc", "classification")
    assert result["labels"] == ["poor", "rich"]
    assert sum(result["examples"].values()) == 120
    assert result["parameters"] == result["trained_parameters"] == sum(p.numel() for p in outcome.encoder.parameters())
    assert decode(FineTuneConfig, json.loads((folder / "fine_tune.json").read_text())) == outcome.config
    steps = [line["step"] for line in events(folder, "train")]
    assert steps == list(range(1, outcome.steps + 1))
    assert len(events(folder, "test")) == 1
    best = max(events(folder, "validation"), key=lambda line: line["mcc"])
    assert (best["step"], best["mcc"]) == (outcome.step, outcome.validation.mcc)


def test_what_is_saved_is_what_was_measured(finished):
    folder, outcome = finished
    encoder, tokenizer = load_encoder(folder)
    assert tokenizer == outcome.tokenizer == DNATokenizer()
    assert same(weights(encoder), weights(outcome.encoder))
    row = Row(torch.from_numpy(tokenizer.encode("ACGTTAGC")), torch.tensor(0))
    assert torch.equal(predict(encoder, [row])[0], predict(outcome.encoder, [row])[0])


def test_the_positive_label_is_a_choice(finished, classes, tmp_path):
    outcome = fine_tune(tiny_fine_tune(classes, epochs=6, task=ClassificationTask(positive="poor")), tmp_path / "run")
    assert outcome.validation.mcc == finished[1].validation.mcc
    assert outcome.test.f1 != finished[1].test.f1


def test_tokens_are_learned(tmp_path):
    path = write_examples(tmp_path, "tokens", "jsonl")
    outcome = fine_tune(tiny_fine_tune(path, task=TokenClassificationTask(dropout=0.0)), tmp_path / "run")
    assert outcome.test.accuracy > 0.95
    rows = sequences()
    assert sum(len(s) for s, _ in rows) > outcome.test.count + outcome.validation.count > 24 * 12


def test_targets_are_learned_and_given_in_their_own_units(tmp_path):
    path = write_examples(tmp_path, "numbers", "fasta")
    config = tiny_fine_tune(path, task=RegressionTask(dropout=0.0), epochs=12)
    outcome = fine_tune(config, tmp_path / "run")
    assert outcome.labels is None
    assert not (tmp_path / "run" / "labels.json").exists()
    assert outcome.test.r2 > 0.5
    assert outcome.test.mse < 200  # of a target with a variance of some 700 and one of 0.07, averaged
    sequence = sequences()[0][0]
    row = Row(torch.from_numpy(DNATokenizer().encode(sequence)), torch.zeros(2))
    percent, number = predict(outcome.encoder, [row])[0].tolist()
    assert percent == pytest.approx(labels_of("numbers", sequence, True)[0], abs=30)
    assert number == pytest.approx(labels_of("numbers", sequence, True)[1], abs=0.3)
    looked = [line["mse"] for line in events(tmp_path / "run", "validation")]
    assert min(looked) == pytest.approx(outcome.validation.mse, rel=1e-5)  # standardised or folded, the same numbers


# --- what decides ---


def test_two_runs_are_the_same_bits_and_another_seed_is_not(finished, classes, tmp_path):
    folder, outcome = finished
    torch.manual_seed(99)
    again = fine_tune(tiny_fine_tune(classes, epochs=6), tmp_path / "again")
    assert same(weights(outcome.encoder), weights(again.encoder))
    assert (folder / "result.json").read_bytes() == (tmp_path / "again" / "result.json").read_bytes()
    other = fine_tune(tiny_fine_tune(classes, epochs=6, seed=2), tmp_path / "other")
    assert not same(weights(outcome.encoder), weights(other.encoder))


def test_the_test_split_decides_nothing(tmp_path):
    """With every test label turned round, all that is saved and all validation figures are the same bits."""
    runs = {}
    for name, labels in (("right", None), ("wrong", {"rich": "poor", "poor": "rich"})):
        (tmp_path / name).mkdir()
        config = tiny_fine_tune("", data=three_files(tmp_path / name, labels))
        runs[name] = fine_tune(config, tmp_path / name / "run")
    assert same(weights(runs["right"].encoder), weights(runs["wrong"].encoder))
    assert runs["right"].validation == runs["wrong"].validation
    assert runs["right"].test.accuracy == pytest.approx(1 - runs["wrong"].test.accuracy)


def test_the_test_split_is_looked_at_once_and_after_saving(classes, tmp_path, monkeypatch):
    seen, measure, write = [], finetune.measure, finetune.save

    def watched(encoder, rows, *arguments, **options):
        seen.append(len(rows))
        return measure(encoder, rows, *arguments, **options)

    monkeypatch.setattr(finetune, "measure", watched)
    monkeypatch.setattr(finetune, "save", lambda *arguments: (seen.append("saved"), write(*arguments)))
    outcome = fine_tune(tiny_fine_tune(classes), tmp_path / "run")
    validation, test = outcome.examples["validation"], outcome.examples["test"]
    assert validation != test
    assert seen == [validation] * 3 + ["saved", validation, test]


def test_without_a_test_split_there_is_no_test_figure(tmp_path):
    data = three_files(tmp_path)
    data = dataclasses.replace(data, splits=dataclasses.replace(data.splits, test=()))
    outcome = fine_tune(tiny_fine_tune("", data=data, epochs=1), tmp_path / "run")
    assert outcome.test is None
    assert json.loads((tmp_path / "run" / "result.json").read_text())["test"] is None


def scripted(monkeypatch, values, metric="mcc"):
    """Validation figures as given, whatever the model does; returns the weights at each look."""
    looks, figures = [], iter(values)

    def look(encoder, rows, *arguments, **options):
        looks.append(weights(encoder))
        return ClassificationMetrics(count=1, **{"loss": 1.0, "accuracy": 0, "f1": 0, "mcc": 0, "auroc": 0.5} | {
            metric: next(figures, 0)
        })  # fmt: skip

    monkeypatch.setattr(finetune, "measure", look)
    return looks


@pytest.mark.parametrize(("metric", "sign"), [("mcc", 1), ("loss", -1)])
def test_the_best_weights_come_back_and_patience_ends_the_run(classes, tmp_path, monkeypatch, metric, sign):
    looks = scripted(monkeypatch, [sign * v for v in (0.1, 0.3, 0.2, 0.5, 0.5, 0.4)], metric)
    config = tiny_fine_tune(classes, task=ClassificationTask(metric=metric), evaluate_every=2, patience=2)
    outcome = fine_tune(config, tmp_path / "run")
    assert (outcome.step, outcome.steps, outcome.stopped_early) == (8, 12, True)
    assert len(looks) == 6 + 2  # and validation and test at the end
    assert same(weights(outcome.encoder), looks[3])
    assert not same(looks[3], looks[5])


def test_the_last_update_is_looked_at_even_between_two_looks(classes, tmp_path, monkeypatch):
    looks = scripted(monkeypatch, [0.1, 0.2, 0.3])
    outcome = fine_tune(tiny_fine_tune(classes, epochs=1, evaluate_every=3), tmp_path / "run")
    assert outcome.steps % 3 != 0
    assert (outcome.step, outcome.stopped_early, len(looks) - 2) == (outcome.steps, False, outcome.steps // 3 + 1)


# --- the report ---


def test_the_report_says_what_is_missing_and_why(finished):
    absent = dataclasses.replace(finished[1].test, auroc=None, notes=("no AUROC: no example of 'rich' in this split",))
    lines = report(dataclasses.replace(finished[1], test=absent, stopped_early=True)).splitlines()
    rows = {line[:22].strip(): line[22:].split() for line in lines}
    assert rows["AUROC"][1] == "-"
    assert rows["examples"] == [str(finished[1].validation.count), str(absent.count)]
    assert "test: no AUROC: no example of 'rich' in this split" in lines
    assert f"stopped after {finished[1].steps}, chosen by validation mcc." in lines[-3]
