"""The benchmarks at tiny sizes: they run, they keep both sides equal, and they say nothing where sides differ."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch):
    """Imports a script of the folder by name, as a script finds its neighbours."""
    monkeypatch.syspath_prepend(FOLDER)

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_train_modal_reports_time_memory_and_machine(tmp_path: Path) -> None:
    command = [sys.executable, FOLDER / "train_modal.py", "--smoke", "--output", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
    (path,) = tmp_path.glob("train_modal-*.json")
    result = json.loads(path.read_text())
    assert result["time"].keys() == result["memory_bytes"].keys() == {"published", "ours", "ours, checkpointed"}
    assert all(len(side["cpu_seconds"]) == 2 and min(side["cpu_seconds"]) > 0 for side in result["time"].values())
    assert all(2**20 < size < 2**31 for size in result["memory_bytes"].values())
    assert {"date", "commit", "cpu", "cores", "torch", "threads", "load_average"} <= result["manifest"].keys()
    assert [goal["at_most"] for goal in result["goals"]] == [1 / 3, 1 / 2, 1 / 4]
    assert "| published " in done.stdout and "MISSED |" not in done.stdout


@pytest.mark.parametrize(
    "parameter", ["mixer.filter.poles", "mixer.short_taps", "mixer.skip", "mlp.up.weight", "norm.scale"]
)
def test_train_modal_is_silent_about_speed_where_the_sides_differ(
    module, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, parameter: str
) -> None:
    script = module("train_modal")
    faithful = script.our_model

    def unfaithful(sizes, *arguments):
        model = faithful(sizes, *arguments)
        changed = next(value for name, value in model.named_parameters() if name.endswith(parameter))
        with torch.no_grad():
            changed *= 1.01
        return model

    monkeypatch.setattr(script, "our_model", unfaithful)
    monkeypatch.setattr(
        script, "published_model", lambda sizes, dtype=torch.float32: _peer(script, faithful, sizes, dtype)
    )
    assert script.main(["--smoke", "--length=32", "--output", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert "MISSED" in printed.out and "CPU time" not in printed.out and "no speed" in printed.err
    assert list(tmp_path.iterdir()) == []


def _peer(script: ModuleType, faithful, sizes, dtype: torch.dtype):
    peer = script.PublishedModel(sizes.vocabulary, sizes.hidden, sizes.layers, sizes.modes, script.EPS)
    script.copy_weights(faithful(sizes), peer)
    return peer.to(dtype)


def test_the_published_formulation_is_ours_in_float64(module) -> None:
    script = module("train_modal")
    sizes = script.Sizes(length=77, hidden=16, layers=2, modes=3, vocabulary=24)
    ours, peer = script.our_model(sizes, torch.float64), script.published_model(sizes, torch.float64)
    ids, targets = script.tokens(sizes)
    losses = script.next_token_loss(ours, ids, targets), script.published_loss(peer, ids, targets)
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
    for pair in script.pairs(ours, peer):
        torch.testing.assert_close(pair.layout(pair.ours.grad), pair.peer.grad, rtol=1e-8, atol=1e-12, msg=pair.name)


def test_generate_memory_keeps_its_state(tmp_path: Path) -> None:
    command = [sys.executable, FOLDER / "generate_memory.py", "--smoke", "--output", tmp_path]
    subprocess.run(command, capture_output=True, check=True, timeout=100)
    (path,) = tmp_path.glob("generate_memory-*.json")
    result = json.loads(path.read_text())
    assert [mark["tokens"] for mark in result["marks"]] == [0, 32, 64, 96]
    assert len({mark["state_bytes"] for mark in result["marks"]}) == 1
    assert result["attention_state_bytes"] > result["marks"][0]["state_bytes"]


@pytest.mark.parametrize("fault", ["logits", "state"])
def test_generate_memory_refuses_wrong_logits_and_a_growing_state(
    module, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, fault: str
) -> None:
    script = module("generate_memory")
    generate = script.generate

    def faulty(model, sizes):
        marks, ids, logits = generate(model, sizes)
        if fault == "logits":
            logits[0, 5, 3] = float("nan")
        else:
            marks[-1] = script.dataclasses.replace(marks[-1], state_bytes=marks[-1].state_bytes + 4)
        return marks, ids, logits

    monkeypatch.setattr(script, "generate", faulty)
    assert script.main(["--smoke", "--tokens=16", "--every=8", "--output", str(tmp_path)]) == 1
    assert ("differ" if fault == "logits" else "size") in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_variants_alternate_and_ratios_are_taken_within_rounds(module) -> None:
    timing = module("_timing")
    calls: list[str] = []
    timings = timing.alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert "".join(calls) == "abbaab"
    assert len(timings["a"].cpu) == len(timings["b"].wall) == 3
    assert timing.ratio([2.0, 9.0, 4.0], [1.0, 3.0, 1.0]) == timing.Ratio(median=3.0, min=2.0, max=4.0)


def test_peak_memory_is_that_of_this_process_alone(module) -> None:
    """A child of a large process must not inherit its peak, as ``ru_maxrss`` does on Linux."""
    ballast = bytearray(b"x") * (200 << 20)
    code = "import _timing; before = _timing.resident_bytes(); x = b'x' * (64 << 20); del x; "
    code += "print(before, _timing.resident_bytes(), _timing.peak_resident_bytes())"
    done = subprocess.run([sys.executable, "-c", code], cwd=FOLDER, capture_output=True, text=True, check=True)
    before, now, peak = (int(word) for word in done.stdout.split())
    del ballast
    if sys.platform == "linux":
        assert now - before < 16 << 20
    assert 60 << 20 < peak - before < 100 << 20
