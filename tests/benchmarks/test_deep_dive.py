"""``benchmarks/deep_dive.py``: without faults its operator is the preset's, and a faulty preset is refused."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch

from crocuta.model import order_n
from crocuta.model.filters import ImplicitFilter
from crocuta.model.norm import RMSNorm
from crocuta.model.order_n import OrderNHyenaMixer

LENGTH, LONGEST = 20, 24


@pytest.fixture
def script(module) -> ModuleType:
    return module("deep_dive")


@pytest.fixture
def tutorial(module) -> ModuleType:
    return module("_tutorial")


@pytest.fixture
def mixer(script: ModuleType):
    def make(order: int = 2) -> OrderNHyenaMixer:
        """The preset's, every parameter disturbed: no norm is the identity and no two branches are alike."""
        made = script.preset_mixer(script.SMOKE, 3, order=order, max_length=LONGEST)
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        return made

    return make


@pytest.fixture
def x(script: ModuleType) -> torch.Tensor:
    return script.noise(5, 2, LENGTH, script.SMOKE.channels)


# --- the operator of the tutorial ---


@torch.no_grad()
@pytest.mark.parametrize("order", [1, 2, 3])
def test_without_faults_it_is_the_preset_s_mixer(tutorial: ModuleType, mixer, x: torch.Tensor, order: int) -> None:
    made = mixer(order)
    weights = tutorial.weights_of(made)
    run = partial(tutorial.operator, x, weights, tutorial.CORRECTED, max_length=LONGEST)
    for convolve in (None, tutorial.direct_convolution, tutorial.complex_convolution):
        torch.testing.assert_close(run(convolve=convolve), made(x), rtol=1e-9, atol=1e-9)
    if order > 1:
        assert (run(residual=0.0) - made(x)).abs().max() > 1e-3
    else:
        assert torch.equal(run(residual=0.0), run(residual=0.1))


@torch.no_grad()
def test_every_fault_changes_the_outputs(tutorial: ModuleType, mixer, x: torch.Tensor) -> None:
    weights = tutorial.weights_of(mixer())
    names = [field.name for field in dataclasses.fields(tutorial.Faults)]
    assert tutorial.Faults(**dict.fromkeys(names, False)) == tutorial.CORRECTED
    expected = tutorial.operator(x, weights, tutorial.CORRECTED, max_length=LONGEST)
    for name in set(names) - {"complex_fft", "dropout_each_step"}:
        found = tutorial.operator(x, weights, tutorial.only(name), max_length=LONGEST)
        assert (found - expected).abs().max() > 1e-3, name
    zeros = []
    for faults in (tutorial.CORRECTED, tutorial.only("dropout_each_step")):
        without = dataclasses.replace(weights, output=(torch.eye(x.shape[2], dtype=x.dtype), 0 * x[0, 0]))
        torch.manual_seed(0)
        y = tutorial.operator(x, without, faults, max_length=LONGEST, dropout=0.5)
        zeros.append(float((y == 0).double().mean()))
    assert zeros == pytest.approx([0.5, 0.75], abs=0.1)


# --- figures ---


def test_it_reports_every_section(script: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert script.main(["--smoke", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("deep_dive-*.json")
    result = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert result["sections"].keys() == script.MEASURES.keys()
    assert {"date", "commit", "cpu", "torch", "threads"} <= result["manifest"].keys()
    assert all(all(section["holds"].values()) for section in result["sections"].values())
    rows = {name: {row[0]: row[1:] for row in section["rows"]} for name, section in result["sections"].items()}
    assert rows["future"]["preset"][0] == 0 < rows["future"]["preset, centred short convolution"][0]
    assert rows["half_precision"]["0"] == ["nan", 0.0]
    assert rows["half_precision"]["0.0001"][0] == "inf"
    assert rows["spectra"]["tutorial"][0] < 0.01 < 0.3 < rows["spectra"]["preset"][0]
    assert rows["mixing"] == {"tutorial": [1], "preset": [8]}
    assert rows["widths"]["256"][:3] == [682, 2, 704]
    assert rows["decay"]["filters"][2] == 0 < rows["decay"]["filters"][1] == rows["decay"]["filters"][0]
    assert rows["windows"]["preset"][3] == 0 < rows["windows"]["tutorial, at first"][3]
    assert "| tutorial " in capsys.readouterr().out


def centred(fir, u, *arguments):
    return fir(u, *arguments).roll(-1, dims=1)


def over_the_current_length(self: ImplicitFilter, like: torch.Tensor, length: int) -> torch.Tensor:
    taps = self._unnormalised(like, length)
    return taps / taps.abs().sum(1, keepdim=True)


def not_normalised(self: ImplicitFilter, like: torch.Tensor, length: int) -> torch.Tensor:
    return self._unnormalised(like, length)


def outside_the_root(self: RMSNorm, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x, x / (x.square().mean(-1, keepdim=True).sqrt() + 1e-8)


@pytest.mark.parametrize(
    ("section", "broken", "name", "fault"),
    [
        ("future", order_n, "fir", partial(centred, order_n.fir)),
        ("prefixes", ImplicitFilter, "_make_taps", over_the_current_length),
        ("growth", ImplicitFilter, "_make_taps", not_normalised),
        ("half_precision", RMSNorm, "forward", outside_the_root),
    ],
)
def test_it_refuses_a_preset_with_a_fault(
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    section: str,
    broken: object,
    name: str,
    fault: object,
) -> None:
    monkeypatch.setattr(script, "MEASURES", {section: script.MEASURES[section]})
    monkeypatch.setattr(broken, name, fault)
    assert script.main(["--smoke", "--output", str(tmp_path)]) == 1
    assert "The preset is wrong" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_allocations_count_new_tensors_once(script: ModuleType) -> None:
    a = torch.zeros(1000)
    with script.Allocated() as count:
        b = a + 1  # 4,000 bytes
        b.mul_(2)
        b.view(10, 100).t()
        torch.fft.rfft(b)  # 501 complex numbers
    assert count.bytes == 4000 + 501 * 8
