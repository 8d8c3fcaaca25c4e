"""Multi-head Hyena: long convolutions of outer products."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from crocuta.config import MultiHeadHyenaConfig
from crocuta.model.filters import build_filter
from crocuta.model.hyena import project, unproject
from crocuta.model.linear import Linear
from crocuta.model.mixer import Mixer
from crocuta.model.state import FIRState, HyenaState, State
from crocuta.ops.fir import fir, next_tail
from crocuta.types import Hidden


class MultiHeadHyenaMixer(Mixer):
    """y_m[i] = Σ_j (h_m ∗ (k_m[i] · v_m[j]) + D_m · k_m[i] · v_m[j]) · q_m[j] (Massaroli et al. 2023, section 4).

    The filter sees the d · N products of all heads as its channels, in groups of N² that share one filter.
    """

    def __init__(self, config: MultiHeadHyenaConfig, channels: int) -> None:
        super().__init__()
        self.config = config
        self.heads, self.head_size = config.num_heads, channels // config.num_heads
        self.projection = Linear(channels, 3 * channels, bias=config.projection_bias)
        self.short_taps = nn.Parameter(torch.empty(3 * channels, config.short_taps))
        self.short_bias = nn.Parameter(torch.empty(3 * channels)) if config.short_bias else None
        one_a_head = dataclasses.replace(config.filter, groups=config.num_heads)
        self.filter = build_filter(one_a_head, channels * self.head_size)
        self.skip = nn.Parameter(torch.empty(config.num_heads)) if config.skip else None
        self.output = Linear(channels, channels, bias=config.output_bias)

    def forward(self, x: Hidden, lengths: Tensor | None = None) -> Hidden:
        q, u = self._products(fir(project(x, self.projection), self.short_taps, self.short_bias))
        return self._read(self.filter.convolve(u, self._skip()), q)

    def init_state(self, batch: int, max_length: int | None, *, device: torch.device, dtype: torch.dtype) -> HyenaState:
        tail = torch.zeros(batch, self.config.short_taps - 1, self.short_taps.shape[0], device=device, dtype=dtype)
        return HyenaState(FIRState(tail), self.filter.init_state(batch, max_length, device=device, dtype=dtype))

    def extend(self, x: Hidden, state: State, lengths: Tensor | None = None) -> Hidden:
        assert isinstance(state, HyenaState)
        z = project(x, self.projection)
        q, u = self._products(fir(z, self.short_taps, self.short_bias, state.short.tail))
        state.short.tail = next_tail(z, state.short.tail, lengths)
        return self._read(self.filter.extend(u, self._skip(), state.long, lengths), q)

    def _products(self, z: Hidden) -> tuple[Tensor, Hidden]:
        """q as [m 1 N b l], and k_m[i] · v_m[j] as channels (m, i, j) of a [b l c] with time contiguous."""
        b, l, _ = z.shape
        q, k, v = z.permute(2, 0, 1).reshape(3, self.heads, self.head_size, b, l)
        u = k[:, :, None] * v[:, None, :]
        return q[:, None], u.reshape(-1, b, l).permute(1, 2, 0)

    def _read(self, y: Hidden, q: Tensor) -> Hidden:
        """Σ_j y[m, i, j] · q[m, j], and the output projection."""
        b, l, _ = y.shape
        products = y.permute(2, 0, 1).reshape(self.heads, self.head_size, self.head_size, b, l) * q
        return unproject(products.sum(2).reshape(-1, b, l).permute(1, 2, 0), self.output)

    def _skip(self) -> Tensor | None:
        return None if self.skip is None else self.skip.repeat_interleave(self.head_size**2)
