"""The deep-dive operator as its tutorial describes it, in plain functions; each fault can be put right by itself.

Written from the description alone. Two bodies of the published text are lost, the FFT convolution and the short one.
What stands here for them is the reading under which the rest of the text works: a transform of the power of two above
twice the length, and a depthwise convolution of three taps, padded on both sides because nothing is cut off
afterwards. The activation that the text puts behind the short convolution is left out on both sides.

With every fault off this is ``OrderNHyenaMixer`` of the preset, to rounding (tests/benchmarks/test_deep_dive.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from crocuta.model.filters import ImplicitFilter
from crocuta.model.linear import Linear
from crocuta.model.order_n import OrderNHyenaMixer


@dataclass(frozen=True, kw_only=True)
class Faults:
    """What the tutorial does; False is the correction."""

    centred_short: bool = True
    """The short convolution is padded on both sides: it reads the next token."""
    current_window: bool = True
    """The window runs from 0 to 1 over the current length, and not over max_length."""
    one_window: bool = True
    """One pair alpha, beta for all channels, neither bounded, both 1 at first: exp(-t) ends at 0.37."""
    relu: bool = True
    """ReLU, and not sines, in the filter's MLP."""
    unnormalised: bool = True
    """Filters are bounded by tanh alone."""
    one_norm: bool = True
    """The value and all gates share one norm."""
    no_output: bool = True
    """No projection behind the recurrence and no D."""
    dropout_each_step: bool = True
    """Dropout inside the recurrence as well as behind the layer."""
    complex_fft: bool = True
    """A complex transform of real numbers, its length a power of two."""


AS_WRITTEN = Faults()
CORRECTED = Faults(**dict.fromkeys((field.name for field in dataclasses.fields(Faults)), False))


def only(name: str) -> Faults:
    """One fault, everything else put right."""
    return dataclasses.replace(CORRECTED, **{name: True})


@dataclass
class FilterWeights:
    """An MLP of linear maps (weight, bias), the frequency of its sines, and the windows."""

    layers: list[tuple[Tensor, Tensor]]
    frequency: Tensor
    window: Tensor
    """[2] alpha and beta of all channels."""
    rates: Tensor
    """[d] decay of each channel over max_length, where windows are put right."""


@dataclass
class Weights:
    """Of one operator of ``order`` = len(filters); branches are the gates in the order of their use, and the value."""

    projection: Tensor
    """[(order + 1) · d, d]."""
    short: Tensor
    """[(order + 1) · d, taps]; taps[:, 0] multiplies the current token, the next one where that is read."""
    norms: list[tuple[Tensor, Tensor]]
    """Scale and bias of each branch; the first pair alone where one norm is shared."""
    filters: list[FilterWeights]
    skips: Tensor
    """D, [order, d]."""
    output: tuple[Tensor, Tensor]

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor there is."""
        yield from (self.projection, self.short, self.skips, *self.output)
        for pair in self.norms:
            yield from pair
        for filter_ in self.filters:
            yield from (filter_.frequency, filter_.window, filter_.rates)
            for pair in filter_.layers:
                yield from pair


def tutorial_weights(seed: int, channels: int, order: int = 2, width: int = 64) -> Weights:
    """torch's defaults for the layers, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(fan_in: int, *shape: int) -> Tensor:
        return (torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1) / math.sqrt(fan_in)

    def mlp() -> FilterWeights:
        sizes = [width // 2, width, width, channels]
        layers = [(uniform(a, b, a), uniform(a, b)) for a, b in zip(sizes[:-1], sizes[1:], strict=True)]
        ones = torch.ones(max(width, 2), dtype=torch.float64)
        return FilterWeights(layers, 10 * ones[:width], ones[:2], torch.ones(channels, dtype=torch.float64))

    branches = order + 1
    unit = torch.ones(channels, dtype=torch.float64)
    return Weights(
        projection=uniform(channels, branches * channels, channels),
        short=uniform(3, branches * channels, 3),
        norms=[(unit, 0 * unit) for _ in range(branches)],
        filters=[mlp() for _ in range(order)],
        skips=torch.zeros(order, channels, dtype=torch.float64),
        output=(torch.eye(channels, dtype=torch.float64), 0 * unit),
    )


def weights_of(mixer: OrderNHyenaMixer) -> Weights:
    """Those of the preset's mixer, in float64: what shows one fault, and nothing else, by switching it on."""
    order = mixer.config.convolutions
    used = [*reversed(range(order)), order]  # it uses its gates from the last to the first
    pairs = [(norm.scale, norm.bias) for norm in mixer.branch_norms]
    assert mixer.skip is not None
    weights = Weights(
        projection=torch.cat([mixer.projection.weight.chunk(order + 1)[i] for i in used]),
        short=torch.cat([mixer.short_taps.chunk(order + 1)[i] for i in used]),
        norms=[pairs[i] for i in used],
        filters=[_filter_weights(filter_) for filter_ in mixer.filters if isinstance(filter_, ImplicitFilter)],
        skips=mixer.skip,
        output=(mixer.output.weight, mixer.output.bias),
    )
    for tensor in weights.tensors():
        tensor.data = tensor.data.double()
    return weights


def _filter_weights(filter_: ImplicitFilter) -> FilterWeights:
    assert filter_.layers is not None
    assert filter_.frequency is not None
    assert filter_.log_rates is not None
    maps = [layer for layer in (*filter_.layers, filter_.output) if isinstance(layer, Linear)]
    layers = [(layer.weight.detach(), layer.bias.detach()) for layer in maps]
    return FilterWeights(layers, filter_.frequency.detach(), torch.ones(2), filter_.log_rates.detach().double().exp())


# --- the operator ---


def operator(
    x: Tensor,
    weights: Weights,
    faults: Faults = AS_WRITTEN,
    *,
    max_length: int,
    dropout: float = 0.0,
    residual: float = 0.1,
    convolve: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """[b l d] -> [b l d]; ``convolve`` does the long convolutions, by default with the transform that is asked for."""
    transform = convolve or (complex_convolution if faults.complex_fft else real_convolution)
    *gates, value = branches(x, weights, faults)
    y = value
    for i, (gate, filter_) in enumerate(zip(gates, weights.filters, strict=True)):
        mixed = transform(y, taps(filter_, x.shape[1], faults, max_length))
        mixed = mixed if faults.no_output else mixed + weights.skips[i] * y
        y = mixed * gate
        if i > 0:
            y = y + residual * value
        if faults.dropout_each_step:
            y = F.dropout(y, dropout)
    return F.dropout(y if faults.no_output else F.linear(y, *weights.output), dropout)


def branches(x: Tensor, weights: Weights, faults: Faults) -> list[Tensor]:
    """The gates in the order of their use, and the value, each [b l d]."""
    parts = short_convolution(F.linear(x, weights.projection), weights.short, faults).chunk(len(weights.norms), dim=-1)
    norms = weights.norms[:1] * len(weights.norms) if faults.one_norm else weights.norms
    return [F.layer_norm(part, part.shape[-1:], *norm) for part, norm in zip(parts, norms, strict=True)]


def short_convolution(u: Tensor, short: Tensor, faults: Faults) -> Tensor:
    """Depthwise, [b l c] -> [b l c]."""
    k = short.shape[1]
    padding = (k // 2, (k - 1) // 2) if faults.centred_short else (k - 1, 0)
    padded = F.pad(u.transpose(1, 2), padding)
    return F.conv1d(padded, short.flip(1)[:, None], groups=len(short)).transpose(1, 2)


def taps(filter_: FilterWeights, length: int, faults: Faults, max_length: int) -> Tensor:
    """The first ``length`` taps of each channel, [d l]: MLP, tanh, window."""
    reach = length if faults.current_window else max_length
    x = positions(reach, filter_.layers[0][0].shape[1], max_length).to(filter_.rates)
    *inner, last = filter_.layers
    for layer in inner:
        x = F.linear(x, *layer)
        x = torch.relu(x) if faults.relu else torch.sin(filter_.frequency * x)
    h = torch.tanh(F.linear(x, *last)) * window(filter_, reach, faults)
    if not faults.unnormalised:
        h = h / h.norm(dim=0)
    return h[:length].t()


def window(filter_: FilterWeights, reach: int, faults: Faults) -> Tensor:
    """[reach d]."""
    t = torch.linspace(0, 1, reach, dtype=filter_.rates.dtype)[:, None]
    alpha, beta = filter_.window
    return (
        alpha * torch.exp(-beta * t).expand(-1, len(filter_.rates))
        if faults.one_window
        else torch.exp(-t * filter_.rates)
    )


def positions(length: int, features: int, max_length: int) -> Tensor:
    """Sines and cosines in turn, times exp(-4 t) with t from 0 to 1 over max_length, [length features]."""
    i = torch.arange(length, dtype=torch.float64)[:, None]
    angle = i * 10_000.0 ** (-2 * torch.arange(features // 2, dtype=torch.float64) / features)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1) * torch.exp(-4 * i / (max_length - 1))


# --- long convolutions of y [b l d] with taps [d l] ---


def complex_convolution(y: Tensor, h: Tensor) -> Tensor:
    """As the tutorial has it: "better precision than real-only"."""
    l = y.shape[1]
    n = 1 << (2 * l - 1).bit_length()
    wide = torch.complex128 if y.dtype == torch.float64 else torch.complex64
    product = torch.fft.fft(y.transpose(1, 2).to(wide), n=n) * torch.fft.fft(h.to(wide), n=n)
    return torch.fft.ifft(product).real[..., :l].transpose(1, 2)


def real_convolution(y: Tensor, h: Tensor) -> Tensor:
    """The same with transforms of real numbers."""
    l = y.shape[1]
    n = 1 << (2 * l - 1).bit_length()
    product = torch.fft.rfft(y.transpose(1, 2), n=n) * torch.fft.rfft(h, n=n)
    return torch.fft.irfft(product, n=n)[..., :l].transpose(1, 2)


def direct_convolution(y: Tensor, h: Tensor) -> Tensor:
    """By sums alone: what does not depend on an input has a gradient of exactly 0 for it."""
    l = y.shape[1]
    lag = torch.arange(l)[:, None] - torch.arange(l)
    matrix = torch.where(lag >= 0, h[:, lag.clamp(min=0)], h.new_zeros(()))
    return torch.einsum("dtj,bjd->btd", matrix, y)


# --- norm and width of the layer around it ---


def rms_norm(x: Tensor, eps: float = 1e-8) -> Tensor:
    """In the input's precision, eps outside the root."""
    return x / (x.square().mean(-1, keepdim=True).sqrt() + eps)


def mlp_width(channels: int) -> int:
    """Of the SwiGLU."""
    return int(8 / 3 * channels)


def decayed(name: str) -> bool:
    """Whether a parameter of this name gets the weight decay of 0.1."""
    return "window_params" not in name and "filter_network" not in name
