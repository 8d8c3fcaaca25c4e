"""Every layer as one slow loop, written from the formula in its configuration's docstring; the tests compare with it.

A loop takes the parameters of the real module, and x [l d] (one sequence) or [b l d]. Filters are taken as their taps;
the loop of an implicit filter is ``implicit_taps``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.func import functional_call

from crocuta.config import (
    BandsConfig,
    BlockConfig,
    FixedWindowConfig,
    LearnedWindowConfig,
    MixerConfig,
    ModelConfig,
    NormConfig,
    RMSNormConfig,
    ScalarConfig,
    SineConfig,
    SinusoidalConfig,
)
from crocuta.model.bidirectional import BidirectionalHyenaMixer
from crocuta.model.build import build_model
from crocuta.model.filters import ImplicitFilter
from crocuta.model.gated_conv import GatedConvMixer
from crocuta.model.mixer import Mixer
from crocuta.model.multi_head import MultiHeadHyenaMixer
from crocuta.model.order_n import OrderNHyenaMixer
from crocuta.ops import reference

CHANNELS = 6


def mixer_of(config: MixerConfig, channels: int = CHANNELS, *, seed: int = 0, noise: float = 0.5):
    """The mixer of a configuration in float64, every parameter disturbed enough to show, in evaluation mode."""
    block = BlockConfig(mixer=config, mlp=None)
    model = build_model(ModelConfig(vocab_size=4, hidden_size=channels, blocks=(block,)), seed=seed)
    mixer = model.blocks[0].mixer
    assert isinstance(mixer, Mixer)
    return disturbed(mixer, seed, size=noise).double().eval()


@torch.no_grad()
def disturbed(module: nn.Module, seed: int = 0, *, size: float = 0.5) -> nn.Module:
    """Add noise to every parameter, so that none is zero, one, or the same as another."""
    generator = torch.Generator().manual_seed(seed + 100)
    for parameter in module.parameters():
        parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return module


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradcheck(module: nn.Module, *inputs: Tensor) -> bool:
    """Of a module's output for its parameters and its inputs, in float64."""
    names, parameters = zip(*module.named_parameters(), strict=True)

    def output(*tensors: Tensor) -> Tensor:
        own, rest = tensors[: len(names)], tensors[len(names) :]
        return functional_call(module, dict(zip(names, own, strict=True)), rest)

    tensors = [t.detach().clone().requires_grad_() for t in (*parameters, *inputs)]
    return torch.autograd.gradcheck(output, tensors, fast_mode=True)


def bfloat16_error(mixer: Mixer, x: Tensor) -> float:
    """Relative l2 distance of the bfloat16 mixer, and of bfloat16 input, from the same in float32."""
    rounded = x.bfloat16()
    expected = mixer.float()(rounded.float())
    found = mixer.bfloat16()(rounded)
    assert found.dtype == torch.bfloat16
    return float((found.float() - expected).norm() / expected.norm())


# --- parts ---


def affine(x: Tensor, linear: nn.Module) -> Tensor:
    """W x + bias, row by row of W."""
    y = torch.stack([(x * row).sum(-1) for row in linear.weight], dim=-1)
    return y if linear.bias is None else y + linear.bias


def norm_of(x: Tensor, module: nn.Module, config: NormConfig) -> Tensor:
    if isinstance(config, RMSNormConfig):
        return reference.rms_norm(x, module.scale, config.eps, eps_inside_root=config.eps_inside_root)
    return reference.layer_norm(x, module.scale, module.bias, config.eps)


def activation_of(x: Tensor, name: str) -> Tensor:
    match name:
        case "silu":
            return x / (1 + torch.exp(-x))
        case "gelu":
            return x * (1 + torch.erf(x / math.sqrt(2))) / 2
        case "gelu_tanh":
            return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
        case _:
            return x


def short_filter(x: Tensor, mixer: nn.Module) -> Tensor:
    y = reference.causal_convolution(x, mixer.short_taps)
    return y if mixer.short_bias is None else y + mixer.short_bias


# --- mixers ---


def order_n(mixer: OrderNHyenaMixer, x: Tensor) -> Tensor:
    """The two recurrences of ``OrderNHyenaConfig``; x_1 is ``gates[0]``."""
    config, d = mixer.config, x.shape[-1]
    if config.short_before_projection:
        z = affine(short_filter(x, mixer), mixer.projection)
    else:
        z = short_filter(affine(x, mixer.projection), mixer)
    branches = [z[..., i * d : (i + 1) * d] for i in range(z.shape[-1] // d)]
    if config.branch_norm is not None:
        branches = [norm_of(z, norm, config.branch_norm) for z, norm in zip(branches, mixer.branch_norms, strict=True)]
    gates, v = branches[:-1], branches[-1]
    c = config.convolutions
    assert len(gates) == (c + 1 if config.gate_first else c)
    y = gates[-1] * v if config.gate_first else v
    for i in range(1, c + 1):
        long = reference.causal_convolution(y, mixer.filters[i - 1].taps(x.shape[1]))
        if mixer.skip is not None:
            long = long + mixer.skip[i - 1] * y
        y = gates[c + 1 - i - 1] * long
        if i > 1:
            y = y + config.residual * v
    return affine(y, mixer.output)


def multi_head(mixer: MultiHeadHyenaMixer, x: Tensor) -> Tensor:
    """y_m[i] = Σ_j (h_m ∗ (k_m[i] · v_m[j]) + D_m · k_m[i] · v_m[j]) · q_m[j], one product after the other."""
    d, heads = x.shape[-1], mixer.config.num_heads
    size = d // heads
    z = short_filter(affine(x, mixer.projection), mixer)
    q, k, v = z[..., :d], z[..., d : 2 * d], z[..., 2 * d :]
    taps = mixer.filter.taps(x.shape[1])
    assert len(taps) == heads
    y = torch.zeros_like(x)
    for m in range(heads):
        for i in range(size):
            for j in range(size):
                u = (k[..., m * size + i] * v[..., m * size + j])[..., None]
                long = reference.causal_convolution(u, taps[m : m + 1])
                if mixer.skip is not None:
                    long = long + mixer.skip[m] * u
                y[..., m * size + i] += long[..., 0] * q[..., m * size + j]
    return affine(y, mixer.output)


def bidirectional(mixer: BidirectionalHyenaMixer, x: Tensor) -> Tensor:
    """One sequence x [l d], alone; every sum runs over the positions there are."""
    l, d = x.shape
    z, taps = affine(x, mixer.projection), mixer.short_taps
    middle = taps.shape[1] // 2
    short = []
    for t in range(l):
        total = torch.zeros_like(z[0]) if mixer.short_bias is None else mixer.short_bias
        for j in range(taps.shape[1]):
            if 0 <= t + middle - j < l:
                total = total + taps[:, j] * z[t + middle - j]
        short.append(total)
    x2, x1, v = (torch.stack(short)[:, i * d : (i + 1) * d] for i in range(3))
    u = x1 * v
    back, ahead = (_one_a_channel(f.taps(l), d) for f in (mixer.filter, mixer.filter_ahead))
    rows = []
    for t in range(l):
        total = torch.zeros_like(u[0]) if mixer.skip is None else mixer.skip * u[t]
        for s in range(l):
            if s <= t and t - s < back.shape[1]:
                total = total + back[:, t - s] * u[s]
            if s >= t and s - t < ahead.shape[1]:
                total = total + ahead[:, s - t] * u[s]
        rows.append(total)
    return affine(x2 * torch.stack(rows), mixer.output)


def gated_conv(mixer: GatedConvMixer, x: Tensor) -> Tensor:
    """W_out( W_p act(norm(FIR(a))) · σ(g) )."""
    config, d = mixer.config, x.shape[-1]
    z = affine(x, mixer.projection)
    y = short_filter(z[..., :d], mixer)
    if config.norm is not None:
        y = norm_of(y, mixer.norm, config.norm)
    y = activation_of(y, config.activation)
    if config.pointwise:
        y = affine(y, mixer.pointwise)
    return affine(y / (1 + torch.exp(-z[..., d:])), mixer.output)


def _one_a_channel(taps: Tensor, channels: int) -> Tensor:
    return torch.stack([taps[c // (channels // len(taps))] for c in range(channels)])


# --- implicit filters ---


def implicit_taps(
    filter_: ImplicitFilter, *, mlp: ImplicitFilter | None = None, places: list[int] | None = None, of: int = 0
) -> Tensor:
    """All taps [g max_length], one position after the other.

    ``mlp`` is the filter that has the hidden layers (None: this one). Row c has the fixed window of number
    ``places[c]`` among ``of`` (by default c, among this filter's own).
    """
    config, source = filter_.config, mlp or filter_
    layers = [*source.layers, filter_.output]
    groups = len(filter_.output.weight)
    rows = []
    for i in range(config.max_length):
        x = filter_.output.weight.new_tensor(_features(config, i)) if source.features is None else source.features[i]
        for layer in layers[:-1]:
            x = affine(x, layer)
            if isinstance(config.activation, SineConfig):
                x = torch.sin((source.frequency if config.activation.trained else config.activation.frequency) * x)
            else:
                x = torch.where(x > 0, x, 0.0)
        taps = affine(x, filter_.output)
        if config.bound:
            taps = (torch.exp(taps) - torch.exp(-taps)) / (torch.exp(taps) + torch.exp(-taps))
        numbers = places or list(range(groups))
        rows.append(taps * torch.stack([_window(filter_, i, c, numbers[c], of or groups) for c in range(groups)]))
    taps = torch.stack(rows, dim=1)
    match config.normalise:
        case "absolute":
            taps = torch.stack([row / sum(abs(float(tap)) for tap in row) for row in taps])
        case "energy":
            taps = torch.stack([row / sum(float(tap) ** 2 for tap in row) ** 0.5 for row in taps])
    return taps


def _features(config, i: int) -> list[float]:
    """What the MLP sees of position i, from the docstrings of the kinds of positions."""
    t = i / (config.max_length - 1)
    match config.positions:
        case ScalarConfig():
            return [t]
        case BandsConfig(features=features):
            bands = (features - 1) // 2
            step = (bands - 1 - 1e-4) / (bands - 1) if bands > 1 else 0.0
            angles = [(1e-4 + band * step) * 2 * math.pi * i / config.max_length for band in range(bands)]
            return [t, *(math.cos(a) for a in angles), *(-math.sin(a) for a in angles)]
        case SinusoidalConfig(features=features, base=base, decay=decay):
            angles = [i / base ** (2 * j / features) for j in range(features // 2)]
            pairs = [f(a) * math.exp(-decay * t) for a in angles for f in (math.sin, math.cos)]
            return pairs


def _window(filter_: ImplicitFilter, i: int, c: int, place: int, of: int) -> Tensor:
    t = i / (filter_.config.max_length - 1)
    one = filter_.output.weight.new_ones(())
    match filter_.config.window:
        case None:
            return one
        case FixedWindowConfig(decay=decay, target=target, shift=shift):
            slow, fast = (-math.log(target) / share for share in (decay[1], decay[0]))
            rate = slow + (fast - slow) * place / (of - 1)
            return one * (math.exp(-t * rate) + shift)
        case LearnedWindowConfig(shift=shift):
            return torch.exp(-t * torch.exp(filter_.log_rates[c])) + shift
