"""``benchmarks/distill_filters.py`` at tiny sizes: every figure is there, and none where the fit is wrong."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture
def script(module) -> ModuleType:
    return module("distill_filters")


def test_it_reports_errors_bounds_drift_and_the_comparison(
    script: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert script.main(["--smoke", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("distill_filters-*.json")
    result = json.loads(path.read_text())
    assert result["recovery"] <= 1e-6
    assert {"date", "commit", "cpu", "cores", "torch", "threads", "load_average"} <= result["manifest"].keys()
    for bank in [*result["banks"].values(), *result["models"].values()]:
        assert list(bank) == ["1", "2"]
        assert all(0 < row["median"] <= row["worst"] <= 1 for row in bank.values())
        assert all(row["frequency_bound_median"] <= row["frequency_median"] for row in bank.values())
        assert bank["2"]["median"] < bank["1"]["median"]
    for model in result["models"].values():
        drifts = [row["drift"] for row in model.values()]
        assert {drift["tokens"] for drift in drifts} == {252}
        assert drifts[0]["bits_before"] == drifts[1]["bits_before"] != drifts[0]["bits_after"]
    assert len(result["adam"]) == 6
    assert all(row["ours"] < row["adam"] for row in result["adam"])
    assert "| modes " in capsys.readouterr().out


def test_it_says_nothing_where_modal_filters_are_not_recovered(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    fit_modal = script.fit_modal

    def poor(taps: torch.Tensor, modes: int, **options: object):
        fit = fit_modal(taps, modes, **options)
        return dataclasses.replace(fit, error=fit.error + 2e-6)

    monkeypatch.setattr(script, "fit_modal", poor)
    assert script.main(["--smoke", "--output", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert "no figures" in printed.err
    assert printed.out == ""
    assert list(tmp_path.iterdir()) == []
