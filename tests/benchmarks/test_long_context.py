"""``benchmarks/long_context.py`` at tiny sizes: what it checks, what it refuses, and that it says what it read."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture
def script(module) -> ModuleType:
    return module("long_context")


@pytest.fixture
def in_this_process(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        script, "measure", lambda sizes, name, length, fasta, threads: script.measure_one(sizes, name, length, fasta)
    )


def results(folder: Path) -> dict[str, dict]:
    return {path.name.rsplit("-", 3)[0]: json.loads(path.read_text()) for path in folder.glob("*.json")}


@pytest.mark.usefixtures("in_this_process")
def test_both_models_are_checked_and_measured(script, capsys, tmp_path) -> None:
    assert script.main(["--smoke", "--output", str(tmp_path)]) == 0
    found = results(tmp_path)
    assert found.keys() == {"long_context_modal-smoke", "long_context_attention-smoke"}
    for result in found.values():
        assert {"date", "commit", "cpu", "torch", "threads", "load_average"} <= result["manifest"].keys()
        assert [check["dtype"] for check in result["checks"]] == ["float32", "float64"]
        assert all(check["chunks_from_one_pass"] <= check["bound"] for check in result["checks"])
        assert all(check["tokens"] > 2 * check["chunk"] for check in result["checks"])
        assert [m["tokens"] for m in result["measured"]] == [1_024, 4_096]
        assert all(m["finite"] and m["mean_log_prob"] < -1 for m in result["measured"])
        assert result["bases"] == "ecoli_dh1.fa.gz"
    states = [[m["state_bytes"] for m in result["measured"]] for result in found.values()]
    assert sorted(len(set(state)) for state in states) == [1, 2]
    assert "bases: ecoli_dh1.fa.gz, 4,096 different of 4,096." in capsys.readouterr().out


def test_a_measurement_is_a_process_of_its_own(script, capfd) -> None:
    ballast = bytearray(b"x") * (600 << 20)
    measured = script.measure(script.SMOKE, "modal", 300, script.SHIPPED, 1)
    assert len(ballast) == 600 << 20
    assert 50 << 20 < measured["resident_before_bytes"] < measured["peak_bytes"] < 600 << 20
    assert capfd.readouterr().err == ""


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("fault", ["chunks", "score"])
def test_no_figures_where_chunks_and_one_pass_differ(script, monkeypatch, capsys, tmp_path, fault) -> None:
    if fault == "chunks":
        right = script.log_probs
        monkeypatch.setattr(
            script, "log_probs", lambda model, ids, chunk: right(model, ids, chunk) + 1e-3 * (chunk < ids.shape[1])
        )
    else:
        monkeypatch.setattr(script, "score", lambda *_: [type("", (), {"log_probs": torch.zeros(599).numpy()})])
    assert script.main(["--smoke", "--models=modal", "--equal-float64=600", "--output", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert "no figures" in printed.err
    assert "peak memory" not in printed.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("peaks", "finite", "code"),
    [
        ((500, 540), True, 0),
        ((500, 560), True, 1),
        ((1500, 1535), True, 0),
        ((1500, 1540), True, 1),
        ((500, 500), False, 1),
    ],
)
def test_the_goals_decide_how_it_ends(script, monkeypatch, tmp_path, peaks, finite, code) -> None:
    def measure(sizes, name, length, fasta, threads):
        values = {"tokens": length, "peak_bytes": peaks[length == sizes.long] << 20, "state_bytes": 1, "finite": finite}
        return values | {"cpu_seconds": 1.0, "different_bases": length}

    monkeypatch.setattr(script, "measure", measure)
    monkeypatch.setattr(script, "comparisons", lambda *_: [])
    assert script.main(["--models=modal", "--output", str(tmp_path)]) == code
    assert results(tmp_path)["long_context_modal"]["met"] == (code == 0)


def test_bases_are_those_of_the_file_and_repeated_where_it_ends(script, tmp_path) -> None:
    path = tmp_path / "x.fa.gz"
    with gzip.open(path, "wt") as file:
        file.write(">one\nACGT\nacg\n>two\nTT\n")
    assert script.read_bases(path, 6) == ("ACGTAC", 6)
    assert script.read_bases(path, 9) == ("ACGTACGTT", 9)
    assert script.read_bases(path, 12) == ("ACGTACGTTACG", 9)


def test_an_unknown_model_is_refused(script, capsys) -> None:
    with pytest.raises(SystemExit):
        script.parse(["--models=modal,implicit"])
    assert "there are modal and attention" in capsys.readouterr().err
