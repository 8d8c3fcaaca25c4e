"""``precision="upstream"`` to the bit, against every rounding of the published code written out one by one.

What is not in question (matrix products, the float32 sums of long filters, attention itself) is taken from the model.
Short filters are compared on numbers whose sums are exact in float32, so that no order of adding matters.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from tiny_models import KINDS, MAX_LENGTH, loud, random_ids, tiny_config

from crocuta.config import (
    AttentionConfig,
    BlockConfig,
    ComplexModalFilterConfig,
    ExplicitFilterConfig,
    FilterConfig,
    GatedMLPConfig,
    HyenaConfig,
    ImplicitFilterConfig,
    LayerNormConfig,
    MixerConfig,
    ModelConfig,
    RealModalFilterConfig,
    RMSNormConfig,
    RopeConfig,
)
from crocuta.errors import ConfigError
from crocuta.inference.score import score
from crocuta.model.attention import AttentionMixer, Rope
from crocuta.model.block import Block
from crocuta.model.build import build_model
from crocuta.model.hyena import HyenaMixer, project
from crocuta.model.lm import Model
from crocuta.model.norm import RMSNorm
from crocuta.ops.attention import causal_attention
from crocuta.ops.gate import fir_gate, fir_gate_stepwise
from crocuta.ops.norm import add_rms_norm, add_rms_norm_stepwise
from crocuta.ops.rope import inverse_frequencies

BF16 = torch.bfloat16
EPS = 0.01
FILTERS: dict[str, FilterConfig] = {
    "sh1": ComplexModalFilterConfig(modes=3, poles="raw", timescales=(1.0, 100.0)),
    "sh1-grouped": ComplexModalFilterConfig(modes=3, groups=4, timescales=(1.0, 100.0)),
    "li": RealModalFilterConfig(modes=3, poles="raw", timescales=(1.0, 100.0)),
    "mr": ExplicitFilterConfig(taps=33, groups=2),
    "mr-by-fft": ExplicitFilterConfig(taps=600, groups=2),
    "implicit": ImplicitFilterConfig(max_length=MAX_LENGTH, width=8),
    "se": ExplicitFilterConfig(taps=7, groups=4),
}
MIXERS: dict[str, MixerConfig] = {
    name: HyenaConfig(filter=config, short_bias=name != "se", skip=name != "se") for name, config in FILTERS.items()
} | {
    "attention": AttentionConfig(num_heads=2, rope=RopeConfig(base=100.0, scale=3.0)),
    "attention-stored": AttentionConfig(num_heads=2, rope=RopeConfig(stored=True)),
}
HYENAS = tuple(FILTERS)


def r(x: torch.Tensor) -> torch.Tensor:
    """A float32 number rounded to bfloat16, as float32: one rounding of the published code."""
    assert x.dtype == torch.float32
    return x.to(BF16).float()


def grid(*shape: int, step: float, size: int, seed: int) -> torch.Tensor:
    """Up to ``size`` times ``step``, at random: bfloat16 numbers whose products and sums of a few float32 holds."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(-size, size + 1, shape, generator=draw).float() * step


def config_of(name: str, precision: str = "upstream", *, tie: bool = False) -> ModelConfig:
    norm = RMSNormConfig(eps=EPS)
    blocks = (
        BlockConfig(mixer=MIXERS[name], mlp=GatedMLPConfig(intermediate_size=24, activation="gelu"), norm=norm),
        BlockConfig(mixer=MIXERS[name], mlp=None, norm=norm),
    )
    return ModelConfig(vocab_size=16, hidden_size=8, blocks=blocks, norm=norm, tie_embeddings=tie, precision=precision)


@torch.no_grad()
def model_of(name: str, precision: str = "upstream", dtype: torch.dtype = BF16, *, tie: bool = False) -> Model:
    """Loud, with short filters and what goes into them on a grid wherever the input of the mixer is."""
    model = loud(build_model(config_of(name, precision, tie=tie)))
    for i, block in enumerate(model.blocks):
        if isinstance(block.mixer, HyenaMixer):
            block.mixer.short_taps.copy_(grid(*block.mixer.short_taps.shape, step=1 / 8, size=8, seed=i))
            if block.mixer.short_bias is not None:
                block.mixer.short_bias.copy_(grid(len(block.mixer.short_bias), step=1 / 16, size=10, seed=i))
    return model.to(dtype).eval()


# --- the published steps, on float32 tensors that hold bfloat16 numbers ---


def literal_norm(x: torch.Tensor, scale: torch.Tensor, eps: float) -> torch.Tensor:
    """sh:layers.py:28-33, vx:layers.py:191-196."""
    norm = r(x.double().square().sum(-1, keepdim=True).sqrt().float())
    rms = r(norm * torch.tensor(x.shape[-1] ** -0.5))
    divisor = r(rms + torch.tensor(eps))
    return r(scale * r(x / divisor))


def literal_short_filter(z: torch.Tensor, taps: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """sh:engine.py:84-94 and vx:engine.py:197-208: (x2, x1, v) of z [b l c]; the last tap there is tap 0 here."""
    k = taps.shape[1]
    y = F.conv1d(F.pad(z.transpose(1, 2), (k - 1, 0)), taps.flip(1)[:, None], groups=len(taps)).transpose(1, 2)
    y = r(y)
    return (y if bias is None else r(y + bias)).chunk(3, dim=-1)


def literal_rotate(x: torch.Tensor, base_or_table: float | torch.Tensor, scale: float) -> torch.Tensor:
    """x [b l h c]; tables cached in bfloat16, rotation in float32, result in bfloat16."""
    half = x.shape[-1] // 2
    if isinstance(base_or_table, float):
        base_or_table = 1 / base_or_table ** (torch.arange(0, 2 * half, 2) / (2 * half))
    angles = (torch.arange(x.shape[1]) / scale)[:, None] * base_or_table
    cosine, sine = r(angles.cos())[:, None], r(angles.sin())[:, None]
    first, second = x[..., :half], x[..., half:]
    return r(torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1))


def literal_hyena(mixer: HyenaMixer, z: torch.Tensor) -> torch.Tensor:
    """Everything between the two projections, as [b l d] in float32."""
    bias = None if mixer.short_bias is None else mixer.short_bias.float()
    x2, x1, v = literal_short_filter(z, mixer.short_taps.float(), bias)
    u = r(x1 * v)
    convolved = mixer.filter.convolve(u.transpose(1, 2).contiguous().transpose(1, 2), None)
    match mixer.config.filter:
        case ExplicitFilterConfig() if mixer.skip is None:  # vx:engine.py:188-232
            return r(x2 * r(convolved))
        case ExplicitFilterConfig() | ImplicitFilterConfig():  # vx:engine.py:38-83, 174-187
            return r(x2 * r(convolved + u * mixer.skip.float()))
        case _:  # sh:engine.py:178-198, vx:engine.py:331-353
            return r(r(r(convolved) + r(u * mixer.skip.float())) * x2)


def literal_attention(mixer: AttentionMixer, x: torch.Tensor) -> torch.Tensor:
    q, k, v = (part.unflatten(-1, (2, -1)) for part in mixer.qkv(x).chunk(3, dim=-1))
    frequencies = mixer.rope.config.base if mixer.rope.inverse is None else mixer.rope.inverse
    q, k = (literal_rotate(part.float(), frequencies, mixer.rope.config.scale).to(BF16) for part in (q, k))
    return mixer.output(causal_attention(q, k, v, None).flatten(2))


def literal_mixer(mixer: HyenaMixer | AttentionMixer, x: torch.Tensor) -> torch.Tensor:
    if isinstance(mixer, AttentionMixer):
        return literal_attention(mixer, x)
    y = literal_hyena(mixer, project(x, mixer.projection).float()).to(BF16)
    # A linear layer whose input has time contiguous: torch rounds the product, then adds the bias.
    return F.linear(y.transpose(1, 2).contiguous().transpose(1, 2), mixer.output.weight, mixer.output.bias)


def literal_block(block: Block, x: torch.Tensor) -> torch.Tensor:
    x = x + literal_mixer(block.mixer, literal_norm(x.float(), block.pre_norm.scale.float(), EPS).to(BF16))
    if block.mlp is None:
        return x
    a = literal_norm(x.float(), block.post_norm.scale.float(), EPS).to(BF16)
    gate, up = F.linear(a, block.mlp.gate.weight), F.linear(a, block.mlp.up.weight)
    return x + F.linear(r(r(F.gelu(gate.float())) * up.float()).to(BF16), block.mlp.down.weight)


def literal_logits(model: Model, ids: torch.Tensor) -> torch.Tensor:
    x = model.embedding.weight[ids]
    for block in model.blocks:
        x = literal_block(block, x)
    x = literal_norm(x.float(), model.norm.scale.float(), EPS).to(BF16)
    return x @ (model.embedding if model.head is None else model.head).weight.t()


# --- op by op ---


@pytest.mark.parametrize("eps", [1e-6, EPS, 0.5])
def test_norm(eps):
    x, scale = grid(300, 24, step=1 / 16, size=127, seed=1), grid(24, step=1 / 64, size=127, seed=2)
    y = add_rms_norm_stepwise(x.to(BF16), None, scale.to(BF16), eps)[1]
    assert y.dtype == BF16
    assert torch.equal(y.float(), literal_norm(x, scale, eps))
    assert not torch.equal(add_rms_norm(x.to(BF16), None, scale.to(BF16), eps, eps_inside_root=False)[1], y), (
        "the control"
    )


def test_only_the_norm_with_eps_outside_the_root_is_rounded_so():
    x = grid(300, 24, step=1 / 16, size=127, seed=1).to(BF16)
    for inside in (True, False):
        config = RMSNormConfig(eps=EPS, eps_inside_root=inside)
        exact, upstream = RMSNorm(config, 24), RMSNorm(config, 24, "upstream")
        for norm in (exact, upstream):
            norm.scale.data.copy_(grid(24, step=1 / 64, size=127, seed=2))
            norm.to(BF16)
        assert torch.equal(exact(x)[1], upstream(x)[1]) == inside


@pytest.mark.parametrize("length", [1, 4, 50])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("with_tail", [True, False])
def test_short_filter_and_gate(length, with_bias, with_tail):
    z = grid(2, length + 2, 24, step=1 / 16, size=127, seed=3)
    taps, bias = grid(24, 3, step=1 / 8, size=9, seed=4), grid(24, step=1 / 64, size=60, seed=5) if with_bias else None
    tail = z[:, :2] if with_tail else None
    if not with_tail:
        z = z[:, 2:]
    x2, x1, v = (part[:, -length:] for part in literal_short_filter(z, taps, bias))
    narrow = None if bias is None else bias.to(BF16), None if tail is None else tail.to(BF16)
    mine = fir_gate_stepwise(z[:, -length:].to(BF16), taps.to(BF16), *narrow)
    assert mine[0].dtype == mine[1].dtype == BF16
    assert torch.equal(mine[0].float(), x2)
    assert torch.equal(mine[1].float(), r(x1 * v))
    if length == 50:
        assert not torch.equal(fir_gate(z[:, -length:].to(BF16), taps.to(BF16), *narrow)[1], mine[1]), "the control"


def test_a_convolution_in_bfloat16_is_one_in_float32_cast():
    """Why the rules of StripedHyena 1 and 2 for the short filter are one rule."""
    z, taps = (
        grid(2, 24, 50, step=1 / 16, size=127, seed=3).to(BF16),
        grid(24, 1, 3, step=1 / 8, size=9, seed=4).to(BF16),
    )
    narrow, wide = F.conv1d(z, taps, groups=24), F.conv1d(z.float(), taps.float(), groups=24)
    assert torch.equal(narrow.float(), r(wide))


@pytest.mark.parametrize("config", [RopeConfig(base=100.0, scale=3.0), RopeConfig(stored=True)], ids=["base", "stored"])
def test_rotary_tables(config):
    inverse = inverse_frequencies(8, config.base)
    x, starts = torch.zeros(2, 40, 8, dtype=BF16), torch.tensor([7, 0])
    tables = {}
    for precision in ("exact", "upstream"):
        rope = Rope(config, 8, precision)
        if rope.inverse is not None:
            rope.inverse.copy_(inverse)
        tables[precision] = rope.to(BF16)(x, starts)
    angles = ((starts[:, None] + torch.arange(40)) / config.scale)[..., None] * inverse
    for mine, exact, literal in zip(tables["upstream"], tables["exact"], (angles.cos(), angles.sin()), strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine[:, :, 0], r(literal))
        assert not torch.equal(exact, mine), "the control"


@torch.no_grad()
@pytest.mark.parametrize("name", MIXERS)
def test_mixer(name):
    """From x to y; and the exact mixer, the control, does not give the same bits."""
    x = grid(3, 70, 8, step=1 / 16, size=60, seed=6).to(BF16)
    outputs = {}
    for precision in ("exact", "upstream"):
        mixer = model_of(name, precision).blocks[0].mixer
        if isinstance(mixer, HyenaMixer):  # a signed permutation keeps the grid
            signs = torch.eye(8).roll(1, 0).repeat(3, 1) * grid(24, 1, step=1.0, size=0, seed=0).add(1)
            mixer.projection.weight.copy_(signs)
        outputs[precision] = mixer(x)
        if precision == "upstream":
            assert torch.equal(outputs[precision], literal_mixer(mixer, x))
    assert not torch.equal(outputs["exact"], outputs["upstream"])
    error = (outputs["exact"] - outputs["upstream"]).float()
    assert error.norm() < 0.02 * outputs["exact"].float().norm()


@torch.no_grad()
@pytest.mark.parametrize("name", HYENAS)
def test_a_mixer_in_pieces_takes_the_same_steps(name):
    """Where the long filter's sums are exact enough, to the bit; else but for the last bit of them."""
    mixer, x = model_of(name).blocks[0].mixer, grid(2, 60, 8, step=1 / 16, size=60, seed=7).to(BF16)
    expected, state = mixer(x), mixer.init_state(2, 60, device=torch.device("cpu"), dtype=BF16)
    pieces = torch.cat([mixer.extend(piece, state) for piece in x.split([31, 1, 3, 25], dim=1)], dim=1)
    same = (pieces == expected).float().mean()
    assert same > 0.99
    torch.testing.assert_close(pieces.float(), expected.float(), rtol=0, atol=0.02 * float(expected.abs().max()))


# --- the whole model ---


@torch.no_grad()
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("name", MIXERS)
def test_logits(name, tie):
    model, ids = model_of(name, tie=tie), random_ids(2, 40, seed=8)
    logits = model(ids)
    assert logits.dtype == BF16
    expected = literal_logits(model, ids)
    # sums of the short filter are not exact here: a handful of last bits may fall the other way
    assert (logits == expected).float().mean() > 0.98
    torch.testing.assert_close(logits, expected, rtol=2**-5, atol=2**-5)
    exact = model_of(name, "exact", tie=tie)(ids)
    assert exact.dtype == torch.float32
    assert (exact.to(BF16) == expected).float().mean() < 0.9, "the control"


@torch.no_grad()
def test_the_head_is_one_product_in_the_dtype_of_the_model():
    model = model_of("li", tie=True)
    hidden = model.hidden(random_ids(2, 30))
    assert torch.equal(
        model.logits(hidden), r((hidden.double() @ model.embedding.weight.double().t()).float()).to(BF16)
    )


@torch.no_grad()
def test_scores_are_log_softmax_of_rounded_logits():
    model, ids = model_of("li"), random_ids(1, 50, seed=9)
    (result,) = score(model, None, [ids[0]])
    logits = model(ids[:, :-1]).double()[0]
    expected = r(torch.log_softmax(logits, dim=-1).float()).gather(1, ids[0, 1:, None])[:, 0]
    assert torch.equal(torch.from_numpy(result.log_probs), expected)
    assert result.total == math.fsum(expected.tolist())
    (exact,) = score(model_of("li", "exact"), None, [ids[0]])
    assert 1e-4 < abs(exact.mean - result.mean) < 0.05


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_wider_models_are_the_same_to_the_bit(kind, dtype):
    exact = loud(build_model(tiny_config(kind))).to(dtype).eval()
    upstream = build_model(dataclasses.replace(tiny_config(kind), precision="upstream")).to(dtype).eval()
    upstream.load_state_dict(exact.state_dict())
    ids = random_ids(2, 45)
    logits = upstream(ids)
    assert logits.dtype == dtype
    assert torch.equal(logits, exact(ids))
    states = exact.init_state(2, 60), upstream.init_state(2, 60)
    for piece, lengths in ((ids[:, :40], torch.tensor([40, 17])), (ids[:, 40:41], None)):
        assert torch.equal(exact.extend(piece, states[0], lengths), upstream.extend(piece, states[1], lengths))


@pytest.mark.parametrize("name", MIXERS)
def test_wider_models_have_the_same_gradients(name):
    gradients = []
    for precision in ("exact", "upstream"):
        model = model_of(name, precision, torch.float32)
        model(random_ids(2, 20)).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("name", MIXERS)
def test_forward_is_extend(name):
    """Within what bfloat16 allows, and with rows of different lengths."""
    model, ids = model_of(name), random_ids(2, 60, seed=2)
    expected, state = model(ids).float(), model.init_state(2, 60)
    pieces = [model.extend(piece, state).float() for piece in ids.split([20, 1, 1, 33, 5], dim=1)]
    error = (torch.cat(pieces, dim=1) - expected).abs()
    assert error.max() <= 5e-2 * expected.abs().max()
    state = model.init_state(2, 60)
    model.extend(ids[:, :30], state, torch.tensor([30, 11]))
    after = model.extend(torch.stack([ids[0, 30:31], ids[1, 11:12]]), state)[:, 0].float()
    assert (after[1] - expected[1, 11]).abs().max() <= 5e-2 * expected.abs().max()


def gradients_of(op, *inputs: torch.Tensor) -> list[torch.Tensor]:
    leaves = [tensor.to(BF16).requires_grad_() for tensor in inputs]
    outputs = op(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    weights = [grid(*y.shape, step=1 / 16, size=30, seed=i) for i, y in enumerate(outputs)]
    sum((y.float() * weight).sum() for y, weight in zip(outputs, weights, strict=True)).backward()
    return [leaf.grad.float() for leaf in leaves]


@pytest.mark.parametrize("op", ["norm", "gate"])
def test_gradients_of_an_op_are_those_of_the_exact_one(op):
    """But for roundings."""
    if op == "norm":
        inputs = grid(2, 40, 24, step=1 / 16, size=60, seed=1), grid(24, step=1 / 32, size=60, seed=2)
        ops = (
            lambda x, s: add_rms_norm_stepwise(x, None, s, EPS)[1],
            lambda x, s: add_rms_norm(x, None, s, EPS, eps_inside_root=False)[1],
        )
    else:
        sizes = (2, 40, 24), (24, 3), (24,), (2, 2, 24)
        inputs = tuple(grid(*size, step=1 / 16, size=30, seed=i) for i, size in enumerate(sizes))
        ops = fir_gate_stepwise, fir_gate
    for mine, exact in zip(*(gradients_of(op, *inputs) for op in ops), strict=True):
        assert (mine - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("name", MIXERS)
def test_gradients_reach_every_parameter(name):
    model = model_of(name)
    model(random_ids(2, 20)).float().square().mean().backward()
    for parameter_name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), parameter_name
        assert parameter.grad.abs().sum() > 0, parameter_name


# --- the configuration ---


def test_precision_and_note_survive_json():
    config = dataclasses.replace(config_of("li"), unverified='FP8 scales are missing, "bf16" is used')
    value = config.to_json()
    assert (value["precision"], value["unverified"]) == ("upstream", config.unverified)
    assert ModelConfig.from_json(value) == config
    del value["precision"], value["unverified"]
    older = ModelConfig.from_json(value)
    assert (older.precision, older.unverified) == ("exact", "")


def test_an_unknown_precision_is_an_error():
    with pytest.raises(ConfigError, match="precision"):
        ModelConfig(vocab_size=4, hidden_size=4, blocks=(), precision="upsteam")
    with pytest.raises(ConfigError, match="precision"):
        ModelConfig.from_json({"vocab_size": 4, "hidden_size": 4, "blocks": [], "precision": "bf16"})
    assert ModelConfig(vocab_size=4, hidden_size=4, blocks=(), norm=LayerNormConfig()).precision == "exact"
