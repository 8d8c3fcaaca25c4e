"""The Hyena mixer: projection, short filter, gate, long filter, gate, projection."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from crocuta.config import (
    ComplexModalFilterConfig,
    ExplicitFilterConfig,
    FilterConfig,
    HyenaConfig,
    ImplicitFilterConfig,
    Precision,
    RealModalFilterConfig,
)
from crocuta.model.filters import ShortFilter, build_filter
from crocuta.model.fp8 import FP8Linear
from crocuta.model.linear import Linear
from crocuta.model.mixer import Mixer
from crocuta.model.state import FIRState, HyenaState, State
from crocuta.ops.blocks import compute_dtype
from crocuta.ops.fir import next_tail
from crocuta.ops.gate import fir_gate, fir_gate_stepwise
from crocuta.ops.kernels.gpu import MOST_TAPS
from crocuta.ops.kernels.library import runs_here
from crocuta.types import Hidden

Convolve: TypeAlias = Callable[[Hidden, Tensor | None], Hidden]
"""The long filter of a mixer: (u, D) -> h ∗ u + D · u, in u's dtype."""


class HyenaMixer(Mixer):
    """y = W_o( x2 · (h ∗ (x1·v) + D·(x1·v)) ), (x2, x1, v) = FIR(W_in x) (Poli et al. 2023; StripedHyena)."""

    def __init__(self, config: HyenaConfig, channels: int, precision: Precision = "exact") -> None:
        super().__init__()
        self.config = config
        projection = FP8Linear if config.fp8_projection else Linear
        self.projection = projection(channels, 3 * channels, bias=config.projection_bias)
        self.short_taps = nn.Parameter(torch.empty(3 * channels, config.short_taps))
        self.short_bias = nn.Parameter(torch.empty(3 * channels)) if config.short_bias else None
        self.filter = build_filter(config.filter, channels)
        self.skip = nn.Parameter(torch.empty(channels)) if config.skip else None
        self.output = Linear(channels, channels, bias=config.output_bias)
        self._rounds = precision == "upstream"
        self._fir_gate = fir_gate_stepwise if precision == "upstream" else fir_gate
        self._with_skip = _skip_rule(config.filter, precision)
        self._unproject = unproject_stepwise if precision == "upstream" else unproject

    def forward(self, x: Hidden, lengths: Tensor | None = None) -> Hidden:
        if self._fuses(x, continued=False):
            short = ShortFilter(self.short_taps, self.short_bias, None)
            return self.output(self.filter.fused(self.projection(x), short, self.skip))
        x2, u = self._fir_gate(project(x, self.projection), self.short_taps, self.short_bias)
        return self._unproject(x2 * self._with_skip(self.filter.convolve, u, self.skip), self.output)

    def init_state(self, batch: int, max_length: int | None, *, device: torch.device, dtype: torch.dtype) -> HyenaState:
        channels = self.short_taps.shape[0]
        tail = torch.zeros(batch, self.config.short_taps - 1, channels, device=device, dtype=dtype)
        return HyenaState(FIRState(tail), self.filter.init_state(batch, max_length, device=device, dtype=dtype))

    def extend(self, x: Hidden, state: State, lengths: Tensor | None = None) -> Hidden:
        assert isinstance(state, HyenaState)
        if self._fuses(x, continued=True):
            z, tail = self.projection(x), state.short.tail
            state.short.tail = next_tail(z, tail, lengths)
            short = ShortFilter(self.short_taps, self.short_bias, tail)
            return self.output(self.filter.fused(z, short, self.skip, state.long, lengths))
        compiled = runs_here(x) and not self._stepwise(x)  # which wants the channels side by side, not time
        z = self.projection(x) if compiled else project(x, self.projection)
        x2, u = self._fir_gate(z, self.short_taps, self.short_bias, state.short.tail)
        state.short.tail = next_tail(z, state.short.tail, lengths)

        def convolve(u: Hidden, skip: Tensor | None) -> Hidden:
            return self.filter.extend(u, skip, state.long, lengths)

        y = x2 * self._with_skip(convolve, u, self.skip)
        return self.output(y) if compiled else self._unproject(y, self.output)

    def _fuses(self, x: Hidden, *, continued: bool) -> bool:
        """Whether one operator does it all: where nothing between is to be rounded, and on a GPU for few taps."""
        many = self.config.short_taps > MOST_TAPS and x.device.type != "cpu"
        if many or self._stepwise(x):
            return False
        return self.filter.fuses(x.device, x.shape[1], continued=continued)

    def _stepwise(self, x: Hidden) -> bool:
        return self._rounds and (compute_dtype(x.dtype) != x.dtype or torch.is_autocast_enabled(x.device.type))


def _skip_rule(config: FilterConfig, precision: Precision) -> Callable[[Convolve, Hidden, Tensor | None], Hidden]:
    """How the D term is rounded; see ``ModelConfig.precision``."""
    if precision == "exact":
        return _skip_by_filter
    match config:
        case ExplicitFilterConfig() | ImplicitFilterConfig():
            return _skip_in_float32
        case ComplexModalFilterConfig() | RealModalFilterConfig():
            return _skip_stepwise


def _skip_by_filter(convolve: Convolve, u: Hidden, skip: Tensor | None) -> Hidden:
    return convolve(u, skip)


def _skip_in_float32(convolve: Convolve, u: Hidden, skip: Tensor | None) -> Hidden:
    return convolve(u.to(compute_dtype(u.dtype)), skip).to(u.dtype)


def _skip_stepwise(convolve: Convolve, u: Hidden, skip: Tensor | None) -> Hidden:
    """The convolution, D · u and their sum, each rounded to u's dtype; from float32 upwards as the filter likes it."""
    if skip is None or compute_dtype(u.dtype) == u.dtype:
        return convolve(u, skip)
    return convolve(u, None) + skip.to(u.dtype) * u


def project(x: Hidden, linear: nn.Linear) -> Float[Tensor, "b l c"]:
    """W x + bias, laid out with time contiguous: the matrix product transposes for free what a copy would."""
    if isinstance(linear, FP8Linear):
        return linear(x)
    b, l, _ = x.shape
    flat = x.reshape(b * l, -1).t()
    z = torch.mm(linear.weight, flat) if linear.bias is None else torch.addmm(linear.bias[:, None], linear.weight, flat)
    return z.view(-1, b, l).permute(1, 2, 0)


def unproject(y: Hidden, linear: nn.Linear) -> Hidden:
    """W y + bias for y with time contiguous, back with channels contiguous."""
    b, l, d = y.shape
    flat = y.permute(2, 0, 1).reshape(d, b * l).t()
    out = (
        torch.mm(flat, linear.weight.t()) if linear.bias is None else torch.addmm(linear.bias, flat, linear.weight.t())
    )
    return out.view(b, l, -1)


def unproject_stepwise(y: Hidden, linear: nn.Linear) -> Hidden:
    """``unproject`` with the product rounded to y's dtype before the bias is added, as the published code does."""
    b, l, d = y.shape
    product = torch.mm(y.permute(2, 0, 1).reshape(d, b * l).t(), linear.weight.t()).view(b, l, -1)
    if linear.bias is None:
        return product
    return product + linear.bias if compute_dtype(y.dtype) != y.dtype else unproject(y, linear)
