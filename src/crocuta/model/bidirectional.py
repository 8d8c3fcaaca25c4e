"""Hyena that sees both sides of a position, for encoders."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crocuta.config import BidirectionalHyenaConfig
from crocuta.model.filters import build_filter
from crocuta.model.hyena import project, unproject
from crocuta.model.linear import Linear
from crocuta.model.mixer import NonCausalMixer
from crocuta.ops.blocks import own_positions
from crocuta.ops.fir import fir
from crocuta.types import Hidden


class BidirectionalHyenaMixer(NonCausalMixer):
    """y = W_out( x2 · (h ∗ u + h' ⋆ u + D·u) ), u = x1 · v, (x2, x1, v) = FIR(W_in x) with centred taps.

    (h' ⋆ u)[t] = Σ_{j >= 0} h'[j] · u[t + j]: the causal convolution of the reversed sequence. Nothing wraps around, so
    every position sees every other one of its row.
    """

    def __init__(self, config: BidirectionalHyenaConfig, channels: int) -> None:
        super().__init__()
        self.config = config
        self.projection = Linear(channels, 3 * channels, bias=config.projection_bias)
        self.short_taps = nn.Parameter(torch.empty(3 * channels, config.short_taps))
        self.short_bias = nn.Parameter(torch.empty(3 * channels)) if config.short_bias else None
        self.filter = build_filter(config.filter, channels)
        self.filter_ahead = build_filter(config.filter, channels)
        self.skip = nn.Parameter(torch.empty(channels)) if config.skip else None
        self.output = Linear(channels, channels, bias=config.output_bias)

    def forward(self, x: Hidden, lengths: Tensor | None = None) -> Hidden:
        own = None if lengths is None else own_positions(lengths, x.shape[1], x.device)[:, :, None]
        z = _silenced(project(x, self.projection), own)  # the bias of the projection is heard in padding, too
        x2, x1, v = self._short(z).chunk(3, dim=-1)
        u = _silenced(x1 * v, own)
        back = self.filter.convolve(u, self.skip)
        ahead = self.filter_ahead.convolve(u.flip(1), None).flip(1)
        return unproject(x2 * (back + ahead), self.output)

    def _short(self, z: Hidden) -> Hidden:
        """The short filter with its middle tap on the current position."""
        half = self.config.short_taps // 2
        return fir(F.pad(z, (0, 0, 0, half)), self.short_taps, self.short_bias)[:, half:]


def _silenced(x: Hidden, own: Tensor | None) -> Hidden:
    return x if own is None else x.masked_fill(~own, 0)
