"""Filters: what makes the kernel of a long convolution, and how each kind carries its past.

    explicit taps  ->  a Toeplitz product          state: the last k - 1 inputs
       (many taps)     FFT, continued online       state: as many inputs and partial outputs as there are taps
    modal          ->  chunked recurrence          state: n modes a channel
    implicit MLP   ->  FFT, continued online       state: all earlier inputs (no recurrence exists)

Every parameter here stays in float32 (``Float32Module``).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from crocuta.config import (
    ComplexModalFilterConfig,
    ExplicitFilterConfig,
    ImplicitFilterConfig,
    RealModalFilterConfig,
)
from crocuta.errors import InputError
from crocuta.model.linear import Linear
from crocuta.model.precision import Float32Module, Memo
from crocuta.model.state import FIRState, ModalState, OnlineState, State, check_room
from crocuta.ops import modal
from crocuta.ops.blocks import full_precision
from crocuta.ops.dispatch import Case, choose
from crocuta.ops.fft_conv import fft_convolution, filter_spectrum
from crocuta.ops.fir import fir, next_tail
from crocuta.ops.online_conv import BLOCK, OnlineTaps, buffer_length, online_convolution
from crocuta.types import Hidden


class Filter(Float32Module):
    """A bank of filters over channels, convolved causally with u [b l d]; ``skip`` [d] adds D · u."""

    def _weights(self) -> list[Tensor]:
        """What taps, tables and spectra are derived from: all parameters. ``parameters()`` takes 20 µs a token."""
        return [p for p in self._parameters.values() if p is not None]

    @abstractmethod
    def taps(self, length: int) -> Float[Tensor, "g k"]:
        """The first taps of the kernel, at most ``length``; tap 0 multiplies the current input."""

    @abstractmethod
    def convolve(self, u: Hidden, skip: Tensor | None) -> Hidden:
        """The whole convolution of sequences that start here."""

    @abstractmethod
    def init_state(self, batch: int, max_length: int | None, *, device: torch.device, dtype: torch.dtype) -> State:
        """The state before the first input."""

    @abstractmethod
    def extend(self, u: Hidden, skip: Tensor | None, state: State, lengths: Tensor | None) -> Hidden:
        """The convolution continued from ``state``, which is updated; inputs past ``lengths[row]`` are padding."""


class ExplicitFilter(Filter):
    """Learned taps [g k], under a fixed envelope where the configuration asks for one."""

    def __init__(self, config: ExplicitFilterConfig, channels: int) -> None:
        super().__init__()
        self.config = config
        self.channels = channels
        self.weight = nn.Parameter(torch.empty(config.groups or channels, config.taps))
        self._is_online = choose(Case(op="fir", length=1, taps=config.taps, continued=True)).name == "online"
        self._memo = Memo()

    def taps(self, length: int) -> Float[Tensor, "g k"]:
        decay = self.config.decay
        taps = self.weight[:, :length]
        if decay is None:
            return taps
        slowest, fastest = (math.log10(rate) for rate in decay.rates)
        rates = torch.logspace(slowest, fastest, len(taps), device=taps.device, dtype=taps.dtype)
        t = torch.arange(taps.shape[1], device=taps.device, dtype=taps.dtype) / max(1, decay.horizon - 1)
        return taps * torch.exp(-rates[:, None] * t)

    def convolve(self, u: Hidden, skip: Tensor | None) -> Hidden:
        taps = self.taps(self.config.taps)
        match choose(Case(op="fir", length=u.shape[1], taps=taps.shape[1])).name:
            case "toeplitz":
                return self._toeplitz(u, skip, None)
            case _:
                return fft_convolution(u, taps, skip)

    def init_state(self, batch: int, max_length: int | None, *, device: torch.device, dtype: torch.dtype) -> State:
        if self._is_online:  # one size for every length: rows of any length can share a state
            length = buffer_length(self.config.taps, None)
            return _online_state(batch, self.channels, length, device=device, dtype=dtype)
        return FIRState(torch.zeros(batch, self.config.taps - 1, self.channels, device=device, dtype=dtype))

    def extend(self, u: Hidden, skip: Tensor | None, state: State, lengths: Tensor | None) -> Hidden:
        if isinstance(state, OnlineState):
            return _extend_online(u, skip, self._online_taps, state, lengths, None)
        assert isinstance(state, FIRState)
        y = self._toeplitz(u, skip, state.tail)
        state.tail = next_tail(u, state.tail, lengths)
        return y

    def _toeplitz(self, u: Hidden, skip: Tensor | None, tail: Tensor | None) -> Hidden:
        y = fir(u, self.taps(self.config.taps), None, tail)
        return y if skip is None else y + skip.to(u.dtype) * u

    def _online_taps(self) -> OnlineTaps:
        return self._memo.get("online", self._weights(), lambda: OnlineTaps(self.taps(self.config.taps), self.channels))


class ModalFilter(Filter):
    """h[t] = Re Σ R p^t with complex or real poles; "stable" ones are |p| < 1 by parametrisation.

    Stable: log|p| = -exp(log_decay), with the angle of a complex pole free. Raw: ``poles`` [g n 2] (re, im), or
    ``log_poles`` [g n], as published files store them.
    """

    def __init__(self, config: ComplexModalFilterConfig | RealModalFilterConfig, channels: int) -> None:
        super().__init__()
        self.config = config
        self.channels = channels
        self.is_complex = isinstance(config, ComplexModalFilterConfig)
        shape = (config.groups or channels, config.modes)
        pair = (*shape, 2) if self.is_complex else shape
        stable = config.poles == "stable"
        self.log_decay = nn.Parameter(torch.empty(shape)) if stable else None
        self.angle = nn.Parameter(torch.empty(shape)) if stable and self.is_complex else None
        self.poles = nn.Parameter(torch.empty(pair)) if not stable and self.is_complex else None
        self.log_poles = nn.Parameter(torch.empty(shape)) if not stable and not self.is_complex else None
        self.residues = nn.Parameter(torch.empty(pair))
        self._memo = Memo()

    def logs(self) -> Float[Tensor, "g n *z"]:
        """The log-poles: (log modulus, angle), or the real log."""
        if self.poles is not None:
            re, im = self.poles.unbind(-1)
            tiny = torch.finfo(re.dtype).tiny
            return torch.stack([0.5 * torch.log((re * re + im * im).clamp(min=tiny)), torch.atan2(im, re)], dim=-1)
        if self.log_poles is not None:
            return self.log_poles
        assert self.log_decay is not None
        decay = -torch.exp(self.log_decay)
        return decay if self.angle is None else torch.stack([decay, self.angle], dim=-1)

    @torch.no_grad()
    def unstable_rows(self) -> list[int]:
        """The filters (channels, or groups of channels) with a pole that is not inside the unit circle."""
        if self.poles is not None:
            outside = self.poles.double().square().sum(-1) >= 1
        else:
            logs = self.logs()
            outside = (logs[..., 0] if self.is_complex else logs) >= 0
        return outside.any(-1).nonzero().flatten().tolist()

    def taps(self, length: int) -> Float[Tensor, "g k"]:
        return modal.modal_taps(self.logs(), self.residues, length)

    def convolve(self, u: Hidden, skip: Tensor | None) -> Hidden:
        return self._run(u, skip, None)[0]

    def init_state(self, batch: int, max_length: int | None, *, device: torch.device, dtype: torch.dtype) -> ModalState:
        pair = (2,) if self.is_complex else ()
        wide = torch.promote_types(dtype, torch.float32)
        return ModalState(torch.zeros(batch, self.channels, self.config.modes, *pair, device=device, dtype=wide))

    def extend(self, u: Hidden, skip: Tensor | None, state: State, lengths: Tensor | None) -> Hidden:
        assert isinstance(state, ModalState)
        y, last = self._run(u, skip, state.modes)
        if lengths is not None:
            last = modal.modal_final_state(u, self._tables(), self.logs(), state.modes, lengths)
        state.modes = last
        return y

    def _run(self, u: Hidden, skip: Tensor | None, modes: Tensor | None) -> tuple[Hidden, Tensor]:
        match choose(Case(op="modal", length=u.shape[1])).name:
            case "recurrent":
                poles, residues = self._memo.get("step", self._weights(), self._step_constants)
                return modal.recurrent(u, poles, residues, skip, modes)
            case _:
                return modal.chunked(u, self._tables(), skip, modes)

    def _tables(self) -> modal.ModalTables:
        return self._memo.get("tables", self._weights(), lambda: modal.modal_tables(self.logs(), self.residues))

    def _step_constants(self) -> tuple[Tensor, Tensor]:
        return modal.modal_step_constants(self.logs(), self.residues, self.channels)


class ImplicitFilter(Filter):
    """Taps from a sine MLP over positional features, times exp(-t|δ|) + shift (Hyena §3.3; HyenaDNA).

    t runs from 0 to 1 over ``max_length``, whatever the current length, so taps never depend on it.
    """

    def __init__(self, config: ImplicitFilterConfig, channels: int) -> None:
        super().__init__()
        self.config = config
        self.channels = channels
        widths = [config.features] + [config.width] * (config.inner_layers + 1)
        self.layers = nn.ModuleList(Linear(a, b) for a, b in zip(widths[:-1], widths[1:]))
        self.output = Linear(config.width, channels, bias=False)
        self.frequency = nn.Parameter(torch.empty(config.width))
        trained = config.train_features
        self.features = nn.Parameter(torch.empty(config.max_length, config.features)) if trained else None
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
        return self._memo.get("taps", self._weights(), lambda: self._make_taps(self.frequency, length), length)

    def _weights(self) -> list[Tensor]:
        parts = (self, *self.layers, self.output)
        return [p for part in parts for p in part._parameters.values() if p is not None]

    @full_precision
    def _make_taps(self, like: Tensor, length: int) -> Float[Tensor, "g k"]:
        """The MLP over positions made on the device and in the dtype of ``like``."""
        x = positional_features(self.config, length, like) if self.features is None else self.features[:length]
        for layer in self.layers:
            x = torch.sin(self.frequency * layer(x))
        return (self.output(x) * window(self.config, length, self.channels, like)).t().contiguous()

    def convolve(self, u: Hidden, skip: Tensor | None) -> Hidden:
        taps = self.taps(u.shape[1])
        spectrum = None
        if not torch.is_grad_enabled():
            spectrum = self._memo.get(
                "spectrum", self._weights(), lambda: filter_spectrum(taps, u.shape[1]), u.shape[1]
            )
        return fft_convolution(u, taps, skip, spectrum)

    def init_state(
        self, batch: int, max_length: int | None, *, device: torch.device, dtype: torch.dtype
    ) -> OnlineState:
        length = buffer_length(self.config.max_length, max_length or self.config.max_length)
        return _online_state(batch, self.channels, length, device=device, dtype=dtype)

    def extend(self, u: Hidden, skip: Tensor | None, state: State, lengths: Tensor | None) -> Hidden:
        assert isinstance(state, OnlineState)
        longest = min(state.long.shape[2], self.config.max_length)
        return _extend_online(u, skip, lambda: self._online_taps(longest), state, lengths, longest)

    def _online_taps(self, longest: int) -> OnlineTaps:
        # never fewer taps than before: states of different lengths, used in turn, must not make each other's anew
        self._reach = max(self._reach, min(1 << (longest - 1).bit_length(), self.config.max_length))
        return self._memo.get(
            "online", self._weights(), lambda: OnlineTaps(self.taps(self._reach), self.channels), self._reach
        )


def _online_state(batch: int, channels: int, length: int, *, device: torch.device, dtype: torch.dtype) -> OnlineState:
    wide = torch.promote_types(dtype, torch.float32)
    long, near = (torch.zeros(batch, *s, device=device, dtype=wide) for s in ((channels, length), (BLOCK, channels)))
    return OnlineState(long, near, torch.zeros(batch, dtype=torch.int64))


def _extend_online(
    u: Hidden,
    skip: Tensor | None,
    make_taps: Callable[[], OnlineTaps],
    state: OnlineState,
    lengths: Tensor | None,
    longest: int | None,
) -> Hidden:
    """``online_convolution`` on a state whose rows may reach ``longest`` inputs."""
    starts, counts = state.lengths.tolist(), None if lengths is None else lengths.tolist()
    if longest is not None and max(starts) + u.shape[1] > longest:
        check_room(state.lengths, u.shape[1] if lengths is None else lengths.cpu(), longest, "filter's")
    if state.taps is None or starts[0] % BLOCK == 0 or torch.is_grad_enabled():
        state.taps = make_taps()  # asking whether parameters have changed takes longer than a token's arithmetic
    skip = skip if skip is None or skip.dtype == u.dtype else skip.to(u.dtype)
    y = online_convolution(u, state.taps, state.buffers, starts, counts, skip)
    state.lengths.add_(u.shape[1] if lengths is None else lengths.cpu())
    return y


def positional_features(config: ImplicitFilterConfig, length: int, like: Tensor) -> Float[Tensor, "l e"]:
    """[t, cos(f·w), -sin(f·w)], w = 2π i / max_length, f from 1e-4 to bands - 1 (Hyena, appendix D.3).

    The complex exponential, and not a cosine and a sine, because it gives the published numbers to the last bit;
    trained filters enlarge a difference there a thousand times.
    """
    bands = (config.features - 1) // 2
    i = torch.arange(length, device=like.device, dtype=like.dtype)[:, None]
    f = torch.linspace(1e-4, bands - 1, bands, device=like.device, dtype=like.dtype)
    wave = torch.exp(-1j * (f * (2 * math.pi * i / config.max_length)))
    return torch.cat([_positions(config, length, like), wave.real, wave.imag], dim=-1)


def window(config: ImplicitFilterConfig, length: int, channels: int, like: Tensor) -> Float[Tensor, "l d"]:
    """exp(-t|δ_c|) + shift; channel 0 decays slowest, the last fastest (Hyena, exponential modulation)."""
    rates = window_rates(config, channels, like)
    return torch.exp(-_positions(config, length, like) * rates) + config.window_shift


def _positions(config: ImplicitFilterConfig, length: int, like: Tensor) -> Float[Tensor, "l 1"]:
    """The first ``length`` of max_length points from 0 to 1."""
    return torch.linspace(0, 1, config.max_length, device=like.device, dtype=like.dtype)[:length, None]


def window_rates(config: ImplicitFilterConfig, channels: int, like: Tensor) -> Float[Tensor, " d"]:
    """|δ_c|, evenly spaced from the slowest to the fastest."""
    fast, slow = (math.log(config.window_target) / fraction for fraction in config.window_decay)
    return torch.linspace(slow, fast, channels, device=like.device, dtype=like.dtype).abs()
