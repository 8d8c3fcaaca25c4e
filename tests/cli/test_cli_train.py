"""``crocuta train``: from a file to a run folder, its report, and what may be resumed or removed."""

import builtins
import contextlib
import io
import json
import logging
import os
import shutil
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from matplotlib.image import imread

import crocuta
from crocuta.cli.app import app
from crocuta.cli.train import remove_run
from crocuta.data.windows import TokenSource
from crocuta.errors import CheckpointError, InputError
from crocuta.schema import encode
from crocuta.tokenizers.bytes import ByteTokenizer
from crocuta.tokenizers.dna import DNATokenizer
from crocuta.training.baselines import Baseline, baselines
from crocuta.training.checkpoint import TrainingCheckpoints
from crocuta.training.config import DataConfig, ModelSpec, TrainConfig
from crocuta.training.evaluate import HeldOut
from crocuta.training.finish import Summary, finish
from crocuta.training.loop import Outcome
from crocuta.training.recipes import read_train_config

TEXT = "It was the best of times, it was the worst of times. " * 40


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "text.txt").write_text(TEXT)
    value = {
        "model": {"preset": "tiny-modal"},
        "data": {"files": ["text.txt"], "held_out": 0.2},
        "length": 32,
        "batch_size": 2,
        "steps": 5,
        "evaluate_every": 2,
        "checkpoint_every": 3,
        "log_every": 1,
        "baselines": "text",
        "sample": {"prompt": "It was", "tokens": 8},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(value))
    return path


@pytest.fixture(scope="module")
def trained(recipe):
    """A run of five steps, and what the command printed."""
    folder, out, err = recipe.parent / "run", io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as exit_:
        app(["train", str(recipe), "--output", str(folder)])
    assert exit_.value.code == 0, err.getvalue()
    logging.getLogger("crocuta").handlers = []
    return folder, SimpleNamespace(out=out.getvalue(), stderr=err.getvalue())


@pytest.fixture
def finished(trained, tmp_path):
    """A copy of that run."""
    shutil.copytree(trained[0], tmp_path / "run")
    return tmp_path / "run", trained[1]


# --- the run ---


def test_a_run_leaves_a_model_and_a_report(finished) -> None:
    folder, done = finished
    assert {"train.json", "metrics.jsonl", "config.json", "model.safetensors", "comparison.json", "loss.png"} <= {
        path.name for path in folder.iterdir()
    }
    assert imread(folder / "loss.png").shape[1] > 500
    sample = (folder / "samples" / "step-5.txt").read_text()
    assert sample.startswith("It was")
    assert len(sample) > len("It was\n")
    assert done.out.startswith(sample)
    assert "> this model" in done.out
    assert "lzma -9e alone" in done.out
    assert "this model" not in done.stderr
    assert "5/5" in done.stderr  # progress
    model, tokenizer = crocuta.load(folder)
    assert crocuta.generate(model, tokenizer, ["It"], max_tokens=3)


def test_the_comparison_is_of_the_same_split(finished) -> None:
    folder, done = finished
    value = json.loads((folder / "comparison.json").read_text())
    ids = np.frombuffer(TEXT.encode() + b"\0", np.uint8).astype(np.int64)
    cut = round(len(ids) * 0.8)
    expected = baselines(ids[:cut], ids[cut:], 256, 5, contiguous=True)
    assert value["baselines"] == {b.name: pytest.approx(b.bits_per_token) for b in expected}
    last = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][-1]
    assert last["event"] == "final"
    assert value["model"] == last["held_out_bits"]
    assert (value["unit"], value["step"]) == ("bits per byte", 5)
    best = min(expected, key=lambda b: b.bits_per_token)
    assert done.out.splitlines()[-1].startswith(f"The model does not beat every baseline: {value['model']:.3f} bits")
    assert f"{best.bits_per_token:.3f} of the best of them, {best.name}" in done.out


def test_overrides_and_printing_them(run, recipe, tmp_path) -> None:
    arguments = ("train", recipe, "steps=9", "optimizer.learning_rate=0.01", "--print-config")
    done = run(*arguments)
    assert yaml.safe_load(done.out) == json.loads(
        json.dumps(encode(read_train_config(recipe, ["steps=9", "optimizer.learning_rate=0.01"])))
    )
    assert list(tmp_path.iterdir()) == []
    # What is printed is itself a recipe.
    (tmp_path / "printed.yaml").write_text(done.out)
    assert run("train", tmp_path / "printed.yaml", "--print-config").out == done.out


def test_without_yaml_the_configuration_is_json(run, recipe, monkeypatch, tmp_path) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps(yaml.safe_load(recipe.read_text())))
    hide(monkeypatch, "yaml")
    assert json.loads(run("train", tmp_path / "recipe.json", "--print-config").out)["steps"] == 5


def hide(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """As if ``package`` were not installed."""
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.split(".")[0] == package:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", missing)


# --- folders that are there already ---


def test_another_run_is_refused_and_kept(run, recipe, finished) -> None:
    folder, _ = finished
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    done = run("train", recipe, "-o", folder)
    assert done.code == 1
    assert "is not empty" in done.stderr
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_resuming_gives_the_same_report(run, recipe, finished) -> None:
    folder, first = finished
    weights = (folder / "model.safetensors").read_bytes()
    done = run("train", recipe, "-o", folder, "--resume")
    assert done.code == 0, done.stderr
    assert "resumed from step-00000003" in done.stderr
    assert done.out == first.out
    assert (folder / "model.safetensors").read_bytes() == weights


def test_resuming_another_configuration_is_refused(run, recipe, finished) -> None:
    assert run("train", recipe, "seed=4", "-o", finished[0], "--resume").code == 1


def test_overwrite_starts_afresh(run, recipe, finished) -> None:
    folder, _ = finished
    (folder / "samples" / "old.txt").write_text("old")
    done = run("train", recipe, "steps=2", "-o", folder, "--overwrite")
    assert done.code == 0, done.stderr
    assert not (folder / "samples" / "old.txt").exists()
    assert sorted(path.name for path in (folder / "samples").iterdir()) == ["step-2.txt"]


def test_overwrite_needs_no_earlier_run(run, recipe, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    assert run("train", recipe, "steps=1", "-o", tmp_path / "empty", "--overwrite").code == 0
    assert run("train", recipe, "steps=1", "-o", tmp_path / "new", "--overwrite").code == 0


@pytest.mark.parametrize("text", [None, "[1, 2]", '{"data": "a data set"}', "not JSON"])
def test_only_a_run_is_ever_removed(run, recipe, tmp_path, text) -> None:
    folder = tmp_path / "precious"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    if text is not None:
        (folder / "train.json").write_text(text)
    done = run("train", recipe, "-o", folder, "--overwrite")
    assert done.code == 1
    assert "will not be overwritten" in done.stderr
    assert (folder / "thesis.txt").read_text() == "mine"


def test_a_missing_data_file_costs_no_earlier_run(run, recipe, finished) -> None:
    folder, _ = finished
    done = run("train", recipe, 'data.files=["absent.txt"]', "-o", folder, "--overwrite")
    assert (done.code, "absent.txt" in done.stderr) == (1, True)
    assert (folder / "model.safetensors").exists()


def test_what_a_link_in_a_run_points_to_stays(finished, tmp_path) -> None:
    folder, _ = finished
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("mine")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    remove_run(folder)
    assert list(folder.iterdir()) == []
    assert (tmp_path / "elsewhere" / "file").read_text() == "mine"


def test_a_run_in_progress_is_not_removed(finished) -> None:
    folder, _ = finished
    with TrainingCheckpoints(folder / "checkpoints"), pytest.raises(CheckpointError, match="in use"):
        remove_run(folder)
    assert (folder / "train.json").exists()


def test_a_file_is_not_a_run(tmp_path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="will not be overwritten"):
        remove_run(tmp_path / "file")


# --- the report ---


def test_a_signal_stops_the_run_and_the_shell_learns_of_it(run, recipe, tmp_path, monkeypatch) -> None:
    from crocuta.training import loop

    real, calls = loop.train_step, []

    def step(*arguments):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(loop, "train_step", step)
    done = run("train", recipe, "-o", tmp_path / "run")
    assert (done.code, done.out) == (130, "")
    assert "saved at step 2" in done.stderr
    assert run("train", recipe, "-o", tmp_path / "run", "--resume").code == 0


def test_without_matplotlib_there_is_no_plot_and_a_line_says_so(run, recipe, tmp_path, monkeypatch) -> None:
    hide(monkeypatch, "matplotlib")
    done = run("train", recipe, "steps=1", "-o", tmp_path / "run")
    assert done.code == 0
    assert not (tmp_path / "run" / "loss.png").exists()
    assert [line for line in done.stderr.splitlines() if "matplotlib" in line] == [
        "crocuta: no loss curve was drawn: plots need matplotlib; run: pip install crocuta[train]"
    ]


def test_a_bad_prompt_costs_no_comparison(run, recipe, tmp_path) -> None:
    (tmp_path / "dna.txt").write_text("ACGTTGCA" * 100)
    data = f'data.files=["{tmp_path / "dna.txt"}"]'
    arguments = (data, "tokenizer.type=dna", "tokenizer.unknown=error", "baselines=dna", "sample.prompt=Q", "steps=1")
    done = run("train", recipe, *arguments, "-o", tmp_path / "run")
    assert done.code == 0
    assert "no sample was generated" in done.stderr
    assert "Markov order 12" in done.out
    assert "bits per base" in done.out


def test_a_sample_fits_the_filters(run, recipe, tmp_path) -> None:
    arguments = ("model.preset=tiny-implicit", "sample.tokens=1000", "baselines=null", "steps=1")
    done = run("train", recipe, *arguments, "-o", tmp_path / "run")
    assert done.code == 0
    assert "no sample" not in done.stderr
    assert (tmp_path / "run" / "samples" / "step-1.txt").exists()
    assert done.out.splitlines()[-1].startswith("Held-out: ")
    assert not (tmp_path / "run" / "comparison.json").exists()


def summary(bits: float) -> Summary:
    theirs = (Baseline("n-gram order 3", 2.5), Baseline("n-gram order 5", 2.0), Baseline("lzma -9e alone", 4.0))
    return Summary(bits=bits, unit="bits per byte", baselines=theirs, plot=None, sample=None)


def test_the_sentence_is_honest() -> None:
    assert (summary(1.9).beats_all, summary(2.0).beats_all, summary(3.0).beats_all) == (True, False, False)
    assert summary(1.9).sentence == (
        "The model beats every baseline: 1.900 bits per byte on held-out data against 2.000 of the best of them, "
        "n-gram order 5 (5.0% fewer)."
    )
    assert summary(3.0).sentence == (
        "The model does not beat every baseline: 3.000 bits per byte on held-out data against 2.000 of the best of "
        "them, n-gram order 5 (50.0% more); 2 of 3 baselines do as well or better."
    )
    assert "1 of 3 baselines does as well or better" in summary(2.0).sentence


@pytest.mark.parametrize(
    ("split_by", "kind", "tokenizer", "unit"),
    [
        ("position", "text", ByteTokenizer(), "bits per byte"),
        ("record", "text", ByteTokenizer(), "bits per byte"),
        ("position", "dna", DNATokenizer(), "bits per base"),
    ],
)
def test_finish_alone(tmp_path, model, capsys, split_by, kind, tokenizer, unit) -> None:
    generator = np.random.default_rng(0)
    ids = generator.integers(7, 11, 3000)
    source = TokenSource.from_array(ids)
    config = TrainConfig(
        model=ModelSpec(preset="tiny-modal"), data=DataConfig(files=("x",), split_by=split_by), baselines=kind
    )
    outcome = Outcome(
        finished=True,
        step=4,
        seconds=1.0,
        held_out=HeldOut(1.5, 1.5, 500),
        train=source.slice(0, 2500),
        held_out_source=source.slice(2500, 3000),
        model=crocuta.load(model)[0],
        tokenizer=tokenizer,
    )
    (tmp_path / "metrics.jsonl").write_text('{"event": "train", "step": 1, "loss": 2.0}\n')
    result = finish(outcome, config, tmp_path)
    orders, family = (12, "Markov") if kind == "dna" else (5, "n-gram")
    expected = baselines(
        ids[:2500], ids[2500:], tokenizer.num_ids, orders, contiguous=split_by == "position", family=family
    )
    assert result == Summary(bits=1.5, unit=unit, baselines=tuple(expected), plot=tmp_path / "loss.png", sample=None)
    assert result.beats_all  # 2 bits of noise cannot be known better
    out = capsys.readouterr().out
    assert f"against {result.best.bits_per_token:.3f} of the best" in out
    assert not (tmp_path / "samples").exists()


def test_the_table_fits_a_narrow_terminal(finished) -> None:
    _, done = finished
    table = done.out.split("\n\n")[-2].splitlines()
    assert len(table) == 10  # a head, the model, six orders, lzma twice
    assert max(map(len, table)) <= 80
