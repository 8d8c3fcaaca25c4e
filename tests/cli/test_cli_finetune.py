"""``crocuta train`` on labelled data: each head from each format, its report, and what may be removed."""

import contextlib
import io
import json
import logging

import pytest
import yaml
from labelled_files import SPEC, write_examples

from crocuta.checkpoints.native import save
from crocuta.cli.app import app
from crocuta.cli.train import remove_run
from crocuta.errors import CrocutaError, InputError
from crocuta.schema import encode
from crocuta.training.config import ModelSpec, TrainConfig
from crocuta.training.finetune_config import FineTuneConfig, RegressionTask
from crocuta.training.models import model_of
from crocuta.training.recipes import read_recipe

HEADS = {
    ("classification", "tsv"): ("class", "accuracy"),
    ("token-classification", "jsonl"): ("tokens", "accuracy"),
    ("regression", "fasta"): ("numbers", "R2"),
}


def recipe(folder, kind, form, task, **changes):
    """A description beside its data."""
    write_examples(folder, kind, form)
    value = {
        "task": {"type": task},
        "model": {"striped": encode(SPEC)},
        "tokenizer": {"type": "dna"},
        "data": {"splits": {"type": "fractions", "files": [f"{kind}.{form}"], "validation": 0.2, "test": 0.2}},
        "optimizer": {"learning_rate": 0.01, "warmup_steps": 5},
        "batch_size": 8,
        "epochs": 2,
        "threads": 1,
        "seed": 3,
    }
    value["data"].update(changes.pop("data", {}))
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(value | changes))
    return path


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A pretrained model fine-tuned by the command: the folder, the recipe and what was printed."""
    folder, out = tmp_path_factory.mktemp("tuned"), io.StringIO()
    save(*model_of(ModelSpec(striped=SPEC), {"type": "dna"}, seed=7), folder / "pretrained")
    changes = {"model": {"load": "pretrained"}, "tuning": {"type": "lora", "rank": 2}}
    path = recipe(folder, "class", "tsv", "classification", **changes)
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(io.StringIO()) as err,
        pytest.raises(SystemExit) as e,
    ):
        app(["train", str(path), "--output", str(folder / "run")])
    assert e.value.code == 0, err.getvalue()
    logging.getLogger("crocuta").handlers = []
    return folder / "run", path, out.getvalue(), err.getvalue()


@pytest.mark.parametrize(("task", "form"), HEADS)
def test_each_head_from_each_format(run, tmp_path, task, form):
    kind, figure = HEADS[task, form]
    done = run("train", recipe(tmp_path, kind, form, task), "--output", tmp_path / "run")
    assert done.code == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["task"] == task
    assert result["test"]["count"] > 0
    lines = {line[:22].strip(): line[22:].split() for line in done.out.splitlines()}
    assert done.out.splitlines()[0].split() == ["validation", "test"]
    name = {"accuracy": "accuracy", "R2": "r2"}[figure]
    assert lines[figure] == [f"{result[split][name]:.4f}" for split in ("validation", "test")]
    assert "Seed 3; weights of step" in done.out
    assert "The test split decided nothing" in done.out
    assert (tmp_path / "run" / "labels.json").exists() == (kind != "numbers")
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_a_pretrained_model_with_adapters(tuned):
    folder, _, out, err = tuned
    result = json.loads((folder / "result.json").read_text())
    assert result["trained_parameters"] < result["parameters"]
    assert f"training {result['trained_parameters']:,} of" in err
    assert "validation mcc" in err  # progress goes to standard error
    assert "Labels: poor, rich" in out
    assert (folder / "adapter.safetensors").exists()


def test_columns_and_splits_of_a_file(run, tmp_path):
    rows = ["name\tdna\tclass\tpart"]
    for index in range(40):
        part = ("train", "validation", "test")[min(index // 16, 2)]
        rows.append(f"s{index}\t{'ACGT'[index % 4] * 3}{'AC' * index}\t{'ab'[index % 2]}\t{part}")
    (tmp_path / "x.tsv").write_text("\n".join(rows) + "\n")
    names = {"sequence": "dna", "label": "class", "id": "name", "split": "part"}
    data = {"splits": {"type": "column", "files": ["x.tsv"]}, "format": names}
    path = recipe(tmp_path, "class", "tsv", "classification", data=data)
    done = run("train", path, "epochs=1", "--output", tmp_path / "run")
    assert done.code == 0, done.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["examples"] == {
        "train": 16,
        "validation": 16,
        "test": 8,
    }


def test_without_a_test_split_it_is_said(run, tmp_path):
    write_examples(tmp_path, "class")
    lines = (tmp_path / "class.tsv").read_text().splitlines()
    for name, part in (("a", lines[1:80]), ("b", lines[80:])):
        (tmp_path / f"{name}.tsv").write_text("\n".join([lines[0], *part]))
    data = {"splits": {"type": "files", "train": ["a.tsv"], "validation": ["b.tsv"]}}
    done = run("train", recipe(tmp_path, "class", "tsv", "classification", data=data), "-o", tmp_path / "run")
    assert done.code == 0, done.stderr
    assert done.out.splitlines()[0].split() == ["validation"]
    assert "There is no test split" in done.out


# --- descriptions ---


def test_both_kinds_of_description_are_read(tmp_path):
    (tmp_path / "run.yaml").write_text("model: {preset: tiny-modal}\ndata: {files: [a.txt]}\n")
    assert isinstance(read_recipe(tmp_path / "run.yaml"), TrainConfig)
    path = recipe(tmp_path, "numbers", "jsonl", "regression", model={"load": "m"}, tokenizer={"type": "bytes"})
    found = read_recipe(path, ["task.metric=spearman", "epochs=9"])
    assert isinstance(found, FineTuneConfig)
    assert found.task == RegressionTask(metric="spearman")
    assert found.epochs == 9


def test_paths_are_relative_to_the_file(tmp_path):
    splits = {"type": "files", "train": ["a.fa"], "validation": ["sub/b.fa"], "test": [str(tmp_path / "c.fa")]}
    data = {"splits": splits, "format": {"table": "labels.tsv"}}
    found = read_recipe(recipe(tmp_path, "class", "tsv", "classification", data=data, model={"load": "model"}))
    assert found.data.splits.train == (str(tmp_path / "a.fa"),)
    assert found.data.splits.validation == (str(tmp_path / "sub" / "b.fa"),)
    assert found.data.splits.test == (str(tmp_path / "c.fa"),)
    assert found.data.format.table == str(tmp_path / "labels.tsv")
    assert found.model.load == str(tmp_path / "model")


def test_print_config(run, tmp_path):
    path = recipe(tmp_path, "class", "tsv", "classification")
    done = run("train", path, "seed=8", "--print-config")
    assert yaml.safe_load(done.out) == json.loads(json.dumps(encode(read_recipe(path, ["seed=8"]))))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.metric=mse", "task.metric has an unknown value: got 'mse'"),
        ("task.type=clasification", "task.type names no known kind"),
        ("data.splits.type=random", "data.splits.type names no known kind"),
        ("tuning.type=lorra", "tuning.type names no known kind"),
        ("steps=5", "unknown field 'steps'"),
        ("data.format.pattern=(", "no regular expression"),
    ],
)
def test_wrong_descriptions_are_one_line(run, tmp_path, override, message):
    done = run("train", recipe(tmp_path, "class", "tsv", "classification"), override, "-o", tmp_path / "run")
    assert done.code == 1
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


# --- folders ---


def test_a_fine_tune_is_not_resumed(run, tuned):
    folder, path, *_ = tuned
    done = run("train", path, "-o", folder, "--resume")
    assert done.code == 2
    assert "a fine-tune cannot be resumed" in done.stderr


def test_overwriting(run, tuned, tmp_path):
    folder, path, *_ = tuned
    done = run("train", path, "-o", folder)
    assert done.code == 1
    assert "is not empty" in done.stderr
    before = (folder / "result.json").read_bytes()
    done = run("train", path, 'data.splits.files=["none.tsv"]', "-o", folder, "--overwrite")
    assert done.code == 1
    assert "there is no such data file: got none.tsv" in done.stderr
    assert (folder / "result.json").read_bytes() == before  # a typo removes nothing
    done = run("train", path, "-o", folder, "--overwrite")
    assert done.code == 0, done.stderr
    assert (folder / "result.json").read_bytes() == before


def test_only_a_run_is_overwritten(tmp_path):
    (tmp_path / "fine_tune.json").write_text('{"task": 1}')
    with pytest.raises(InputError, match="will not be overwritten"):
        remove_run(tmp_path)
    assert (tmp_path / "fine_tune.json").exists()


def test_bad_data_is_one_error_and_leaves_nothing(run, tmp_path):
    path = recipe(tmp_path, "class", "tsv", "classification")
    (tmp_path / "class.tsv").write_text("sequence\tlabel\nACGT\n")
    done = run("train", path, "-o", tmp_path / "run")
    assert done.code == 1
    assert f"{tmp_path / 'class.tsv'}:2: the row has another width" in done.stderr
    assert not (tmp_path / "run").exists()
    with pytest.raises(CrocutaError):
        read_recipe(tmp_path / "none.yaml")
