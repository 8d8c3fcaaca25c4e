"""Taps from an MLP over positions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from crocuta.config import (
    BandsConfig,
    FixedWindowConfig,
    ImplicitFilterConfig,
    LearnedWindowConfig,
    PositionsConfig,
    ScalarConfig,
    SineConfig,
    SinusoidalConfig,
)
from crocuta.errors import InputError
from crocuta.model.filters.base import Filter, ShortFilter, extend_online, online_state
from crocuta.model.linear import Linear, affine
from crocuta.model.precision import Memo
from crocuta.model.state import OnlineState, State
from crocuta.ops.blocks import compute_dtype, full_precision
from crocuta.ops.dispatch import Case, choose
from crocuta.ops.fft_conv import fft_convolution, filter_spectrum
from crocuta.ops.implicit import implicit_taps
from crocuta.ops.kernels.fft_conv import filter_spectrum as compiled_spectrum
from crocuta.ops.kernels.hyena_fft import hyena_fft
from crocuta.ops.kernels.online_conv import OnlineFilter
from crocuta.ops.online_conv import buffer_length
from crocuta.ops.window import decay_window, plain_decay_window
from crocuta.types import Hidden

DecayWindow: TypeAlias = Callable[[Tensor, Tensor, float, float], Tensor]


class ImplicitFilter(Filter):
    """h[t] = MLP(positions(t)) · window(t) (Hyena §3.3; HyenaDNA), with a bound and a norm where asked.

    t runs from 0 to 1 over ``max_length``, whatever the current length, so taps never depend on it. ``shares`` names
    another filter whose MLP this one uses, up to the last layer, which is its own; ``rates`` are the window's.
    """

    def __init__(
        self,
        config: ImplicitFilterConfig,
        channels: int,
        *,
        shares: ImplicitFilter | None = None,
        part: tuple[slice, int] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.channels = channels
        self.groups = config.groups or channels
        self._part = part or (slice(None), self.groups)
        own = shares is None
        widths = [feature_count(config.positions)] + [config.width] * (config.inner_layers + 1)
        sine = config.activation if isinstance(config.activation, SineConfig) else None
        stored = isinstance(config.positions, BandsConfig) and config.positions.trained
        self.layers = nn.ModuleList(Linear(a, b) for a, b in zip(widths[:-1], widths[1:])) if own else None
        self.frequency = nn.Parameter(torch.empty(config.width)) if own and sine and sine.trained else None
        self.features = nn.Parameter(torch.empty(config.max_length, widths[0])) if own and stored else None
        self.output = Linear(config.width, self.groups, bias=config.output_bias)
        learned = isinstance(config.window, LearnedWindowConfig)
        self.log_rates = nn.Parameter(torch.empty(self.groups)) if learned else None
        self._shares = (shares,)  # in a tuple: its parameters are not this filter's
        self._memo = Memo()
        self._reach = 1

    def taps(self, length: int) -> Float[Tensor, "g k"]:
        if length > self.config.max_length:
            raise InputError(
                "the sequence is longer than the implicit filter is defined for",
                given=f"{length} tokens",
                expected=f"at most {self.config.max_length}",
                fix="build the model with a larger filter max_length",
            )
        return self._memo.get("taps", self._weights(), lambda: self._make_taps(self.output.weight, length), length)

    def _weights(self) -> list[Tensor]:
        source = self._shares[0] or self
        assert source.layers is not None
        parts = (source, *source.layers, self.output, *([self] if source is not self else []))
        return [p for part in parts for p in part._parameters.values() if p is not None]

    @full_precision
    def _make_taps(self, like: Tensor, length: int) -> Float[Tensor, "g k"]:
        if self.config.normalise is None:
            return self._unnormalised(like, length)
        taps = self._unnormalised(like, self.config.max_length)  # the norm is that of the whole filter
        size = taps.abs().sum(1) if self.config.normalise == "absolute" else taps.square().sum(1).sqrt()
        return taps[:, :length] / size.clamp(min=torch.finfo(taps.dtype).tiny)[:, None]

    def _unnormalised(
        self, like: Tensor, length: int, step: int = 1, window: DecayWindow = decay_window
    ) -> Float[Tensor, "g k"]:
        """Every ``step``-th tap of the first ``length``: the MLP over positions in the dtype and place of ``like``."""
        config = self.config
        source = self._shares[0] or self
        assert source.layers is not None
        wide = torch.float64 if config.wide_positions and like.device.type != "mps" else like.dtype
        positions = like.new_empty(0, dtype=wide)
        x = positional_features(config, length, positions) if source.features is None else source.features[:length]
        layers = [affine(layer) for layer in source.layers]
        taps = implicit_taps(x[::step], layers, source._frequency(), affine(self.output))
        if config.bound:
            taps = torch.tanh(taps)
        rates = self.rates(like)
        if rates is None:
            return taps
        assert config.window is not None
        return window(taps, rates, config.window.shift, step / max(1, config.max_length - 1))

    def energy(self) -> Float[Tensor, " g"]:
        """Σ h[t]² over max_length before normalisation, of at most 4,096 evenly spaced taps."""
        return self.config.max_length * self._sample().square().mean(1)

    def mean(self) -> Float[Tensor, " g"]:
        """The mean tap over max_length before normalisation, of at most 4,096 evenly spaced taps."""
        return self._sample().mean(1)

    def _sample(self) -> Float[Tensor, "g k"]:
        # by torch alone: the weights that a seed gives must not depend on whether there was a compiler
        length, step = self.config.max_length, -(-self.config.max_length // 4096)
        return self._unnormalised(self.output.weight, length, step, plain_decay_window)

    def _frequency(self) -> Tensor | None:
        """Of the sine that is the MLP's activation; None where that is a ReLU."""
        if not isinstance(self.config.activation, SineConfig):
            return None
        if self.frequency is not None:
            return self.frequency
        return torch.tensor(self.config.activation.frequency, dtype=torch.float64)  # a number: it widens nothing

    def rates(self, like: Tensor) -> Float[Tensor, " g"] | None:
        """The decay of each filter's window over max_length, in the dtype of ``like``; None without a window."""
        if self.config.window is None:
            return None
        if self.log_rates is not None:
            return torch.exp(self.log_rates)
        assert isinstance(self.config.window, FixedWindowConfig)
        part, count = self._part
        return window_rates(self.config.window, count, like)[part]

    def first_rates(self) -> Float[Tensor, " g"]:
        """The rates that a learned window starts with: log-spaced, the slowest first."""
        window, (part, count) = self.config.window, self._part
        assert isinstance(window, LearnedWindowConfig)
        slow, fast = (-math.log(window.target) / fraction for fraction in (max(window.decay), min(window.decay)))
        return torch.logspace(math.log10(slow), math.log10(fast), count)[part]

    def convolve(self, u: Hidden, skip: Tensor | None) -> Hidden:
        taps = self.taps(u.shape[1])
        spectrum = None
        if not torch.is_grad_enabled():
            spectrum = self._memo.get(
                "spectrum", self._weights(), lambda: filter_spectrum(taps, u.shape[1]), u.shape[1]
            )
        return fft_convolution(u, taps, skip, spectrum)

    def fuses(self, device: torch.device, length: int, *, continued: bool) -> bool:
        case = Case(op="hyena_long", length=length, taps=length, continued=continued, device=device.type)
        return choose(case).name == "fused"

    def fused(
        self,
        z: Tensor,
        short: ShortFilter,
        skip: Tensor | None,
        state: State | None = None,
        lengths: Tensor | None = None,
    ) -> Hidden:
        length, dtype = z.shape[1], compute_dtype(z.dtype)
        taps = self.taps(length).to(dtype)
        spectrum = None
        if not torch.is_grad_enabled():
            spectrum = self._memo.get(
                "compiled spectrum", self._weights(), lambda: compiled_spectrum(taps, length), (length, dtype)
            )
        return hyena_fft(z, short.taps, short.bias, taps, skip, spectrum)

    def init_state(
        self, batch: int, max_length: int | None, *, device: torch.device, dtype: torch.dtype
    ) -> OnlineState:
        length = buffer_length(self.config.max_length, max_length or self.config.max_length)
        return online_state(batch, self.channels, length, device=device, dtype=dtype)

    def extend(self, u: Hidden, skip: Tensor | None, state: State, lengths: Tensor | None) -> Hidden:
        assert isinstance(state, OnlineState)
        return extend_online(self, u, skip, state, lengths, self._longest(state))

    def _longest(self, state: OnlineState) -> int:
        return min(state.long.shape[2], self.config.max_length)

    def online(self, state: OnlineState) -> OnlineFilter:
        longest = self._longest(state)
        # never fewer taps than before: states of different lengths, used in turn, must not make each other's anew
        self._reach = max(self._reach, min(1 << (longest - 1).bit_length(), self.config.max_length))
        return self._memo.get(
            "online", self._weights(), lambda: OnlineFilter(self.taps(self._reach), self.channels), self._reach
        )


def feature_count(config: PositionsConfig) -> int:
    """Numbers that describe one position."""
    return 1 if isinstance(config, ScalarConfig) else config.features


def positional_features(config: ImplicitFilterConfig, length: int, like: Tensor) -> Float[Tensor, "l e"]:
    """What the MLP sees of the first ``length`` positions, by the formula of ``config.positions``."""
    match config.positions:
        case BandsConfig(features=features):
            return _bands(config.max_length, features, length, like)
        case ScalarConfig():
            return _positions(config, length, like)
        case SinusoidalConfig(features=features, base=base, decay=decay):
            i = torch.arange(length, device=like.device, dtype=like.dtype)[:, None]
            j = torch.arange(features // 2, device=like.device, dtype=like.dtype)
            angle = i * base ** (-2 * j / features)
            pairs = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)
            return pairs * torch.exp(-decay * _positions(config, length, like))


def _bands(max_length: int, features: int, length: int, like: Tensor) -> Float[Tensor, "l e"]:
    """[t, cos(f·w), -sin(f·w)].

    The complex exponential, and not a cosine and a sine, because it gives the published numbers to the last bit;
    trained filters enlarge a difference there a thousand times.
    """
    bands = (features - 1) // 2
    i = torch.arange(length, device=like.device, dtype=like.dtype)[:, None]
    f = torch.linspace(1e-4, bands - 1, bands, device=like.device, dtype=like.dtype)
    wave = torch.exp(-1j * (f * (2 * math.pi * i / max_length)))
    t = torch.linspace(0, 1, max_length, device=like.device, dtype=like.dtype)[:length, None]
    return torch.cat([t, wave.real, wave.imag], dim=-1)


def _positions(config: ImplicitFilterConfig, length: int, like: Tensor) -> Float[Tensor, "l 1"]:
    """The first ``length`` of max_length points from 0 to 1."""
    return torch.linspace(0, 1, config.max_length, device=like.device, dtype=like.dtype)[:length, None]


def window_rates(window: FixedWindowConfig, channels: int, like: Tensor) -> Float[Tensor, " d"]:
    """|δ_c|, evenly spaced from the slowest to the fastest."""
    fast, slow = (math.log(window.target) / fraction for fraction in window.decay)
    return torch.linspace(slow, fast, channels, device=like.device, dtype=like.dtype).abs()
