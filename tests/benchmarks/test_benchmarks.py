"""The benchmarks at tiny sizes: they run, they keep both sides equal, and they say nothing where sides differ."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch


def test_train_modal_reports_checks_time_memory_and_machine(
    module, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    script = module("train_modal")
    bytes_of = {"published": 1000, "ours": 400, "ours, checkpointed": 300}
    monkeypatch.setattr(script, "measure_memory", lambda sizes, threads: bytes_of)  # processes of their own: see below
    assert script.main(["--smoke", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("train_modal-*.json")
    result = json.loads(path.read_text())
    assert all(check["ours"] <= check["ours_bound"] for check in result["checks"])
    assert result["time"].keys() == bytes_of.keys()
    assert all(len(side["cpu_seconds"]) == 2 and min(side["cpu_seconds"]) > 0 for side in result["time"].values())
    assert {"date", "commit", "cpu", "cores", "torch", "threads", "load_average"} <= result["manifest"].keys()
    assert [goal["at_most"] for goal in result["goals"]] == [1 / 3, 1 / 2, 1 / 4]
    assert [goal["met"] for goal in result["goals"]][1:] == [True, False]
    assert "| published " in capsys.readouterr().out


def test_memory_is_that_of_the_child_alone(module) -> None:
    """The child of a large process must not inherit its peak, as ``ru_maxrss`` does on Linux."""
    script = module("train_modal")
    ballast = bytearray(b"x") * (400 << 20)
    sizes = script.Sizes(length=2048, hidden=64, layers=2, modes=2, vocabulary=64)
    used = script.measure_memory_of("ours", sizes, threads=1)
    assert len(ballast) == 400 << 20
    assert 10 << 20 < used < 200 << 20


@pytest.mark.parametrize(
    "parameter", ["mixer.filter.poles", "mixer.short_taps", "mixer.skip", "mlp.up.weight", "norm.scale"]
)
def test_train_modal_is_silent_about_speed_where_the_sides_differ(
    module, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, parameter: str
) -> None:
    script = module("train_modal")
    copy_weights = script.copy_weights

    def copy_badly(ours, peer) -> None:
        copy_weights(ours, peer)
        wrong = next(pair.peer for pair in script.pairs(ours, peer) if pair.name == parameter)
        wrong.data *= 1.01

    monkeypatch.setattr(script, "copy_weights", copy_badly)
    assert script.main(["--smoke", "--length=32", "--output", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert "MISSED" in printed.out
    assert "CPU time" not in printed.out
    assert "no speed" in printed.err
    assert list(tmp_path.iterdir()) == []


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


def test_generate_memory_keeps_its_state(module, tmp_path: Path) -> None:
    assert module("generate_memory").main(["--smoke", "--output", str(tmp_path)]) == 0
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


def test_load_memory_checks_the_tensors_and_measures_each_load(
    module, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    script = module("load_memory")
    assert script.main(["--smoke", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("load_memory-*.json")
    result = json.loads(path.read_text())
    assert result["cases"].keys() == script.CASES.keys()
    for name, case in result["cases"].items():
        (round_,) = case["rounds"]
        factor = 1 if name == "as stored" else 2
        assert round_["model_bytes"] == pytest.approx(factor * round_["file_bytes"], rel=0.05)
        assert 0 < round_["peak_bytes"] < 100 << 20
    path.unlink()
    build = script.build_model

    def other(config, **options):
        return build(config, **{**options, "seed": options["seed"] + len(config.blocks) * monkeyed["on"]})

    monkeyed = {"on": 0}
    monkeypatch.setattr(script, "build_model", other)
    write = script.write_checkpoint

    def write_then_switch(folder, sizes):
        write(folder, sizes)
        monkeyed["on"] = 1

    monkeypatch.setattr(script, "write_checkpoint", write_then_switch)
    assert script.main(["--smoke", "--output", str(tmp_path)]) == 1
    assert "no figures" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_variants_alternate_and_ratios_are_taken_within_rounds(module) -> None:
    timing = module("_timing")
    calls: list[str] = []
    timings = timing.alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert "".join(calls) == "abbaab"
    assert len(timings["a"].cpu) == len(timings["b"].wall) == 3
    assert timing.ratio([2.0, 9.0, 4.0], [1.0, 3.0, 1.0]) == timing.Ratio(median=3.0, min=2.0, max=4.0)


def test_online_conv_judges_both_sides_and_reports_growth(
    module, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    script = module("online_conv")
    assert script.main(["--smoke", "--output", str(tmp_path), "--plot", str(tmp_path / "plot.png")]) == 0
    (path,) = tmp_path.glob("online_conv-*.json")
    result = json.loads(path.read_text())
    assert max(result["errors"].values()) < 1e-5
    assert [row["tokens"] for row in result["growth"]] == [256, 512, 1024]
    assert len(result["cpu_seconds"]["online"]) == len(result["cpu_seconds"]["cached_dot"]) == 2
    assert [goal["goal"] for goal in result["goals"]] == ["ratio", "growth within log squared"]
    assert (tmp_path / "plot.png").stat().st_size > 5000
    capsys.readouterr()
    monkeypatch.setattr(script, "ERROR_BOUND", 0.0)
    assert script.main(["--smoke", "--output", str(tmp_path / "none")]) == 1
    assert "CPU seconds" not in capsys.readouterr().out
    assert not (tmp_path / "none").exists()
