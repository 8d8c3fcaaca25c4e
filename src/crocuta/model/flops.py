"""Floating-point operations of a configuration, counted by formula; a multiplication and an addition are two.

For l tokens and d channels:

| part                      | operations                                                                        |
| ------------------------- | --------------------------------------------------------------------------------- |
| matrix product            | 2 · weights a token                                                               |
| attention                 | 4 · d · keys seen, (l + 1) / 2 of them on average: queries · keys, weights · values |
| FIR of k taps             | 2 · d · min(t, k) for token t                                                     |
| modal filter, recurrent   | d · 12 n a token for n complex modes, d · 4 n for n real ones: the state, its output |
| modal filter, chunked     | d · (c + 1 + 4 m) a token: inside a block of c, into and out of a state of m numbers |
|                           | and d · 8 n (complex, m = 2 n) or d · 2 n (real, m = n) a block: from state to state |
| filter by FFT of length f | d · (5 f log2 f + 3 f): two real transforms and a product                         |
| outer products of a head  | 3 · d · N for heads of N channels: the products, and their sum with the query     |

What is not there is not counted: zeros above a causal diagonal, padding. Nor is work that is small (element by element:
norms, activations, gates, biases, residuals, rotary angles, softmax, pooling) or done once for any number of sequences
(making the taps of a filter and transforming them).
"""

from __future__ import annotations

import math
from typing import TypeAlias

import torch

from crocuta.config import (
    AttentionConfig,
    BackboneConfig,
    BidirectionalHyenaConfig,
    ComplexModalFilterConfig,
    EncoderConfig,
    ExplicitFilterConfig,
    FeatureInputConfig,
    FilterConfig,
    GatedConvConfig,
    GatedMLPConfig,
    HyenaConfig,
    ImplicitFilterConfig,
    MixerConfig,
    ModelConfig,
    MultiHeadHyenaConfig,
    OrderNHyenaConfig,
    PlainMLPConfig,
    RealModalFilterConfig,
    filter_of,
)
from crocuta.ops import online_conv
from crocuta.ops.dispatch import Case, choose
from crocuta.ops.fft_conv import fft_length
from crocuta.ops.fp8 import fp8_case
from crocuta.ops.modal import BLOCK

HyenaKind: TypeAlias = HyenaConfig | OrderNHyenaConfig | MultiHeadHyenaConfig | BidirectionalHyenaConfig

BACKWARD = 2
"""A backward pass costs twice its forward pass: each product has two factors to differentiate."""


def forward_flops(config: BackboneConfig, length: int) -> float:
    """Operations of one forward pass over one sequence of ``length`` tokens, logits of all of them included."""
    d = config.hidden_size
    mixers = sum(_mixer_flops(block.mixer, d, length) for block in config.blocks)
    total = mixers + 2 * length * _dense_weights(config)
    if not isinstance(config, EncoderConfig):
        return total
    outputs = length if config.pooling is None else 1
    strands = 1 if config.complement is None else 2
    return strands * total + 2 * outputs * _output_weights(config)


def training_flops(config: BackboneConfig, length: int) -> float:
    """Operations of a forward and a backward pass over one sequence, nothing computed twice."""
    return (1 + BACKWARD) * forward_flops(config, length)


def decode_flops(config: BackboneConfig, length: int) -> float:
    """Operations of one decoding step: token number ``length`` (from 1) of a sequence, and its logits."""
    d = config.hidden_size
    mixers = sum(_step_flops(block.mixer, d, length) for block in config.blocks)
    return mixers + 2 * _dense_weights(config)


def kernel_cases(config: BackboneConfig, length: int) -> list[Case]:
    """The calls of ops with a choice of kernels that ``length`` new tokens at the start of a sequence make.

    A kernel that depends on the device is chosen for this machine's GPU, where it has one.
    """
    mixers = [block.mixer for block in config.blocks]
    cases: list[Case] = []
    for mixer, filter_ in zip(mixers, map(filter_of, mixers)):
        if filter_ is None:
            continue
        if isinstance(mixer, HyenaConfig):
            cases.append(_operator_case(filter_, length))
            if choose(cases[-1]).name != "composed":
                continue
        cases.append(_case(filter_, length, length))
    if any(isinstance(mixer, HyenaConfig) and mixer.fp8_projection for mixer in mixers):
        sizes = 3 * config.hidden_size, config.hidden_size
        cases.append(fp8_case(length, sizes, torch.device(_device()), torch.float32))
    return list(dict.fromkeys(cases))


def _operator_case(filter_: FilterConfig, new: int) -> Case:
    """All between the projections of a Hyena mixer, for ``new`` tokens at the start of a sequence."""
    match filter_:
        case ExplicitFilterConfig(taps=taps):
            online = choose(Case(op="fir", length=1, taps=taps, continued=True)).name == "online"
            return Case(op="hyena_long" if online else "hyena_fir", length=new, taps=taps, device=_device())
        case ImplicitFilterConfig():
            return Case(op="hyena_long", length=new, taps=new, device=_device())
        case ComplexModalFilterConfig() | RealModalFilterConfig():
            return Case(op="hyena_modal", length=new, device=_device())


def _case(filter_: FilterConfig, new: int, end: int) -> Case:
    """``new`` tokens of a sequence that then has ``end``."""
    match filter_:
        case ExplicitFilterConfig(taps=taps):
            return Case(op="fir", length=new, taps=taps, continued=end > new)
        case ImplicitFilterConfig():
            return Case(op="long_convolution", length=new, taps=end, continued=end > new)
        case ComplexModalFilterConfig() | RealModalFilterConfig():
            return Case(op="modal", length=new, device=_device())


def _device() -> str:
    """The device that this machine would use."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _dense_weights(config: BackboneConfig) -> int:
    """Weights that every token is multiplied with: projections, MLPs, and a model's head or an encoder's input."""
    d = config.hidden_size
    total = 0
    match config:
        case ModelConfig(vocab_size=size):
            total = d * size
        case EncoderConfig(input=FeatureInputConfig(size=size)) if size != d:
            total = d * size
    for block in config.blocks:
        match block.mlp:
            case GatedMLPConfig(intermediate_size=width):
                total += 3 * d * width
            case PlainMLPConfig(intermediate_size=width):
                total += 2 * d * width
        total += _projections(block.mixer, d)
    return total


def _projections(mixer: MixerConfig, d: int) -> int:
    match mixer:
        case HyenaConfig() | MultiHeadHyenaConfig() | BidirectionalHyenaConfig():
            return 4 * d * d
        case OrderNHyenaConfig(branches=branches):
            return (branches + 1) * d * d
        case GatedConvConfig(pointwise=pointwise):
            return (3 + pointwise) * d * d
        case AttentionConfig(num_heads=heads, num_kv_heads=kv_heads):
            return 2 * d * d + 2 * d * (d // heads) * (kv_heads or heads)


def _output_weights(config: EncoderConfig) -> int:
    """Weights of the projection and the head."""
    size = config.hidden_size if config.projection is None else config.projection.size
    projection = 0 if config.projection is None else config.hidden_size * size
    return projection + (0 if config.head is None else size * config.output_size)


def _mixer_flops(config: MixerConfig, d: int, length: int) -> float:
    """Mixing along a whole sequence, projections aside."""
    match config:
        case AttentionConfig(causal=causal):
            return 2 * d * length * (length + 1) if causal else 4 * d * length * length
        case GatedConvConfig(taps=taps):
            return 2 * d * _taps_used(taps, length)
        case mixer:
            short = 2 * _short_channels(mixer, d) * _taps_used(mixer.short_taps, length)
            products = length * _product_flops(mixer, d)
            return short + products + _filtered_channels(mixer, d) * _filter_flops(mixer.filter, length)


def _short_channels(mixer: HyenaKind, d: int) -> int:
    """Channels of the short filter."""
    match mixer:
        case OrderNHyenaConfig(short_before_projection=before, branches=branches):
            return d if before else branches * d
        case _:
            return 3 * d


def _filtered_channels(mixer: HyenaKind, d: int) -> int:
    """Channels that long filters see, of all convolutions."""
    match mixer:
        case OrderNHyenaConfig(convolutions=convolutions):
            return convolutions * d
        case MultiHeadHyenaConfig(num_heads=heads):
            return d * (d // heads)
        case BidirectionalHyenaConfig():
            return 2 * d
        case HyenaConfig():
            return d


def _product_flops(mixer: HyenaKind, d: int) -> int:
    """Of a token: outer products and their sums."""
    return 3 * d * (d // mixer.num_heads) if isinstance(mixer, MultiHeadHyenaConfig) else 0


def _filter_flops(filter_: FilterConfig, length: int) -> float:
    """One channel of a long filter over a whole sequence."""
    kernel = choose(_case(filter_, length, length)).name
    match filter_:
        case ExplicitFilterConfig(taps=taps):
            return 2 * _taps_used(taps, length) if kernel == "toeplitz" else _fft_flops(length, min(taps, length))
        case ImplicitFilterConfig():
            return _fft_flops(length, length)
        case ComplexModalFilterConfig() | RealModalFilterConfig() if kernel in ("recurrent", "compiled"):
            return length * _recurrence_flops(filter_)
        case ComplexModalFilterConfig(modes=modes):
            return _chunked_flops(length, 2 * modes) + 8 * modes * -(-length // BLOCK)
        case RealModalFilterConfig(modes=modes):
            return _chunked_flops(length, modes) + 2 * modes * -(-length // BLOCK)


def _step_flops(config: MixerConfig, d: int, position: int) -> float:
    """One token, number ``position`` from 1, projections aside."""
    match config:
        case AttentionConfig():
            return 4 * d * position
        case GatedConvConfig(taps=taps):
            return 2 * d * min(taps, position)
        case mixer:
            short = 2 * _short_channels(mixer, d) * min(mixer.short_taps, position)
            long = _filtered_channels(mixer, d) * _filter_step_flops(mixer.filter, position)
            return short + _product_flops(mixer, d) + long


def _filter_step_flops(filter_: FilterConfig, position: int) -> float:
    """One channel, one token, tiles of the online convolution spread evenly."""
    match filter_:
        case ExplicitFilterConfig(taps=taps):
            kernel = choose(Case(op="fir", length=1, taps=taps, continued=True)).name
            return 2 * min(taps, position) if kernel == "toeplitz" else _online_flops(min(taps, position))
        case ImplicitFilterConfig():
            return _online_flops(position)
        case ComplexModalFilterConfig() | RealModalFilterConfig():
            return _recurrence_flops(filter_)


def _online_flops(reach: int) -> float:
    """Half a block of products, and of each size of tile up to ``reach`` two transforms of 2 U every 2 U tokens."""
    sizes = [online_conv.BLOCK << level for level in range(max(0, (reach // online_conv.BLOCK).bit_length()))]
    return online_conv.BLOCK + sum(5 * math.log2(2 * size) + 3 for size in sizes)


def _taps_used(taps: int, length: int) -> int:
    """Σ min(t, taps) over t = 1 .. length."""
    start = min(taps, length)
    return start * (start + 1) // 2 + (length - start) * taps


def _recurrence_flops(filter_: ComplexModalFilterConfig | RealModalFilterConfig) -> int:
    """A complex multiply-add is 8 operations, the real part of one 4."""
    return filter_.modes * (12 if isinstance(filter_, ComplexModalFilterConfig) else 4)


def _chunked_flops(length: int, numbers: int) -> int:
    """Inside the blocks, and into and out of a state of so many real ``numbers``."""
    blocks, rest = divmod(length, BLOCK)
    return blocks * BLOCK * (BLOCK + 1) + rest * (rest + 1) + 4 * numbers * length


def _fft_flops(inputs: int, taps: int) -> float:
    f = fft_length(inputs + taps - 1)
    return 5 * f * math.log2(f) + 3 * f
