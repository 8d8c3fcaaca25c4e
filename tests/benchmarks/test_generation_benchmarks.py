"""The benchmarks of generation and of variants at tiny sizes: they run, and say nothing where something is wrong."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from crocuta.ops.kernels.library import why_not


def test_the_soak_reports_finite_tokens_memory_and_speed(
    module, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    script = module("soak_generation")
    assert script.main(["--smoke", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("soak_generation-*.json")
    result = json.loads(path.read_text())
    assert len(result["tenths"]) == 10
    assert all(tenth["cpu_seconds"] > 0 and tenth["speed"] > 0 for tenth in result["tenths"])
    assert result["largest_log_prob_difference"] < 1e-4
    assert [goal["what"].split()[0] for goal in result["goals"]] == ["bytes", "speed"]
    assert result["state_bytes"] > 0
    assert "| 10 " in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["log_probs", "ids", "state", "growth"])
def test_the_soak_refuses_what_is_not_the_model_s(
    module, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, fault: str
) -> None:
    script = module("soak_generation")
    generate = script.generate

    def faulty(model, sizes):
        soak = generate(model, sizes)
        if fault == "log_probs":
            soak.log_probs[7] = np.nan
        elif fault == "ids":
            soak.ids[7] += 1
        elif fault == "state":
            return dataclasses.replace(soak, faults=["block 0, long.modes, row 0"])
        else:
            return dataclasses.replace(soak, state_bytes=(soak.state_bytes[0], soak.state_bytes[1] + 8))
        return soak

    monkeypatch.setattr(script, "generate", faulty)
    assert script.main(["--smoke", "--output", str(tmp_path)]) == 1
    assert ("grown" if fault == "growth" else "nothing is reported") in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_goal_that_is_missed_says_so(module) -> None:
    script = module("soak_generation")
    tenths = [script.Tenth(1.0, 0.1, 100 << 20), *[script.Tenth(1.0, 0.1, 109 << 20)] * 9]
    assert script.growth(tenths, 1_000_000) == 1 << 20
    assert [script.goal("x", value, at_least=0.95)["met"] for value in (0.94, 0.95)] == [False, True]
    assert [script.goal("x", value, at_most=3)["met"] for value in (3.1, 3.0)] == [False, True]


def test_variants_are_timed_at_every_site(module, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    script = module("variants")
    assert script.main(["--smoke", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("variants-*.json")
    result = json.loads(path.read_text())
    assert [site["position"] for site in result["sites"]] == [0, 128, 214, 224, 246]
    assert [site["variants"] for site in result["sites"]] == [4, 4, 30, 4, 4]
    assert all(min(site["cpu_seconds"] + site["whole_cpu_seconds"]) > 0 for site in result["sites"])
    assert result["goals"][0]["what"] == "the last sixth"
    assert "| the end, 246" in capsys.readouterr().out


def test_every_exchange_of_a_base_is_a_variant(module) -> None:
    script = module("variants")
    variants = script.single_base_variants("ACGTACGT", 2, 9, 3)
    assert variants == [(2, "G", b) for b in "ACT"] + [(3, "T", b) for b in "ACG"] + [(4, "A", b) for b in "CGT"]
    assert script.single_base_variants("ACGTACGT", 2, 3, 3) == variants[::3]
    assert script.edited("ACGT", variants[0]) == "ACAT"


def test_variants_with_other_totals_have_no_speed(
    module, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    script = module("variants")
    edited = script.edited
    monkeypatch.setattr(script, "edited", lambda sequence, variant: edited(sequence, variant)[:-1] + "A")
    assert script.main(["--smoke", "--output", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert "no speed" in printed.err
    assert "CPU time" not in printed.out
    assert list(tmp_path.iterdir()) == []


def test_narrow_weights_are_judged_by_the_forward_pass(
    module, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    script = module("narrow_weights")
    if why_not():
        pytest.skip(why_not())
    assert script.main(["--smoke", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("narrow_weights-*.json")
    bits = json.loads(path.read_text())["bits"]
    assert abs(bits["float32"]["change"]) < 1e-4 < abs(bits["int8"]["change"]) < 0.1
    assert "| int8 " in capsys.readouterr().out
    monkeypatch.setattr(script, "BITS_BOUND", 0.0)
    assert script.main(["--smoke", "--output", str(tmp_path / "none")]) == 1
    assert not (tmp_path / "none").exists()
    assert script.main(["--model", str(tmp_path), "--output", str(tmp_path / "none")]) == 0
    assert "there is no model" in capsys.readouterr().out
