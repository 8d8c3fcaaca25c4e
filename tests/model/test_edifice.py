"""The models of Edifice against its formulas, written out with direct convolutions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from crocuta.errors import ConfigError, InputError
from crocuta.model import edifice
from crocuta.model.block import Block
from crocuta.model.count import parameters
from crocuta.presets import encoder_preset
from crocuta.presets.edifice import edifice_hyena, edifice_striped_hyena

OPTIONS = {"embed_dim": 7, "hidden_size": 16, "filter_size": 8, "num_layers": 3, "window_size": 40, "dropout": 0.3}


# --- the formulas of lib/edifice/ssm/hyena.ex and striped_hyena.ex ---


def causal_conv(u: Tensor, taps: Tensor) -> Tensor:
    """y[t] = Σ_j taps[:, j] · u[t - j], by the definition."""
    y = torch.zeros_like(u)
    for t in range(u.shape[1]):
        for j in range(min(t + 1, taps.shape[1])):
            y[:, t] += taps[:, j] * u[:, t - j]
    return y


def filter_taps(filter_: torch.nn.Module, length: int, window: int) -> Tensor:
    """dense sin dense sin dense of t = i / (window - 1), for i < length, as [channels length]."""
    x = torch.tensor([[i / (window - 1)] for i in range(length)], dtype=torch.float64)
    for layer in filter_.layers:
        x = torch.sin(x @ layer.weight.T + layer.bias)
    return (x @ filter_.output.weight.T + filter_.output.bias).T


def swiglu(block: Block, x: Tensor) -> Tensor:
    mlp = block.mlp
    gate, up = (x @ layer.weight.T + layer.bias for layer in (mlp.gate, mlp.up))
    return (gate * torch.sigmoid(gate) * up) @ mlp.down.weight.T + mlp.down.bias


def layer_norm(norm: torch.nn.Module, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5) * norm.scale + norm.bias


def hyena(block: Block, x: Tensor, window: int) -> Tensor:
    mixer, n = block.mixer, layer_norm(block.pre_norm, x)
    s = causal_conv(n, mixer.short_taps) + mixer.short_bias
    *gates, y = (s @ mixer.projection.weight.T + mixer.projection.bias).chunk(len(mixer.filters) + 1, dim=-1)
    for filter_, gate in zip(mixer.filters, reversed(gates), strict=True):
        y = causal_conv(y, filter_taps(filter_, x.shape[1], window)) * gate
    return residual(block, x, y @ mixer.output.weight.T + mixer.output.bias)


def gated_conv(block: Block, x: Tensor) -> Tensor:
    mixer, n = block.mixer, layer_norm(block.pre_norm, x)
    value, gate = (n @ mixer.projection.weight.T + mixer.projection.bias).chunk(2, dim=-1)
    y = layer_norm(mixer.norm, causal_conv(value, mixer.short_taps) + mixer.short_bias)
    y = (y * torch.sigmoid(y)) @ mixer.pointwise.weight.T + mixer.pointwise.bias
    return residual(block, x, (y * torch.sigmoid(gate)) @ mixer.output.weight.T + mixer.output.bias)


def residual(block: Block, x: Tensor, mixed: Tensor) -> Tensor:
    x = x + mixed
    return x + swiglu(block, layer_norm(block.post_norm, x))


@pytest.mark.parametrize(("order", "length"), [(1, 40), (2, 40), (3, 25), (2, 1)])
@pytest.mark.parametrize("kind", ["hyena", "striped"])
@torch.no_grad()
def test_the_models_are_their_formulas(kind, order, length):
    if kind == "hyena":
        encoder = edifice.hyena(order=order, seed=3, **OPTIONS).double().eval()
    else:
        encoder = edifice.striped_hyena(order=order, conv_kernel_size=4, seed=3, **OPTIONS).double().eval()
    features = torch.randn(2, length, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = features @ encoder.embedding.weight.T + encoder.embedding.bias
    for i, block in enumerate(encoder.blocks):
        before = x
        x = gated_conv(block, x) if kind == "striped" and i % 2 else hyena(block, x, OPTIONS["window_size"])
        assert (x - before).std() > 0.05, "a block that is not heard proves nothing"
    expected = layer_norm(encoder.norm, x)[:, -1]
    torch.testing.assert_close(encoder(features), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(encoder.float()(features.float()).double(), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_blocks_alone():
    x = torch.randn(2, 30, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    block = edifice.hyena_block(hidden_size=16, filter_size=8, max_length=50, seed=1).double().eval()
    torch.testing.assert_close(block(x), hyena(block, x, 50), rtol=0, atol=1e-9)
    block = edifice.gated_conv_block(hidden_size=16, seed=1).double().eval()
    torch.testing.assert_close(block(x), gated_conv(block, x), rtol=0, atol=1e-9)


# --- sizes ---


def test_sizes_and_defaults():
    encoder = edifice.hyena(embed_dim=287)
    assert sum(p.numel() for p in encoder.parameters()) == 4_457_472
    assert encoder.config == edifice_hyena() == encoder_preset("edifice-hyena")
    assert encoder(torch.randn(3, 60, 287)).shape == (3, 256)
    assert encoder.config.output_size == 256
    assert {
        name: value for name, value in edifice.hyena.__kwdefaults__.items() if name not in ("seq_len", "seed")
    } == edifice.RECOMMENDED
    assert edifice.striped_hyena.__kwdefaults__ == edifice.hyena.__kwdefaults__ | {"conv_kernel_size": 7}


def test_weights_without_biases_and_norms_are_those_of_the_documentation():
    encoder = edifice.hyena(embed_dim=287)
    assert sum(p.numel() for p in encoder.parameters() if p.ndim == 2) == 4_435_200


def test_the_striped_model_has_a_gated_convolution_in_every_second_block():
    config = edifice_striped_hyena(num_layers=5)
    assert [block.mixer.type for block in config.blocks] == ["hyena_order_n", "gated_conv"] * 2 + ["hyena_order_n"]
    gated = 256 * 512 + 512 + 7 * 256 + 256 + 512 + 2 * (256 * 256 + 256)
    assert parameters(config)["gated convolution, 7 taps"] == 2 * gated


def test_features_of_the_model_s_own_size_are_not_projected():
    x = torch.randn(1, 5, 16)
    encoder = edifice.hyena(embed_dim=16, hidden_size=16, num_layers=1)
    assert not list(encoder.embedding.parameters())
    assert torch.equal(encoder.hidden(x, layer=0), x)
    assert list(edifice.hyena(embed_dim=15, hidden_size=16).embedding.parameters())


# --- lengths and decoding ---


@torch.no_grad()
def test_a_prefix_keeps_its_outputs_and_frames_one_by_one_give_the_same():
    encoder = edifice.striped_hyena(seed=2, **OPTIONS).double().eval()
    x = torch.randn(2, 40, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whole = encoder.hidden(x)
    torch.testing.assert_close(encoder.hidden(x[:, :11]), whole[:, :11], rtol=0, atol=1e-9)
    state = encoder.init_state(2, 40)
    frames = torch.cat([encoder.extend_hidden(frame, state) for frame in x.split([1] * 5 + [20] + [1] * 15, 1)], 1)
    torch.testing.assert_close(frames, whole, rtol=0, atol=1e-9)


@torch.no_grad()
def test_rows_of_unequal_length_give_their_own_last_position():
    encoder = edifice.hyena(seed=2, **OPTIONS).double().eval()
    x = torch.randn(3, 40, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([40, 7, 1])
    alone = torch.cat([encoder(row[None, :n]) for row, n in zip(x, lengths.tolist(), strict=True)])
    torch.testing.assert_close(encoder(x, lengths), alone, rtol=0, atol=1e-9)


def test_a_longer_window_by_choice_and_an_error_without():
    x = torch.randn(1, 61, 7)
    with pytest.raises(InputError, match="got 61 tokens; expected at most 60"):
        edifice.hyena(embed_dim=7)(x)
    assert edifice.hyena(embed_dim=7, seq_len=61)(x).shape == (1, 256)
    with pytest.raises(InputError, match="features do not fit the encoder"):
        edifice.hyena(embed_dim=7)(torch.randn(1, 5, 8))
    with pytest.raises(ConfigError, match="num_layers"):
        edifice.hyena(embed_dim=7, num_layers=0)


def test_dropout_acts_in_training_only():
    x = torch.randn(1, 20, 7)
    encoder = edifice.hyena(seed=2, **OPTIONS)
    assert not torch.equal(encoder.train()(x), encoder(x))
    assert torch.equal(encoder.eval()(x), encoder(x))
