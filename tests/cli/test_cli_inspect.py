"""``crocuta inspect``: every preset, a saved model and a configuration, without weights."""

import json

import pytest

from crocuta.config import EncoderConfig, ModelConfig
from crocuta.model import count
from crocuta.ops.kernels import gpu
from crocuta.ops.kernels.library import library, switched_off, why_not
from crocuta.presets import PRESETS, encoder_preset, preset


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_inspects(run, name) -> None:
    done = run("inspect", name, "--json", "--kernels")
    assert (done.code, done.stderr) == (0, "")
    report = json.loads(done.out)
    config = preset(name)
    assert ModelConfig.from_json(report["config"]) == config
    assert report["parameters"]["total"] == sum(count.parameters(config).values())
    assert sum(len(kind["layers"]) for kind in report["blocks"]) == len(config.blocks)
    limit = config.max_length
    lengths = [entry["length"] for entry in report["lengths"]]
    assert lengths == ([1024, 8192, 131072, 1048576] if limit is None else [*(x for x in lengths if x < limit), limit])


def test_figures_of_a_tiny_model_by_hand(run) -> None:
    report = json.loads(run("inspect", "tiny-modal", "--json", "-l", 10, "--length", 3).out)
    weights = 2 * (4 * 32 * 32 + 3 * 32 * 96) + 32 * 512
    first, second = report["lengths"]
    assert (first["length"], second["length"]) == (3, 10)
    assert first["decode_flops_per_token"] == 2 * weights + 2 * (6 * 32 * 3 + 32 * 4 * 12)
    assert first["prefill_flops_per_token"] * 3 == first["forward_flops"]
    assert first["training_flops_per_token"] == 3 * first["prefill_flops_per_token"]
    state = 8 + 2 * (2 * 96 * 4 + 32 * 4 * 2 * 4)
    assert first["state_bytes"]["fp32"] == second["state_bytes"]["fp32"] == state
    assert report["state_is_constant"]
    assert report["parameters"]["total"] == 44_896
    assert report["weight_bytes"]["fp32"] == 4 * 44_896


@pytest.mark.skipif(library() is None, reason=why_not() or "")
def test_what_runs_with_compiled_kernels(run) -> None:
    report = json.loads(run("inspect", "tiny-modal", "--json", "-l", 10).out)
    kernels = [(k["op"], k["new_tokens"], k["kernel"]) for k in report["kernels"]]
    assert kernels == [("hyena_modal", 1, "fused"), ("hyena_modal", 10, "fused")]
    assert report["compiled"] == library().isa
    assert f"\nCompiled kernels: {library().isa}.\n" in run("inspect", "tiny-modal", "--kernels").out


@pytest.mark.parametrize("missing", ["no CUDA device", "triton is not installed"])
def test_why_triton_kernels_do_not_run(run, monkeypatch, missing) -> None:
    monkeypatch.setattr(gpu, "_missing", lambda: missing)
    assert json.loads(run("inspect", "tiny-modal", "--json", "-l", 10).out)["triton"] == f"none, {missing}"
    assert run("inspect", "tiny-modal", "--kernels").out.endswith(f"\nTriton kernels: none, {missing}.\n")


def test_the_machine_alone(run) -> None:
    """Every op of the table is there, for one token and for many."""
    report = json.loads(run("inspect", "--kernels", "--json").out)
    assert {k["op"] for k in report["kernels"]} >= {"hyena_modal", "hyena_fir", "hyena_long"}
    assert {k["new_tokens"] for k in report["kernels"]} == {1, 8192}
    with switched_off():
        out = run("inspect", "--kernels").out
    assert "fused: compiled kernels are switched off" in out
    assert "\nCompiled kernels: none, compiled kernels are switched off.\n" in out


def test_neither_a_target_nor_kernels(run) -> None:
    done = run("inspect")
    assert done.code == 1
    assert "nothing to inspect" in done.stderr


def test_what_runs_without_them_and_why(run) -> None:
    with switched_off():
        report = json.loads(run("inspect", "tiny-modal", "--json", "-l", 10).out)
        text = run("inspect", "tiny-modal", "--kernels").out
    assert [(k["op"], k["new_tokens"], k["kernel"]) for k in report["kernels"]] == [
        ("hyena_modal", 1, "composed"),
        ("modal", 1, "recurrent"),
        ("hyena_modal", 10, "composed"),
        ("modal", 10, "chunked"),
    ]
    assert report["kernels"][0]["reasons"] == [
        "fused: compiled kernels are switched off",
        "triton: not on a CUDA device",
        "composed: takes it",
    ]
    assert "\nCompiled kernels: none, compiled kernels are switched off.\n" in text


def test_the_report_for_people(run) -> None:
    out = run("inspect", "evo2-7b-8k", "--kernels").out
    assert out.startswith("evo2-7b-8k: 6.48 G parameters, 32 blocks of 4096 channels, 512 ids, tied embeddings\n")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "total 6,481,059,584 100.0%" in lines
    assert "attention, 32 heads gated identity, 11008 5 202,387,456 3, 10, 17, 24, 31" in lines
    assert any(line.startswith("1,048,576 ") and line.endswith("160 GiB 80.01 GiB") for line in lines)
    with switched_off():
        out_of_torch = [" ".join(line.split()) for line in run("inspect", "evo2-7b-8k", "--kernels").out.splitlines()]
    assert any(line.startswith("modal 1,048,576 chunked recurrent: more than 4 tokens") for line in out_of_torch)
    assert "same for every length" not in out
    assert "same for every length" in run("inspect", "tiny-modal").out
    assert "recurrent" not in run("inspect", "tiny-modal").out
    assert all(line == line.rstrip() for line in out.splitlines())


def test_a_folder_its_config_and_a_bare_architecture_are_one(run, model, tmp_path) -> None:
    bare = tmp_path / "architecture.json"
    bare.write_text(json.dumps(preset("tiny-striped").to_json()))
    texts = [run("inspect", target, "--json").out for target in (model, model / "config.json", bare, "tiny-striped")]
    assert len(set(texts)) == 1
    assert json.loads(texts[0])["parameters"]["total"] == 71_648


def test_no_weights_are_read(run, model, tmp_path) -> None:
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    assert run("inspect", tmp_path).code == 0


def test_a_file_comes_before_a_preset(run, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny-modal").write_text(json.dumps(preset("tiny-explicit").to_json()))
    assert json.loads(run("inspect", "tiny-modal", "--json").out)["parameters"]["total"] == 44_128


def test_a_model_that_looks_ahead_has_no_state(run, tmp_path) -> None:
    file = tmp_path / "both.json"
    mixer = {"type": "hyena_bidirectional", "filter": {"type": "explicit", "taps": 5}}
    blocks = [{"mixer": mixer, "mlp": None}]
    file.write_text(json.dumps({"vocab_size": 16, "hidden_size": 8, "blocks": blocks}))
    report = json.loads(run("inspect", file, "--json", "-l", 9).out)
    (entry,) = report["lengths"]
    assert (entry["decode_flops_per_token"], entry["state_bytes"]) == (None, {"fp32": None, "bf16": None})
    assert entry["forward_flops"] > 0
    assert not report["state_is_constant"]
    out = run("inspect", file, "-l", 9).out
    assert out.endswith("This model looks ahead: it cannot generate.\n")
    assert "decode" not in out


@pytest.mark.parametrize(("name", "total"), [("edifice-hyena", 4_457_472), ("edifice-striped-hyena", 4_376_832)])
def test_encoders_by_name(run, name, total) -> None:
    out = run("inspect", name).out
    assert out.startswith(f"{name}: 4.")
    assert "an encoder of 287 features, last pooling" in out
    assert f"total {total:,} 100.0%" in [" ".join(line.split()) for line in out.splitlines()]
    report = json.loads(run("inspect", name, "--json").out)
    assert report["parameters"]["total"] == total
    assert EncoderConfig.from_json(report["config"]) == encoder_preset(name)
