"""Adapters change nothing until they are trained, are what the formula says everywhere, and come off again."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from tiny_models import HIDDEN, KINDS, random_ids, tiny_config, tiny_model
from torch import Tensor, nn

from crocuta.config import ComplexModalFilterConfig, HyenaConfig
from crocuta.errors import ConfigError, InputError
from crocuta.model.build import build_model
from crocuta.model.linear import Linear
from crocuta.model.lm import Model
from crocuta.model.lora import (
    LoRAConfig,
    LowRank,
    add_lora,
    lora_layers,
    merge_lora,
    remove_lora,
    target_layers,
)
from crocuta.model.mixer import Mixer

CONFIG = LoRAConfig(rank=2, alpha=3.0)
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
IDS = random_ids(2, 40, seed=5)


@torch.no_grad()
def teach(model: nn.Module, seed: int = 0) -> None:
    """Give every B values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        b = layer.low_rank.b
        b.copy_(0.3 * torch.randn(b.shape, generator=generator))


def adapted(kind: str, dtype: torch.dtype = torch.float64, config: LoRAConfig = CONFIG) -> Model:
    model = tiny_model(kind, dtype, seed=1)
    add_lora(model, config, seed=2)
    teach(model)
    return model


# --- what is adapted ---


def names(model: Model, *targets: str) -> set[str]:
    return set(target_layers(model, LoRAConfig(rank=1, alpha=1.0, targets=targets)))


def test_layers_are_chosen_by_the_role_of_their_owner():
    model = tiny_model("stripe")  # modal, attention, implicit, explicit, modal; plain MLPs
    hyena = {f"blocks.{i}.mixer.{own}" for i in (0, 2, 3, 4) for own in ("projection", "output")}
    attention = {"blocks.1.mixer.qkv", "blocks.1.mixer.output"}
    mlps = {f"blocks.{i}.mlp.{own}" for i in range(5) for own in ("up", "down")}
    assert names(model, "projections") == hyena
    assert names(model, "attention") == attention
    assert names(model, "mlp") == mlps
    assert names(model, "mlp", "attention") == mlps | attention
    assert set(add_lora(model, CONFIG)) == hyena | attention | mlps
    gated = tiny_model("attention")
    assert names(gated, "mlp") == {f"blocks.0.mlp.{own}" for own in ("gate", "up", "down")}


class NewMixer(Mixer):
    """A mixer that the adapters have never heard of, with names that say nothing, and an inner module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha, self.omega = Linear(4, 4), Linear(4, 6)
        self.inner = nn.ModuleDict({"filter": Linear(4, 4)})
        self.foreign = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.omega(self.alpha(x))

    def init_state(self, batch, max_length, *, device, dtype):
        raise AssertionError

    def extend(self, x, state, lengths=None):
        raise AssertionError


def test_a_new_mixers_own_layers_are_projections():
    mixer = NewMixer()
    assert set(add_lora(mixer, CONFIG)) == {"alpha", "omega"}
    assert set(lora_layers(mixer)) == {"alpha", "omega"}
    assert type(mixer.inner["filter"]) is Linear


def test_a_layer_of_two_owners_is_adapted_once():
    first, second = NewMixer(), NewMixer()
    second.alpha = first.alpha
    both = nn.ModuleList([first, second])
    layers = add_lora(both, CONFIG)
    assert set(layers) == {"0.alpha", "0.omega", "1.omega"} == set(target_layers(both, CONFIG))
    assert first.alpha is second.alpha
    teach(both)
    expected = first.alpha.weight.detach().clone()
    merge_lora(both)
    assert first.alpha is second.alpha
    assert type(first.alpha) is Linear
    assert torch.equal(first.alpha.weight, expected), "a shared layer was merged twice"


def test_a_mixer_or_mlp_alone_can_be_adapted():
    model = tiny_model("stripe")
    assert set(add_lora(model.blocks[0].mixer, CONFIG)) == {"projection", "output"}
    assert set(add_lora(model.blocks[1].mlp, CONFIG)) == {"up", "down"}
    assert len(lora_layers(model)) == 4
    assert model.blocks[1].mixer.qkv.weight.requires_grad, "what was not adapted was frozen"


@pytest.mark.parametrize("kind", ["attention", "implicit"])  # their heads are not tied to the embedding
def test_only_a_and_b_require_gradients(kind):
    model = adapted(kind, torch.float32)
    own = {id(p) for layer in lora_layers(model).values() for p in (layer.low_rank.a, layer.low_rank.b)}
    assert {id(p) for p in model.parameters() if p.requires_grad} == own
    model.head.weight.requires_grad_()
    model(IDS).square().mean().backward()
    with_gradient = {id(p) for p in model.parameters() if p.grad is not None}
    assert with_gradient == own | {id(model.head.weight)}
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.grad is not None)


# --- what the adapted model computes ---


@pytest.mark.parametrize(
    ("kind", "dtype"), [(kind, torch.float32) for kind in KINDS] + [("stripe", dtype) for dtype in DTYPES[1:]]
)
def test_nothing_changes_at_the_start(kind, dtype):
    model = tiny_model(kind, dtype, seed=1)
    with torch.no_grad():
        expected = model(IDS)
        add_lora(model, CONFIG, seed=2)
        assert torch.equal(model(IDS), expected)
    assert torch.equal(model(IDS).detach(), expected)


def test_nothing_changes_at_the_start_under_autocast():
    model = tiny_model("stripe", seed=1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(IDS)
        add_lora(model, CONFIG, seed=2)
        assert torch.equal(model(IDS), expected)


@pytest.mark.parametrize("kind", ["stripe", "attention-gqa", "complex-stable", "implicit"])
def test_the_weight_is_that_of_the_formula(kind):
    model = adapted(kind)
    plain = tiny_model(kind, torch.float64, seed=1)
    with torch.no_grad():
        before = plain(IDS)
        for name, layer in lora_layers(model).items():
            a, b = layer.low_rank.a, layer.low_rank.b
            update = sum(torch.outer(b[:, r], a[r]) for r in range(2)) * (3.0 / 2)
            assert update.abs().max() > 0.01
            plain.get_submodule(name).weight.add_(update)
        torch.testing.assert_close(model(IDS), plain(IDS), rtol=0, atol=1e-9)
        assert (model(IDS) - before).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["stripe", "attention-gqa"])
def test_gradients_are_those_of_the_formula(kind):
    """dA = s · Bᵀ dW and dB = s · dW Aᵀ, where dW is the gradient that a plain layer of the same weight gets."""
    model = adapted(kind)
    plain = copy.deepcopy(model)
    merge_lora(plain)
    plain.requires_grad_()
    for m in (model, plain):
        F.cross_entropy(m(IDS[:, :-1]).flatten(0, 1), IDS[:, 1:].flatten()).backward()
    for name, layer in lora_layers(model).items():
        gradient, low = plain.get_submodule(name).weight.grad, layer.low_rank
        for found, expected in ((low.a.grad, low.b.T @ gradient), (low.b.grad, gradient @ low.a.T)):
            torch.testing.assert_close(found, 1.5 * expected.detach(), rtol=1e-9, atol=1e-12, msg=name)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_extend_is_forward(kind):
    model = adapted(kind)
    expected, state, start, pieces = model(IDS), model.init_state(2, 40), 0, []
    for size in (5, 1, 1, 14, 19):
        pieces.append(model.extend(IDS[:, start : start + size], state))
        start += size
    torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=0, atol=1e-9)


@torch.no_grad()
def test_what_inference_keeps_follows_the_adapter():
    model = adapted("stripe")
    first = model(IDS)
    assert torch.equal(model(IDS), first)
    layer = lora_layers(model)["blocks.0.mixer.projection"]
    assert layer.weight is layer.weight, "the weight is made anew for every token"
    teach(model, seed=7)
    second = model(IDS)
    layer.plain.weight.mul_(1.5)
    third = model(IDS)
    model.float()
    assert (first - second).abs().max() > 1e-2
    assert (second - third).abs().max() > 1e-2
    assert model(IDS).dtype == torch.float32
    torch.testing.assert_close(model(IDS).double(), third, rtol=0, atol=1e-3)


def test_an_optimizer_moves_only_the_adapter_and_the_model_learns():
    model = tiny_model("stripe", torch.float32, seed=1).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    add_lora(model, dataclasses.replace(CONFIG, rank=4, alpha=8.0), seed=2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)
    ids = torch.tensor([[7, 8, 9, 10, 10, 9, 8, 7] * 5])
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append(F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.3 * losses[0]
    remove_lora(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


# --- dtypes, checkpointing, autocast ---


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_and_b_are_never_narrower_than_float32(dtype):
    wide = torch.promote_types(dtype, torch.float32)
    before = adapted("stripe", dtype)
    after = adapted("stripe", torch.float32).to(dtype)
    for model in (before, after):
        for layer in lora_layers(model).values():
            assert layer.low_rank.a.dtype == layer.low_rank.b.dtype == wide
            assert layer.plain.weight.dtype == layer.weight.dtype == dtype
        assert model(IDS).dtype == wide


def test_a_bfloat16_weight_is_rounded_once():
    model = adapted("attention", torch.bfloat16)
    for layer in lora_layers(model).values():
        low = layer.low_rank
        exact = layer.plain.weight.double() + 1.5 * low.b.double() @ low.a.double()
        half_a_step = 2.0 ** (torch.frexp(exact).exponent - 9).double()  # bfloat16 has 8 bits
        assert bool(((layer.weight.double() - exact).abs() <= 1.0001 * half_a_step).all())


@pytest.mark.parametrize("kind", ["stripe", "attention"])
def test_recomputed_activations_give_the_same_gradients(kind):
    gradients = []
    for recompute in (False, True):
        model = adapted(kind).train()
        model.checkpoint_activations = recompute
        model(IDS).square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_the_sum_of_weights_is_float32_under_autocast():
    model = adapted("stripe", torch.float32)
    layer = lora_layers(model)["blocks.0.mixer.projection"]
    expected = layer.weight.detach().clone()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.weight, expected)
        loss = model(IDS).square().mean()
    loss.backward()
    exact = adapted("stripe", torch.float32)
    exact(IDS).square().mean().backward()
    for name, own in lora_layers(exact).items():
        found = lora_layers(model)[name].low_rank.b.grad
        assert found.dtype == torch.float32
        assert (found - own.low_rank.b.grad).norm() < 0.1 * own.low_rank.b.grad.norm()


# --- merging and removing ---


def plainness(model: nn.Module) -> list[tuple[str, type]]:
    return [(name, type(m)) for name, m in model.named_modules()]


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["stripe", "attention-gqa", "complex-grouped"])
def test_merging_keeps_every_bit_of_the_output(kind, dtype):
    model, plain = adapted(kind, dtype), tiny_model(kind, dtype)
    expected = model(IDS)
    merge_lora(model)
    assert torch.equal(model(IDS), expected)
    assert plainness(model) == plainness(plain)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert all(p.dtype == q.dtype for p, q in zip(model.parameters(), plain.parameters(), strict=True))


@torch.no_grad()
def test_the_merged_weight_is_exact_to_rounding():
    model = adapted("stripe")
    expected = {}
    for name, layer in lora_layers(model).items():
        low = layer.low_rank
        expected[name] = layer.plain.weight + sum(1.5 * torch.outer(low.b[:, r], low.a[r]) for r in range(2))
    merge_lora(model)
    for name, weight in expected.items():
        torch.testing.assert_close(model.get_submodule(name).weight, weight, rtol=0, atol=1e-12)


def test_removing_gives_back_the_same_model():
    model = tiny_model("stripe", seed=1)
    modules, tensors = list(model.named_modules()), dict(model.named_parameters())
    values = {name: p.detach().clone() for name, p in tensors.items()}
    add_lora(model, CONFIG)
    teach(model)
    remove_lora(model)
    assert list(model.named_modules()) == modules, "other modules than before"
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in tensors.items()}
    assert all(torch.equal(p, values[name]) for name, p in tensors.items())
    assert not any(p.requires_grad for p in model.parameters())
    add_lora(model, CONFIG)  # and it can be adapted again


def test_copies_share_nothing():
    model = adapted("stripe")
    with torch.no_grad():
        expected = model(IDS)
        other = copy.deepcopy(model)
        assert torch.equal(other(IDS), expected)
        teach(other, seed=8)
        assert (other(IDS) - expected).abs().max() > 1e-2
        assert torch.equal(model(IDS), expected)


# --- seeds and devices ---


def test_values_are_a_function_of_the_seed():
    def draws(seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return [layer.low_rank.a for layer in add_lora(tiny_model("stripe", dtype), CONFIG, seed).values()]

    first = draws(1)
    assert all(torch.equal(a, b) for a, b in zip(first, draws(1), strict=True))
    assert all(torch.equal(a.double(), b) for a, b in zip(first, draws(1, torch.float64), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, draws(1, torch.bfloat16), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, draws(2), strict=True))
    assert not torch.equal(first[0], first[1][:, : first[0].shape[1]])
    state = torch.get_rng_state()
    draws(3)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_has_rows_of_unit_length():
    low = LowRank(64, Linear(400, 64))
    low.draw(torch.Generator().manual_seed(0))
    assert float(low.a.detach().norm(dim=1).mean()) == pytest.approx(1, rel=0.02)
    assert not low.b.any()


def test_a_model_without_memory_can_be_adapted():
    model = build_model(tiny_config("stripe"), device="meta")
    assert {p.device.type for layer in add_lora(model, CONFIG).values() for p in layer.parameters()} == {"meta"}
    assert model(torch.zeros(2, 5, dtype=torch.int64, device="meta")).shape == (2, 5, 16)


# --- errors ---


def fp8_model() -> Model:
    config = tiny_config("complex-stable")
    mixer = HyenaConfig(filter=ComplexModalFilterConfig(modes=2), fp8_projection=True)
    blocks = (config.blocks[0], dataclasses.replace(config.blocks[1], mixer=mixer))
    return build_model(dataclasses.replace(config, blocks=blocks))


@pytest.mark.parametrize(
    ("make", "config", "message"),
    [
        (fp8_model, CONFIG, r"cannot adapt blocks.1.mixer.projection: got a projection in FP8"),
        (lambda: adapted("stripe"), CONFIG, r"blocks.0.mixer.projection has an adapter already"),
        (
            lambda: tiny_model("implicit"),
            LoRAConfig(rank=1, alpha=1.0, targets=("attention",)),
            r"nothing that LoRA could adapt: got Model without layers for attention",
        ),
        (
            lambda: tiny_model("implicit"),
            LoRAConfig(rank=HIDDEN + 1, alpha=1.0),
            r"lora.rank is larger than blocks.0.mixer.projection: got 9; expected at most that of 24x8",
        ),
    ],
    ids=["fp8", "twice", "nothing", "rank"],
)
def test_what_cannot_be_adapted_stays_as_it_was(make, config, message):
    model = make()
    before = plainness(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(InputError, match=message):
        add_lora(model, config)
    assert (plainness(model), [p.requires_grad for p in model.parameters()]) == before


def test_fp8_models_can_be_adapted_elsewhere():
    model = fp8_model()
    assert set(add_lora(model, LoRAConfig(rank=2, alpha=1.0, targets=("mlp",)))) == {
        f"blocks.0.mlp.{own}" for own in ("gate", "up", "down")
    }


@pytest.mark.parametrize("undo", [merge_lora, remove_lora])
def test_a_plain_model_has_nothing_to_merge_or_remove(undo):
    with pytest.raises(InputError, match="there are no adapters: got Model"):
        undo(tiny_model("stripe"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "lora.rank is impossible: got 0"),
        ({"rank": True}, "lora.rank is impossible: got True"),
        ({"rank": 2.0}, "lora.rank is impossible: got 2.0"),
        ({"alpha": 0.0}, "lora.alpha is impossible: got 0.0"),
        ({"alpha": float("nan")}, "lora.alpha is impossible: got nan"),
        ({"alpha": float("inf")}, "lora.alpha is impossible: got inf"),
        ({"alpha": "1"}, "lora.alpha is impossible: got 1"),
        ({"targets": ()}, "lora.targets are unknown"),
        ({"targets": ("mlp", "heads")}, "lora.targets are unknown: .*'heads'"),
    ],
)
def test_impossible_configurations(fields, message):
    with pytest.raises(ConfigError, match=message):
        LoRAConfig(**{"rank": 1, "alpha": 1.0} | fields)
