"""The gated depthwise convolution: a short filter and a gate."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from crocuta.config import GatedConvConfig, Precision
from crocuta.model.hyena import project
from crocuta.model.linear import Linear
from crocuta.model.mixer import Mixer
from crocuta.model.norm import build_norm
from crocuta.model.state import FIRState, State
from crocuta.ops.fir import fir, next_tail
from crocuta.ops.mlp import activate
from crocuta.types import Hidden


class GatedConvMixer(Mixer):
    """y = W_out( W_p act(norm(FIR(a))) · σ(g) ), (a, g) = W_in x; norm, act, W_p where they are asked for."""

    def __init__(self, config: GatedConvConfig, channels: int, precision: Precision = "exact") -> None:
        super().__init__()
        self.config = config
        self.projection = Linear(channels, 2 * channels, bias=config.bias)
        self.short_taps = nn.Parameter(torch.empty(channels, config.taps))
        self.short_bias = nn.Parameter(torch.empty(channels)) if config.bias else None
        self.norm = None if config.norm is None else build_norm(config.norm, channels, precision)
        self.pointwise = Linear(channels, channels, bias=config.bias) if config.pointwise else None
        self.output = Linear(channels, channels, bias=config.bias)

    def forward(self, x: Hidden, lengths: Tensor | None = None) -> Hidden:
        a, gate = project(x, self.projection).chunk(2, dim=-1)
        return self._gated(fir(a, self.short_taps, self.short_bias), gate)

    def init_state(self, batch: int, max_length: int | None, *, device: torch.device, dtype: torch.dtype) -> FIRState:
        channels = self.short_taps.shape[0]
        return FIRState(torch.zeros(batch, self.config.taps - 1, channels, device=device, dtype=dtype))

    def extend(self, x: Hidden, state: State, lengths: Tensor | None = None) -> Hidden:
        assert isinstance(state, FIRState)
        a, gate = project(x, self.projection).chunk(2, dim=-1)
        filtered = fir(a, self.short_taps, self.short_bias, state.tail)
        state.tail = next_tail(a, state.tail, lengths)
        return self._gated(filtered, gate)

    def _gated(self, filtered: Hidden, gate: Hidden) -> Hidden:
        y = filtered if self.norm is None else self.norm(filtered)[1]
        y = activate(y, self.config.activation)
        if self.pointwise is not None:
            y = self.pointwise(y)
        return self.output(y * torch.sigmoid(gate))
