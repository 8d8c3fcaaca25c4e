"""One update: accumulated batches are one batch, clipping, and a guard that lets nothing non-finite through."""

from __future__ import annotations

import copy
import dataclasses
import json
import math

import pytest
import torch
from tiny_models import random_ids, tiny_model
from tiny_run import metrics_of, tiny_run, write_text

from crocuta.errors import NonFiniteError
from crocuta.model.lm import Model
from crocuta.training import loop
from crocuta.training.checkpoint import read_latest
from crocuta.training.config import OptimizerConfig, TrainConfig
from crocuta.training.loop import train
from crocuta.training.optim import make_optimizer
from crocuta.training.step import PATIENCE, clear_gradients, non_finite_names, refuse_to_go_on, train_step


def config_with(**changes) -> TrainConfig:
    return dataclasses.replace(tiny_run("unread.txt"), **changes)


def batches(size: int, parts: int, length: int = 30):
    """The same ``size`` windows in ``parts`` equal batches."""
    ids = random_ids(size, length + 1, seed=5)
    inputs, targets = ids[:, :-1].chunk(parts), ids[:, 1:].chunk(parts)
    return lambda micro: (inputs[micro], targets[micro])


def updated(model: Model, parts: int, **changes) -> tuple[Model, float, float]:
    """A copy of ``model`` after one update on eight windows in ``parts`` batches; its loss and gradient norm."""
    model = copy.deepcopy(model)
    config = config_with(accumulation=parts, **changes)
    optimizer = make_optimizer(model, config.optimizer)
    result = train_step(model, optimizer, batches(8, parts), config)
    assert not result.skipped
    return model, result.loss, result.gradient_norm


@pytest.mark.parametrize("kind", ["stripe", "complex-grouped", "implicit"])
@pytest.mark.parametrize("parts", [2, 4, 8])
def test_accumulated_batches_are_one_batch(kind, parts):
    model = tiny_model(kind, torch.float64, seed=1)
    whole, loss, norm = updated(model, 1)
    split, split_loss, split_norm = updated(model, parts)
    assert split_loss == pytest.approx(loss, rel=1e-6)
    assert split_norm == pytest.approx(norm, rel=1e-5)
    for (name, parameter), other in zip(whole.named_parameters(), split.named_parameters(), strict=True):
        torch.testing.assert_close(parameter, other[1], rtol=0, atol=1e-5, msg=name)
    moved = [float((p - q).abs().max().detach()) for p, q in zip(whole.parameters(), model.parameters(), strict=True)]
    assert min(moved) > 1e-3


def test_the_gradient_is_clipped_to_its_norm():
    model = tiny_model("stripe", torch.float64, seed=1)
    config = config_with(accumulation=1, optimizer=OptimizerConfig(clip=0.01))
    result = train_step(model, make_optimizer(model, config.optimizer), batches(8, 1), config)
    clipped = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
    assert result.gradient_norm > 0.1
    assert clipped == pytest.approx(0.01, rel=1e-3)


def test_bfloat16_autocasts_the_products():
    model = tiny_model("stripe", seed=1)
    seen = set()
    model.blocks[0].mlp.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    _, loss, _ = updated(model, 1)
    _, narrow, _ = updated(model, 1, precision="bfloat16")
    assert seen == {torch.float32, torch.bfloat16}
    assert narrow != loss
    assert narrow == pytest.approx(loss, rel=0.05)


# --- the guard ---


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("where", ["embedding.weight", "norm.scale", "blocks.0.mixer.filter.residues"])
def test_a_gradient_that_is_not_finite_changes_no_bit(bad, where):
    model = tiny_model("stripe", seed=1)
    config = config_with()
    optimizer = make_optimizer(model, config.optimizer)
    train_step(model, optimizer, batches(8, 2), config)  # so that AdamW has a state
    clear_gradients(optimizer)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    handle = dict(model.named_parameters())[where].register_hook(lambda g: g.index_fill(0, torch.tensor([0]), bad))
    result = train_step(model, optimizer, batches(8, 2), config)
    assert result.skipped
    assert not math.isfinite(result.gradient_norm)
    assert where in non_finite_names(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[0][name]), name
    for index, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, before[1][index][key]) for key, value in state.items())
    handle.remove()
    clear_gradients(optimizer)
    assert not train_step(model, optimizer, batches(8, 2), config).skipped
    assert not torch.equal(model.embedding.weight, before[0]["embedding.weight"])


def test_a_loss_that_is_not_finite_changes_no_bit():
    model = tiny_model("attention", seed=1)
    with torch.no_grad():
        model.head.weight[3] = math.nan
    before = copy.deepcopy(model.state_dict())
    config = config_with()
    result = train_step(model, make_optimizer(model, config.optimizer), batches(8, 2), config)
    assert result.skipped
    assert math.isnan(result.loss)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.view(torch.int32), before[name].view(torch.int32)), name


def test_the_error_names_where_the_trouble_began():
    model = tiny_model("stripe")
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    model.norm.scale.grad[0] = math.nan
    with torch.no_grad():
        model.embedding.weight[0, 0] = math.inf
    assert non_finite_names(model) == ["embedding.weight", "norm.scale"]
    with pytest.raises(NonFiniteError) as failure:
        refuse_to_go_on(model, 17, 10)
    assert str(failure.value) == (
        "10 updates in a row were not finite, up to step 17: got 2 parameters, first ['embedding.weight', "
        "'norm.scale']; lower the learning rate, or resume from an earlier checkpoint"
    )


def spoil(monkeypatch, steps: set[int]) -> None:
    """Makes a gradient infinite in the given steps of a run."""
    original = loop.train_step

    def spoiled(model, optimizer, batch, config):
        step = batch.__self__.progress.step
        handle = model.norm.scale.register_hook(lambda g: g * (math.inf if step in steps else 1))
        try:
            return original(model, optimizer, batch, config)
        finally:
            handle.remove()

    monkeypatch.setattr(loop, "train_step", spoiled)


def test_a_run_skips_bad_updates_and_says_so(tmp_path, monkeypatch):
    spoil(monkeypatch, {3, 4, *range(6, 6 + PATIENCE - 1)})
    outcome = train(tiny_run(write_text(tmp_path / "text.txt"), log_every=1), tmp_path / "run")
    assert outcome.finished
    lines = metrics_of(tmp_path / "run")
    skipped = [line["step"] for line in lines if line["event"] == "skipped"]
    assert skipped == [4, 5, *range(7, 7 + PATIENCE - 1)]
    assert [line["step"] for line in lines if line["event"] == "train"] == list(range(1, 31))
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "Infinity" not in text
    assert "NaN" not in text
    assert {line["gradient_norm"] for line in lines if line["event"] == "skipped"} <= {"nan", "inf"}


def test_ten_bad_updates_in_a_row_end_the_run(tmp_path, monkeypatch):
    spoil(monkeypatch, set(range(14, 100)))
    with pytest.raises(NonFiniteError, match=r"10 updates in a row were not finite, up to step 24: .*norm\.scale"):
        train(tiny_run(write_text(tmp_path / "text.txt")), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["event"] == "skipped"] == list(range(15, 25))
    restored = read_latest(tmp_path / "run" / "checkpoints")
    assert restored.step == 20
    assert restored.state["skipped"] == 6
    assert all(torch.isfinite(tensor).all() for tensor in restored.tensors["model"].values())
