"""Initialisation that trains.

Linear weights are N(0, 1 / fan-in), embeddings N(0, 1 / hidden size) (LeCun et al. 1998), and the projections that
write to the residual stream are divided by √(2 · blocks) (GPT-2; the same in safari's Hyena). GPT-2's fixed 0.02 is
nearly the same at 4,096 channels and far too small at 160 (docs/decisions.md).

Modal filters start as in S4D and the LRU: decay times log-spaced between the configured timescales, one a mode;
angles spread evenly over [0, π), turned a little more from channel to channel so that the bank covers all
frequencies; residues N(0, (1 - |p|²) / n), which gives every filter unit energy (Orvieto et al. 2023, eq. 7).

Implicit filters keep torch's Linear defaults (GPT-2's 0.02 would leave them almost silent), but for this: sines of the
first layer start with frequencies spread over all there are, up to the highest, because with fixed small weights
filters of a thousand taps and more are smooth, which costs perplexity (Hyena, appendix D.2); and the last layer is
scaled so that every filter has unit energy, as modal ones have, and its bias removes the mean: else outputs grow with
the square root of max_length.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from crocuta.config import SineConfig, SinusoidalConfig
from crocuta.model.attention import AttentionMixer, Rope
from crocuta.model.bidirectional import BidirectionalHyenaMixer
from crocuta.model.encoder import Encoder
from crocuta.model.filters import ExplicitFilter, ImplicitFilter, ModalFilter, positional_features
from crocuta.model.fp8 import FP8Linear
from crocuta.model.gated_conv import GatedConvMixer
from crocuta.model.hyena import HyenaMixer
from crocuta.model.mlp import GatedMLP, PlainMLP
from crocuta.model.multi_head import MultiHeadHyenaMixer
from crocuta.model.norm import LayerNorm, RMSNorm
from crocuta.model.order_n import OrderNHyenaMixer
from crocuta.ops.rope import inverse_frequencies


@torch.no_grad()
def initialise(model: nn.Module, seed: int, blocks: int) -> None:
    """Fill every parameter of a module with so many ``blocks``, as a function of the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    depth = math.sqrt(2 * max(1, blocks))
    implicit = {id(m) for f in model.modules() if isinstance(f, ImplicitFilter) for m in f.modules()}
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            _normal(module.weight, module.embedding_dim**-0.5, generator)
        if isinstance(module, nn.Linear) and id(module) not in implicit:
            _normal(module.weight, module.in_features**-0.5, generator)
            if module.bias is not None:
                module.bias.zero_()
    for module in model.modules():
        _initialise(module, depth, generator)


def _initialise(module: nn.Module, depth: float, generator: torch.Generator) -> None:
    match module:
        case HyenaMixer() | OrderNHyenaMixer() | MultiHeadHyenaMixer() | BidirectionalHyenaMixer() | GatedConvMixer():
            bound = 1 / math.sqrt(module.short_taps.shape[1])  # torch's default for a depthwise convolution
            _uniform(module.short_taps, bound, generator)
            if module.short_bias is not None:
                module.short_bias.zero_()  # a constant input would grow with the length of what integrates it
            if not isinstance(module, GatedConvMixer) and module.skip is not None:
                _normal(module.skip, 1.0, generator)
            module.output.weight.div_(depth)
        case AttentionMixer():
            module.output.weight.div_(depth)
        case Encoder():
            if module.query is not None:
                module.query.zero_()  # then the mean
        case GatedMLP() | PlainMLP():
            module.down.weight.div_(depth)
        case FP8Linear():
            module.input_scale.fill_(1)
            module.weight_scale.fill_(1)
        case RMSNorm():
            module.scale.fill_(1)
        case LayerNorm():
            module.scale.fill_(1)
            module.bias.zero_()
        case ExplicitFilter():
            _normal(module.weight, 1 / math.sqrt(module.config.taps), generator)
        case ModalFilter():
            _initialise_modal(module, generator)
        case ImplicitFilter():
            _initialise_implicit(module, generator)
        case Rope() if module.inverse is not None:
            module.inverse.copy_(inverse_frequencies(module.head_size, module.config.base))
        case _:
            pass


def _initialise_modal(filter_: ModalFilter, generator: torch.Generator) -> None:
    g, n = filter_.residues.shape[:2]
    shortest, longest = filter_.config.timescales
    spread = torch.rand(g, n, generator=generator)
    exponent = (torch.arange(n) + spread) / n
    log_decay = -(math.log(shortest) + exponent * math.log(longest / shortest))  # log(1 / timescale)
    angle = math.pi * ((torch.arange(n) + torch.rand(g, n, generator=generator)) / n)
    angle = angle.gather(1, torch.rand(g, n, generator=generator).argsort(1))  # any timescale may get any frequency
    modulus = torch.exp(-torch.exp(log_decay))
    scale = torch.sqrt((1 - modulus**2) / n)
    if filter_.log_decay is not None:
        filter_.log_decay.copy_(log_decay)
    if filter_.angle is not None:
        filter_.angle.copy_(angle)
    if filter_.poles is not None:
        filter_.poles.copy_(modulus[..., None] * torch.stack([angle.cos(), angle.sin()], -1))
    if filter_.log_poles is not None:
        filter_.log_poles.copy_(-torch.exp(log_decay))
    noise = torch.randn(filter_.residues.shape, generator=generator)
    filter_.residues.copy_(noise * (scale[..., None] if filter_.is_complex else scale))


def _initialise_implicit(filter_: ImplicitFilter, generator: torch.Generator) -> None:
    for linear in [*(filter_.layers or ()), filter_.output]:
        assert isinstance(linear, nn.Linear)
        bound = 1 / math.sqrt(linear.in_features)
        _uniform(linear.weight, bound, generator)
        if linear.bias is not None:
            _uniform(linear.bias, bound, generator)
    if filter_.layers is not None:
        _spread_frequencies(filter_, generator)
    if filter_.frequency is not None:
        assert isinstance(filter_.config.activation, SineConfig)
        filter_.frequency.fill_(filter_.config.activation.frequency)
    if filter_.log_rates is not None:
        filter_.log_rates.copy_(filter_.first_rates().log())
    if filter_.features is not None:
        filter_.features.copy_(positional_features(filter_.config, filter_.config.max_length, filter_.features))
    if filter_.output.bias is not None:  # no constant tap: it would make the mean of all earlier inputs dominate
        filter_.output.bias.zero_()
        filter_.output.bias.copy_(-filter_.mean())
    if not filter_.config.bound and filter_.config.normalise is None:
        scale = filter_.energy().rsqrt().nan_to_num(posinf=1.0)
        filter_.output.weight.mul_(scale[:, None])
        if filter_.output.bias is not None:
            filter_.output.bias.mul_(scale)


def _spread_frequencies(filter_: ImplicitFilter, generator: torch.Generator) -> None:
    """Sines of the first layer that turn 1 to max_length / 2 times over the filter, at any phase.

    Every other one is drawn evenly over the octaves, the rest evenly over the frequencies. Only where the MLP sees the
    position itself, as its first feature, through sines.
    """
    config = filter_.config
    if not isinstance(config.activation, SineConfig) or isinstance(config.positions, SinusoidalConfig):
        return
    assert filter_.layers is not None
    first = filter_.layers[0]
    assert isinstance(first, nn.Linear)
    highest, draw = (config.max_length - 1) / 2, torch.rand(config.width, generator=generator)
    turns = torch.where(torch.arange(config.width) % 2 == 0, highest**draw, 1 + (highest - 1) * draw)
    sign = torch.randint(0, 2, (config.width,), generator=generator) * 2 - 1
    first.weight[:, 0] = 2 * math.pi * turns * sign / config.activation.frequency
    _uniform(first.bias, math.pi / config.activation.frequency, generator)


def _normal(tensor: torch.Tensor, std: float, generator: torch.Generator) -> None:
    tensor.copy_(torch.randn(tensor.shape, generator=generator) * std)


def _uniform(tensor: torch.Tensor, bound: float, generator: torch.Generator) -> None:
    tensor.copy_((torch.rand(tensor.shape, generator=generator) * 2 - 1) * bound)
