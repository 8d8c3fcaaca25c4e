"""Distillation of models: the same logits where filters are modal, honest refusals where they are not."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from tiny_models import HIDDEN, loud, random_ids, tiny_config, tiny_model

from crocuta.checkpoints.load import load
from crocuta.checkpoints.native import save
from crocuta.config import (
    AttentionConfig,
    BlockConfig,
    ComplexModalFilterConfig,
    ExplicitFilterConfig,
    FilterConfig,
    HyenaConfig,
    ImplicitFilterConfig,
    ModelConfig,
    SineConfig,
)
from crocuta.errors import InputError, NonFiniteError
from crocuta.inference.distill import distill, fit_layers, judge
from crocuta.inference.drift import measure_drift
from crocuta.inference.generate import generate
from crocuta.inference.sampling import SamplingConfig
from crocuta.inference.score import score
from crocuta.model.build import build_model
from crocuta.model.filters import ExplicitFilter, ImplicitFilter
from crocuta.model.lm import Model
from crocuta.ops.modal import modal_taps

LENGTH = 96
IMPLICIT = ImplicitFilterConfig(max_length=LENGTH, width=3, inner_layers=0, activation=SineConfig(frequency=4.0))
EXPLICIT = ExplicitFilterConfig(taps=600, groups=4)


def config_of(*filters: FilterConfig | None, skip: bool = True) -> ModelConfig:
    """A block each: Hyena with that filter, or attention for None."""
    mixers = [AttentionConfig(num_heads=2) if f is None else HyenaConfig(filter=f, skip=skip) for f in filters]
    return ModelConfig(vocab_size=16, hidden_size=HIDDEN, blocks=tuple(BlockConfig(mixer=m, mlp=None) for m in mixers))


@torch.no_grad()
def modal_model(*filters: FilterConfig | None, skip: bool = True, seed: int = 0) -> Model:
    """A loud float64 model whose implicit and explicit filters are sums of three modes."""
    model = loud(build_model(config_of(*filters, skip=skip), seed=seed), seed).double().eval()
    draw = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, ExplicitFilter):
            g, k = module.weight.shape
            uniform = torch.rand(2, g, 3, dtype=torch.float64, generator=draw)
            logs = torch.stack([-(20 / k + uniform[0]), math.pi * uniform[1]], -1)  # nothing is left at the last tap
            residues = torch.randn(g, 3, 2, dtype=torch.float64, generator=draw)
            module.weight.copy_(modal_taps(logs, residues, k))
        elif isinstance(module, ImplicitFilter) and module.config.width == 3:
            # Without its waves a one-layer MLP is Σ O sin(w (a t + b)), under one decaying exponential a channel.
            module.layers[0].weight[:, 1:] = 0
            module.layers[0].weight[:, 0] = torch.tensor([1.0, 4.0, 9.0])
    return model


def hard_model() -> Model:
    """Layer 0: modal taps; layer 1: attention; layer 2: an implicit filter that no eight modes make."""
    hard = ImplicitFilterConfig(max_length=LENGTH, width=16, activation=SineConfig(frequency=30.0))
    return modal_model(EXPLICIT, None, hard)


@torch.no_grad()
@pytest.mark.parametrize("skip", [True, False], ids=["with D", "without D"])
@pytest.mark.parametrize(
    "filters", [(IMPLICIT,), (EXPLICIT,), (IMPLICIT, None, EXPLICIT)], ids=["implicit", "explicit", "both"]
)
def test_modal_filters_give_the_same_logits(filters, skip) -> None:
    model = modal_model(*filters, skip=skip)
    new, report = distill(model, modes=3, max_error=1e-6)
    ids = random_ids(2, LENGTH, seed=1)
    expected = model(ids)
    torch.testing.assert_close(new(ids), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    state = new.init_state(2, LENGTH)
    pieces = [new.extend(piece, state) for piece in ids.split([40, 1, 1, 30, 24], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), new(ids), rtol=0, atol=1e-9)
    assert [fit.layer for fit in report.distilled] == [i for i, f in enumerate(filters) if f is not None]
    assert {type(b.mixer.filter) for b in new.config.blocks if isinstance(b.mixer, HyenaConfig)} == {
        ComplexModalFilterConfig
    }


def test_the_state_is_constant_and_there_is_no_limit() -> None:
    model = modal_model(IMPLICIT)
    new, _ = distill(model, modes=3)
    assert (model.config.max_length, new.config.max_length) == (LENGTH, None)
    state = new.init_state(1)
    before = state.nbytes
    for piece in random_ids(1, 3 * LENGTH, seed=2).split(50, dim=1):
        assert torch.isfinite(new.extend(piece, state)).all()
    assert state.nbytes == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_all_other_weights_keep_their_bits_in_tensors_of_their_own(dtype: torch.dtype) -> None:
    model = modal_model(IMPLICIT, None, EXPLICIT)
    model = (model if dtype == torch.float64 else model.float().to(dtype)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    new, _ = distill(model, modes=3)
    assert new.training
    after = new.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), f"{name} was changed"
        if ".filter." in name or name.endswith(".skip"):
            continue
        assert torch.equal(after[name], tensor)
        assert after[name].dtype == tensor.dtype
        assert after[name].data_ptr() != tensor.data_ptr(), f"{name} is shared"
    assert {after[n].dtype for n in after if ".filter." in n} == {torch.promote_types(dtype, torch.float32)}
    assert {after[n].dtype for n in after if n.endswith(".skip")} == {dtype}
    assert all(parameter.requires_grad for parameter in new.parameters())


def test_what_rounds_in_a_bfloat16_model_is_in_the_error() -> None:
    """D is bfloat16 there and takes what no mode can: here an odd tap 0. The modes are float32."""
    models = [modal_model(EXPLICIT), modal_model(EXPLICIT).float().bfloat16()]
    for model in models:
        with torch.no_grad():
            model.blocks[0].mixer.filter.weight[:, 0] += 0.7
    exact, rounded = (distill(model, modes=3)[1].layers[0] for model in models)
    assert exact.error.max() < 1e-9
    assert 1e-4 < rounded.error.max() < 1e-2
    assert rounded.fit.error.max() < 1e-5


def test_the_error_is_that_of_the_layer_s_whole_kernel() -> None:
    """h + D at tap 0 of the old layer against that of the new one, in a float32 model."""
    model = hard_model().float()
    new, report = distill(model, modes=4, max_error=2.0)
    for fit in report.layers:
        kernels = []
        for owner in (model, new):
            mixer = owner.get_submodule(f"blocks.{fit.layer}.mixer")
            taps = mixer.filter.taps(fit.horizon).detach().double()
            taps = torch.nn.functional.pad(taps, (0, fit.horizon - taps.shape[1]))
            taps = taps.repeat_interleave(HIDDEN // len(taps), 0)
            taps[:, 0] += mixer.skip.detach().double()
            kernels.append(taps)
        old, found = kernels
        error = (found - old).norm(dim=1) / old[:, 1:].norm(dim=1)
        torch.testing.assert_close(fit.error.repeat_interleave(HIDDEN // len(fit.error)), error, rtol=0, atol=1e-4)
        assert (found - old)[:, 0].abs().max() < 1e-3


# --- refusal and mixed models ---------------------------------------------------------------------------------------


def test_a_layer_above_the_error_is_refused_by_name() -> None:
    model = hard_model()
    with pytest.raises(InputError) as caught:
        distill(model, modes=3)
    text = str(caught.value)
    assert text.startswith("1 of 2 layers cannot be distilled to 3 modes a filter within the stated error")
    assert "layer 2: 8 of 8 filters, worst " in text
    assert "at most 0.01" in text
    assert "on_excess='keep'" in text
    worst = int(text.split("worst ")[1].split()[0])
    (_, bad) = fit_layers(model, modes=3)
    assert worst == int(bad.error.argmax())


def test_mixed_models_generate_and_score(tmp_path) -> None:
    model = hard_model()
    new, report = distill(model, modes=3, on_excess="keep")
    assert report.kept == (2,)
    filters = [getattr(block.mixer, "filter", None) for block in new.config.blocks]
    assert [type(f).__name__ for f in filters] == ["ComplexModalFilterConfig", "NoneType", "ImplicitFilterConfig"]
    assert new.config.max_length == LENGTH
    ids = random_ids(3, 60, seed=4)
    torch.testing.assert_close(new(ids), model(ids), rtol=0, atol=1e-5)
    rows = [row.tolist() for row in ids]
    for mine, theirs in zip(score(new, None, rows), score(model, None, rows)):
        assert mine.total == pytest.approx(theirs.total, abs=1e-4)
    written = [generate(m, None, rows, max_tokens=20, sampling=SamplingConfig(temperature=0)) for m in (new, model)]
    assert [g.ids for g in written[0]] == [g.ids for g in written[1]]
    save(new, None, tmp_path / "mixed")
    again, _ = load(tmp_path / "mixed")
    assert again.config == new.config
    assert torch.equal(again.double()(ids), new(ids))


def test_only_the_named_layers() -> None:
    model = modal_model(IMPLICIT, EXPLICIT)
    new, report = distill(model, modes=3, layers=[1])
    assert [fit.layer for fit in report.layers] == [1]
    assert new.config.blocks[0] == model.config.blocks[0]
    assert isinstance(new.config.blocks[1].mixer.filter, ComplexModalFilterConfig)
    assert new.config.blocks[1].mixer.filter.groups == 4


@torch.no_grad()
def test_an_implicit_filter_of_groups_keeps_them() -> None:
    model = modal_model(dataclasses.replace(IMPLICIT, groups=4))
    new, report = distill(model, modes=3)
    assert new.config.blocks[0].mixer.filter.groups == 4
    assert len(report.layers[0].error) == 4
    ids = random_ids(2, 60, seed=1)
    expected = model(ids)
    torch.testing.assert_close(new(ids), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_the_configuration_says_what_was_done() -> None:
    model = modal_model(IMPLICIT, EXPLICIT)
    model.config = dataclasses.replace(model.config, unverified="a doubt")
    new, report = distill(model, modes=3)
    first, note = new.config.unverified.split("; ", 1)
    assert first == "a doubt"
    assert note.startswith(f"distilled: the long filters of layers 0, 1 are fits of 3 modes to {LENGTH} taps")
    value = report.to_json()
    assert json.loads(json.dumps(value)) == value
    assert [layer["verdict"] for layer in value["layers"]] == ["modal", "modal"]
    assert [len(layer["error"]) for layer in value["layers"]] == [HIDDEN, 4]
    assert {len(row) for row in value["layers"][0]["hankel_singular_values"]} == {7}
    assert [layer["fitted_taps"] for layer in value["layers"]] == [LENGTH, 1200]


def test_a_shorter_horizon_is_easier_and_says_so() -> None:
    model = modal_model(ImplicitFilterConfig(max_length=LENGTH, width=16, activation=SineConfig(frequency=10.0)))
    whole, part = (distill(model, modes=6, max_error=9, horizon=h)[1].layers[0] for h in (None, 12))
    assert part.horizon == 12
    assert part.error.median() < 0.5 * whole.error.median()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("complex-stable", {"modes": 4}, "nothing to distil: got a filter that is modal already"),
        ("attention", {"modes": 4}, "nothing to distil: got attention"),
        ("gated-conv", {"modes": 4}, "nothing to distil: got a gated convolution"),
        ("order-n-shared", {"modes": 4}, "nothing to distil: got Hyena of another kind than one convolution"),
        ("explicit", {"modes": 4}, "5 taps, no more numbers than 4 modes"),
        ("implicit", {"modes": 0}, "modes=0"),
        ("implicit", {"modes": 2, "layers": [7]}, "no such layer: got layer 7; expected 0 to 1"),
        ("stripe", {"modes": 2, "layers": [1]}, "layer 1 cannot be distilled: got attention"),
        ("implicit", {"modes": 2, "horizon": 161}, "impossible horizon: got 161; expected 2 to 160"),
        ("implicit", {"modes": 2, "max_error": 0.0}, "max_error must be positive"),
        ("implicit", {"modes": 2, "on_excess": "shrug"}, "unknown on_excess"),
        ("implicit", {"modes": 2, "max_error": 1e-9, "on_excess": "keep"}, "2 of 2 layers cannot be distilled"),
        ("implicit", {"modes": 2, "layers": []}, "nothing to distil"),
    ],
)
def test_what_cannot_be_distilled(kind: str, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        distill(tiny_model(kind), **options)


def test_taps_that_are_not_finite() -> None:
    model = modal_model(EXPLICIT)
    with torch.no_grad():
        model.blocks[0].mixer.filter.weight[2, 5] = math.nan
    with pytest.raises(NonFiniteError, match="filter 2"):
        distill(model, modes=3)


def test_not_a_number_is_above_every_error() -> None:
    (fit,) = fit_layers(modal_model(EXPLICIT), modes=3)
    broken = dataclasses.replace(fit, error=fit.error.index_fill(0, torch.tensor([1]), math.nan))
    with pytest.raises(InputError, match="1 of 4 filters"):
        judge([broken], modes=3, on_excess="refuse")


# --- drift ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("alone", [False, True], ids=["one batch", "row by row"])
def test_drift_is_what_its_definition_says(monkeypatch: pytest.MonkeyPatch, alone: bool) -> None:
    before, after = tiny_model("explicit", torch.float64), tiny_model("explicit", torch.float64, seed=1)
    rows = [random_ids(length, seed=length) for length in (2, 17, 40, 1, 9)]
    monkeypatch.setattr("crocuta.inference.drift.LOGITS", 16 * 5 * 3)
    monkeypatch.setattr("crocuta.inference.drift.CHUNK", 12)
    if alone:
        monkeypatch.setattr("crocuta.inference.drift.batches", lambda rows: ([i] for i in range(len(rows))))
    drift = measure_drift(before, after, iter(rows))
    gaps, kls, same, costs = [], [], [], []
    for row in rows:
        if len(row) < 2:
            continue
        a, b = (model(row[None, :-1])[0] for model in (before, after))
        gaps.append((a - b).abs())
        p, q = a.log_softmax(-1), b.log_softmax(-1)
        kls.append((p.exp() * (p - q)).sum(-1))
        same.append(a.argmax(-1) == b.argmax(-1))
        costs.append(torch.stack([-x[torch.arange(len(row) - 1), row[1:]] for x in (p, q)], 1))
    assert drift.tokens == 1 + 16 + 39 + 8
    assert drift.max_logit == pytest.approx(float(torch.cat(gaps).max()), rel=1e-9)
    assert drift.mean_logit == pytest.approx(float(torch.cat(gaps).mean()), rel=1e-9)
    assert drift.kl == pytest.approx(float(torch.cat(kls).mean()) / math.log(2), rel=1e-9)
    assert drift.same_top == pytest.approx(float(torch.cat(same).double().mean()))
    bits = (torch.cat(costs).mean(0) / math.log(2)).tolist()
    assert [drift.bits_before, drift.bits_after] == pytest.approx(bits, rel=1e-9)


def test_a_model_does_not_drift_from_itself_nor_by_dropout() -> None:
    models = [tiny_model("stripe", dropout=0.5).train() for _ in range(2)]
    drift = measure_drift(*models, [random_ids(30)])
    assert (drift.max_logit, drift.kl, drift.same_top) == (0, 0, 1)
    assert drift.bits_before == drift.bits_after
    assert all(model.training for model in models)


def test_drift_of_nothing_and_of_strangers() -> None:
    model = tiny_model("explicit")
    with pytest.raises(InputError, match="nothing to compare"):
        measure_drift(model, model, [random_ids(1)])
    with pytest.raises(InputError, match="vocabularies: got 16 and 20"):
        measure_drift(model, build_model(tiny_config("explicit", vocabulary=20)), [random_ids(5)])
    with torch.no_grad():
        broken = tiny_model("explicit")
        broken.norm.scale.fill_(math.nan)
    with pytest.raises(NonFiniteError, match="after"):
        measure_drift(model, broken, [random_ids(5)])
