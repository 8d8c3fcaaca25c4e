"""Hyena projections in FP8: what they compute inside a model, what they keep, and that every law still holds."""

from __future__ import annotations

import copy
import dataclasses
import random

import pytest
import torch
from tiny_models import loud, random_ids

from crocuta.config import (
    AttentionConfig,
    BlockConfig,
    ExplicitFilterConfig,
    GatedMLPConfig,
    HyenaConfig,
    ModelConfig,
    RealModalFilterConfig,
)
from crocuta.model import count, flops, fp8
from crocuta.model.build import build_model
from crocuta.model.fp8 import FP8Linear
from crocuta.model.hyena import HyenaMixer, project
from crocuta.model.linear import Linear
from crocuta.model.lm import Model
from crocuta.ops.dispatch import choose, reasons
from crocuta.ops.fp8 import quantise

WIDTH = 16


def fp8_config(*, fp8_projection: bool = True, bias: bool = True) -> ModelConfig:
    """Two FP8 mixers, of explicit and of modal filters, with attention between them."""
    explicit = HyenaConfig(filter=ExplicitFilterConfig(taps=7, groups=4), skip=False, fp8_projection=fp8_projection)
    modal = HyenaConfig(
        filter=RealModalFilterConfig(modes=3, timescales=(1.0, 100.0)),
        projection_bias=bias,
        fp8_projection=fp8_projection,
    )
    mlp = GatedMLPConfig(intermediate_size=24)
    mixers = explicit, AttentionConfig(num_heads=2), modal
    blocks = tuple(BlockConfig(mixer=mixer, mlp=mlp) for mixer in mixers)
    return ModelConfig(vocab_size=16, hidden_size=WIDTH, blocks=blocks, tie_embeddings=False)


@torch.no_grad()
def fp8_model(dtype: torch.dtype = torch.float32, *, seed: int = 0) -> Model:
    model = loud(build_model(fp8_config(), seed=seed), seed)
    for i, linear in enumerate(projections(model)):
        linear.input_scale.fill_(100.0 + i)
        linear.weight_scale.fill_(300.0 + i)
    return model.to(dtype).eval()


def projections(model: Model) -> list[FP8Linear]:
    return [module for module in model.modules() if isinstance(module, FP8Linear)]


def dequantised(x: torch.Tensor, linear: FP8Linear) -> torch.Tensor:
    xq = quantise(x.flatten(0, 1), linear.input_scale).double() / linear.input_scale.double()
    wq = quantise(linear.weight, linear.weight_scale).double() / linear.weight_scale.double()
    y = (xq @ wq.t()).unflatten(0, x.shape[:2])
    return y if linear.bias is None else y + linear.bias.double()


# --- what it computes ---


def test_only_where_the_configuration_says_so():
    kinds = [type(block.mixer.projection) for block in fp8_model().blocks if isinstance(block.mixer, HyenaMixer)]
    assert kinds == [FP8Linear, FP8Linear]
    plain = build_model(fp8_config(fp8_projection=False), device="meta")
    kinds = [type(block.mixer.projection) for block in plain.blocks if isinstance(block.mixer, HyenaMixer)]
    assert kinds == [Linear, Linear]
    assert HyenaConfig(filter=ExplicitFilterConfig(taps=3)).fp8_projection is False


def test_the_projection_of_a_mixer():
    x = torch.randn(2, 9, WIDTH, generator=torch.Generator().manual_seed(1))
    for linear in projections(fp8_model()):
        z = project(x, linear)
        torch.testing.assert_close(z.double(), dequantised(x, linear), rtol=0, atol=1e-5)
        plain = x @ linear.weight.t() + (0 if linear.bias is None else linear.bias)
        assert (z - plain).norm() > 0.01 * plain.norm(), "the control: a product without rounding"


def test_the_layout_is_that_of_a_plain_projection():
    """[c b l] in memory: short filters and gates run on it without a copy."""
    x = torch.randn(2, 9, WIDTH)
    linear = projections(fp8_model())[0]
    strides = project(x, Linear(WIDTH, 3 * WIDTH, bias=False)).stride()
    assert project(x, linear).stride() == linear(x).stride() == strides == (9, 1, 18)
    assert linear(x[0]).shape == (9, 3 * WIDTH)


@torch.no_grad()
def test_the_rounding_reaches_the_logits():
    model, ids = fp8_model(torch.float64), random_ids(2, 20)
    plain = build_model(fp8_config(fp8_projection=False)).double().eval()
    plain.load_state_dict(
        {
            name: value
            for name, value in model.state_dict().items()
            if not name.endswith(("input_scale", "weight_scale"))
        }
    )
    difference = (model(ids) - plain(ids)).abs().mean() / plain(ids).std()
    assert 1e-3 < difference < 0.3


# --- the laws ---


@torch.no_grad()
def test_every_cutting_gives_the_same_logits():
    """float64: a float32 difference of one bit may push an input over a boundary between two E4M3 numbers."""
    draw, model = random.Random(1), fp8_model(torch.float64, seed=1)
    ids = random_ids(2, 75, seed=2)
    expected = model(ids)
    for _ in range(30):
        state, pieces, start = model.init_state(2, 75), [], 0
        while start < 75:
            size = draw.choice([1, 1, draw.randint(1, 30)])
            pieces.append(model.extend(ids[:, start : start + size], state))
            start += size
        torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=0, atol=1e-9)


@torch.no_grad()
def test_a_row_alone_is_the_row_in_a_batch_and_beside_padding():
    model = fp8_model(torch.float64, seed=1)
    ids = random_ids(5, 40, seed=3)
    together = model(ids)
    for row in range(5):
        torch.testing.assert_close(model(ids[row : row + 1])[0], together[row], rtol=0, atol=1e-9)
    state = model.init_state(5, 50)
    lengths = torch.tensor([40, 1, 17, 39, 0])
    model.extend(ids, state, lengths)
    after = model.extend(ids[:, :1], state)
    for row, length in enumerate(lengths.tolist()):
        whole = model(torch.cat([ids[row, :length], ids[row, :1]])[None])
        torch.testing.assert_close(after[row, 0], whole[0, -1], rtol=0, atol=1e-9)


# --- scales ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_scales_never_fall_below_float32(dtype):
    model = fp8_model()
    for linear in projections(model):
        linear.weight_scale.fill_(1 + 2**-20)  # bfloat16 would make it 1
    model.to(dtype)
    for linear in projections(model):
        assert linear.weight.dtype == dtype
        assert linear.weight_scale.dtype == linear.input_scale.dtype == torch.promote_types(dtype, torch.float32)
        assert linear.weight_scale.item() == 1 + 2**-20


def test_scales_are_ones_in_a_fresh_model_and_no_parameters():
    model = build_model(fp8_config())
    assert len(projections(model)) == 2
    for linear in projections(model):
        assert linear.input_scale.tolist() == linear.weight_scale.tolist() == 1.0
        assert {name for name, _ in linear.named_parameters()} <= {"weight", "bias"}
        assert set(linear.state_dict()) - {"bias"} == {"weight", "input_scale", "weight_scale"}
    plain = build_model(fp8_config(fp8_projection=False))
    assert torch.equal(model.embedding.weight, plain.embedding.weight), "and the other weights are drawn alike"
    assert torch.equal(model.blocks[2].mixer.projection.weight, plain.blocks[2].mixer.projection.weight)


def test_a_meta_model_has_scales_of_the_same_dtype():
    """Loaders read from it what each tensor is to become."""
    model = build_model(fp8_config(), device="meta", dtype=torch.bfloat16)
    linear = projections(model)[0]
    assert linear.weight.dtype == torch.bfloat16
    assert (linear.input_scale.dtype, linear.input_scale.shape, linear.input_scale.is_meta) == (torch.float32, (), True)


# --- the weight kept in FP8 ---


@torch.no_grad()
def test_one_byte_a_weight_is_kept_and_quantised_once(monkeypatch):
    model, calls = fp8_model(), []
    monkeypatch.setattr(fp8, "quantise", lambda *given: calls.append(given) or quantise(*given))
    for _ in range(3):
        model(random_ids(1, 9))
    assert len(calls) == 2
    for linear in projections(model):
        kept = linear._memo._entries["weight"][2]
        assert kept.nbytes == linear.weight.numel()


def test_with_gradients_on_nothing_is_kept():
    model = fp8_model()
    model(random_ids(1, 9))
    assert all(not linear._memo._entries for linear in projections(model))


@pytest.mark.parametrize("part", ["weight", "weight_scale", "input_scale", "bias"])
@torch.no_grad()
def test_a_change_is_seen(part):
    model, ids = fp8_model(), random_ids(1, 9)
    before = model(ids)
    changed = copy.deepcopy(model)
    for linear in projections(changed):
        if getattr(linear, part) is not None:
            getattr(linear, part).mul_(0.7)
    assert not torch.equal(changed(ids), before)
    assert torch.equal(model(ids), before)
    for linear in projections(model):
        if getattr(linear, part) is not None:
            getattr(linear, part).mul_(0.7)  # where a weight is kept from the first call
    assert torch.equal(model(ids), changed(ids))
    model.load_state_dict(fp8_model().state_dict())
    assert torch.equal(model(ids), before)


def test_gradients_reach_every_parameter():
    model, ids = fp8_model(), random_ids(2, 12)
    model(ids).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    x = torch.randn(2, 6, WIDTH, requires_grad=True)
    linear = projections(model)[1]
    linear.zero_grad()
    dy = torch.randn(2, 6, 3 * WIDTH)
    linear(x).backward(dy)
    wq = quantise(linear.weight, linear.weight_scale).float() / linear.weight_scale
    xq = quantise(x.detach().flatten(0, 1), linear.input_scale).float() / linear.input_scale
    torch.testing.assert_close(x.grad, dy @ wq, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(linear.weight.grad, dy.flatten(0, 1).t() @ xq, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(linear.bias.grad, dy.sum((0, 1)), rtol=1e-5, atol=1e-5)


# --- what it costs, and what is told of it ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_and_parameters(dtype):
    config, plain = fp8_config(), fp8_config(fp8_projection=False)
    assert sum(count.parameters(config).values()) == sum(count.parameters(plain).values())
    assert count.weight_bytes(config, dtype) == count.weight_bytes(plain, dtype) + 2 * 2 * 4
    held = build_model(config, dtype=dtype).state_dict().values()
    assert count.weight_bytes(config, dtype) == sum(tensor.nbytes for tensor in held)
    assert flops.decode_flops(config, 9) == flops.decode_flops(plain, 9)


def test_inspection_names_the_kernel():
    config = fp8_config()
    (case,) = [case for case in flops.kernel_cases(config, 5) if case.op == "fp8_linear"]
    assert (case.length, case.sizes) == (5, (3 * WIDTH, WIDTH))
    assert choose(case).name in ("scaled_mm", "dequantised")
    assert len(reasons(case)) == 2
    assert not [case for case in flops.kernel_cases(fp8_config(fp8_projection=False), 5) if case.op == "fp8_linear"]
    assert count.describe_mixer(config.blocks[0].mixer) == "hyena, 7 taps, FP8 projection"


def test_json():
    config = fp8_config()
    assert ModelConfig.from_json(config.to_json()) == config
    value = config.to_json()
    for block in value["blocks"]:
        block["mixer"].pop("fp8_projection", None)
    assert ModelConfig.from_json(value) == fp8_config(fp8_projection=False), "older files do not have it"


def test_a_copy_and_a_cast_keep_the_values():
    model, ids = fp8_model(), random_ids(1, 9)
    with torch.no_grad():
        expected = model(ids)
        assert torch.equal(copy.deepcopy(model)(ids), expected)
        torch.testing.assert_close(copy.deepcopy(model).double()(ids).float(), expected, rtol=0, atol=1e-3)
    mixer = fp8_config().blocks[0].mixer
    assert dataclasses.replace(mixer, fp8_projection=False) != mixer
