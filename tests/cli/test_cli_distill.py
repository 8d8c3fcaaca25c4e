"""``crocuta distill``: the table, the folder it leaves, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from crocuta.checkpoints.load import load
from crocuta.checkpoints.native import save
from crocuta.config import (
    ComplexModalFilterConfig,
    ImplicitFilterConfig,
    SineConfig,
)
from crocuta.model.build import build_model
from crocuta.presets import striped
from crocuta.tokenizers.bytes import ByteTokenizer

TEXT = b"call me ishmael\nsome years ago, never mind how long precisely\n"


@pytest.fixture(scope="module")
def hyena(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers with implicit filters: smooth ones, and some that no few modes make."""
    folder = tmp_path_factory.mktemp("hyena") / "model"
    filters = ImplicitFilterConfig(max_length=128, width=8, activation=SineConfig(frequency=1.0))
    config = striped(vocab_size=256, hidden_size=8, num_layers=2, num_heads=2, filter=filters)
    model = build_model(config, seed=1)
    with torch.no_grad():
        for block in model.blocks:
            block.mixer.filter.layers[0].weight.uniform_(-0.4, 0.4)  # a new one begins with all frequencies
        model.blocks[1].mixer.filter.frequency.fill_(40.0)
    save(model, ByteTokenizer(vocab_size=256), folder)
    return folder


def test_it_prints_errors_and_drift_and_leaves_model_and_report(run, hyena: Path, tmp_path: Path) -> None:
    data = tmp_path / "some.txt"
    data.write_bytes(TEXT)
    new, report = tmp_path / "new", tmp_path / "report.json"
    options = ["--modes", 6, "--layers", "0", "--data", data, "--report", report]
    done = run("distill", hyena, new, *options)
    assert done.code == 0, done.stderr
    header, row, drift, bits, last = done.out.splitlines()
    assert header == "layer  filters  taps  median error  worst error  worst freq.  bound  verdict"
    assert row.split()[:3] == ["0", "8", "128"]
    assert row.endswith("  modal")
    assert drift.startswith("58 tokens: logits differ by at most ")
    assert "KL" in drift
    assert bits.startswith("bits a token: ")
    assert last == str(new)
    value = json.loads((new / "distillation.json").read_text())
    assert value == json.loads(report.read_text())
    assert value["modes"] == 6
    assert value["source"] == str(hyena)
    (layer,) = value["layers"]
    assert max(layer["error"]) == pytest.approx(float(row.split()[4]), rel=0.1)
    assert value["drift"]["tokens"] == 58
    assert value["drift"]["max_logit"] < 0.01
    before, after = load(hyena)[0], load(new)[0]
    assert isinstance(after.config.blocks[0].mixer.filter, ComplexModalFilterConfig)
    assert after.config.blocks[1] == before.config.blocks[1]
    assert "distilled" in after.config.unverified
    ids = torch.arange(100)[None]
    difference = (after(ids) - before(ids)).abs().max()
    assert 0 < difference < 0.01


def test_a_distilled_model_is_used_with_a_note(run, hyena: Path, tmp_path: Path) -> None:
    assert run("distill", hyena, tmp_path / "new", "--modes", 6, "--layers", "0").code == 0
    done = run("score", tmp_path / "new", stdin=TEXT)
    assert done.code == 0
    assert "unverified: distilled: the long filters of layers 0 are fits of 6 modes" in done.stderr


def test_a_layer_above_the_error_is_refused_and_nothing_is_left(run, hyena: Path, tmp_path: Path) -> None:
    done = run("distill", hyena, tmp_path / "new", "--modes", 6)
    assert done.code == 1
    assert done.stderr.startswith("crocuta: error: 1 of 2 layers cannot be distilled to 6 modes")
    assert done.stderr.count("\n") == 1
    assert "above, refused" in done.out.splitlines()[2]
    assert list(tmp_path.iterdir()) == []


def test_a_bad_layer_can_be_kept(run, hyena: Path, tmp_path: Path) -> None:
    done = run("distill", hyena, tmp_path / "new", "--modes", 6, "--keep-bad")
    assert done.code == 0, done.stderr
    assert done.out.splitlines()[2].endswith("above, kept exact")
    after = load(tmp_path / "new")[0].config
    assert [type(block.mixer.filter) for block in after.blocks] == [ComplexModalFilterConfig, ImplicitFilterConfig]
    verdicts = [layer["verdict"] for layer in json.loads((tmp_path / "new/distillation.json").read_text())["layers"]]
    assert verdicts == ["modal", "kept"]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--modes", "0"], 1, "modes=0"),
        ([], 2, "--modes"),
        (["--modes", "2", "--layers", "a"], 2, "'a' is no list of numbers"),
        (["--modes", "2", "--layers", "5"], 1, "no such layer"),
        (["--modes", "2", "--max-error", "nan"], 1, "max_error"),
        (["--modes", "2", "--horizon", "1"], 1, "impossible horizon"),
        (["--modes", "2", "--data", "absent.txt"], 1, "absent.txt"),
        (["--modes", "2", "--max-error", "9", "--data", "long.txt"], 1, "longer than the model's filters"),
    ],
)
def test_what_is_refused(run, hyena: Path, tmp_path: Path, monkeypatch, options, code, message) -> None:
    monkeypatch.chdir(tmp_path)
    Path("long.txt").write_text("a" * 200)
    done = run("distill", hyena, "new", *options)
    assert done.code == code
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["long.txt"]


def test_an_existing_destination_is_refused_before_any_work(run, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    done = run("distill", "nowhere/at/all", tmp_path / "there", "--modes", 2)
    assert done.code == 1
    assert "there exists" in done.stderr


def test_a_modal_model_has_nothing_to_distil(run, dna_model: Path, tmp_path: Path) -> None:
    done = run("distill", dna_model, tmp_path / "new", "--modes", 2)
    assert done.code == 1
    assert "nothing to distil: got a filter that is modal already" in done.stderr
