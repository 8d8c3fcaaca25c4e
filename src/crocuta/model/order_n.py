"""Hyena with any number of long convolutions, in both conventions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crocuta.config import FilterConfig, ImplicitFilterConfig, OrderNHyenaConfig, Precision
from crocuta.model.filters import Filter, ImplicitFilter, build_filter
from crocuta.model.hyena import project, unproject
from crocuta.model.linear import Linear
from crocuta.model.mixer import Mixer
from crocuta.model.norm import build_norm
from crocuta.model.state import FIRState, HyenaStates, State
from crocuta.ops.fir import fir, next_tail
from crocuta.types import Hidden


class OrderNHyenaMixer(Mixer):
    """y = v; (y = gate · y;) then y = gate · (h ∗ y + D · y) for each filter in turn; W_out y (Poli et al. 2023).

    ``projection`` makes the branches [gates | v]; gates are used from the last to the first, as in safari.
    """

    def __init__(self, config: OrderNHyenaConfig, channels: int, precision: Precision = "exact") -> None:
        super().__init__()
        self.config = config
        wide = config.branches * channels
        self.projection = Linear(channels, wide, bias=config.projection_bias)
        filtered = channels if config.short_before_projection else wide
        self.short_taps = nn.Parameter(torch.empty(filtered, config.short_taps))
        self.short_bias = nn.Parameter(torch.empty(filtered)) if config.short_bias else None
        norms = [config.branch_norm] * config.branches if config.branch_norm else []
        self.branch_norms = nn.ModuleList(build_norm(norm, channels, precision) for norm in norms)
        self.filters = nn.ModuleList(build_filters(config, channels))
        self.skip = nn.Parameter(torch.empty(config.convolutions, channels)) if config.skip else None
        self.output = Linear(channels, channels, bias=config.output_bias)

    def forward(self, x: Hidden, lengths: Tensor | None = None) -> Hidden:
        return self._mix(x, None, None)

    def init_state(
        self, batch: int, max_length: int | None, *, device: torch.device, dtype: torch.dtype
    ) -> HyenaStates:
        channels = self.short_taps.shape[0]
        tail = torch.zeros(batch, self.config.short_taps - 1, channels, device=device, dtype=dtype)
        long = [f.init_state(batch, max_length, device=device, dtype=dtype) for f in self._filters()]
        return HyenaStates(FIRState(tail), long)

    def extend(self, x: Hidden, state: State, lengths: Tensor | None = None) -> Hidden:
        assert isinstance(state, HyenaStates)
        return self._mix(x, state, lengths)

    def _mix(self, x: Hidden, state: HyenaStates | None, lengths: Tensor | None) -> Hidden:
        *gates, v = self._branches(x, state, lengths)
        y = v * gates.pop() if self.config.gate_first else v
        for i, filter_ in enumerate(self._filters()):
            y = F.dropout(y, self.config.dropout, self.training)
            skip = None if self.skip is None else self.skip[i]
            mixed = filter_.convolve(y, skip) if state is None else filter_.extend(y, skip, state.long[i], lengths)
            y = mixed * gates.pop()
            if i and self.config.residual:
                y = y + self.config.residual * v
        return unproject(y, self.output)

    def _branches(self, x: Hidden, state: HyenaStates | None, lengths: Tensor | None) -> list[Hidden]:
        """[gates | v], each [b l d], after the short convolution, the projection and the norms."""
        before = self.config.short_before_projection
        z = x if before else project(x, self.projection)
        tail = None if state is None else state.short.tail
        if state is not None:
            state.short.tail = next_tail(z, state.short.tail, lengths)
        z = fir(z, self.short_taps, self.short_bias, tail)
        if before:
            z = project(z, self.projection)
        branches = list(z.chunk(self.config.branches, dim=-1))
        if self.branch_norms:
            branches = [norm(branch)[1] for norm, branch in zip(self.branch_norms, branches, strict=True)]
        return branches

    def _filters(self) -> list[Filter]:
        return [filter_ for filter_ in self.filters if isinstance(filter_, Filter)]


def build_filters(config: OrderNHyenaConfig, channels: int) -> list[Filter]:
    """One filter a convolution. Implicit ones that share an MLP have its last layer, and its windows, divided."""
    kind: FilterConfig = config.filter
    count = config.convolutions
    if not (config.shared_filter and isinstance(kind, ImplicitFilterConfig)):
        return [build_filter(kind, channels) for _ in range(count)]
    groups = kind.groups or channels
    filters: list[Filter] = []
    for i in range(count):
        part = slice(i, None, count) if config.interleaved_windows else slice(i * groups, (i + 1) * groups)
        first = filters[0] if filters else None
        assert first is None or isinstance(first, ImplicitFilter)
        filters.append(ImplicitFilter(kind, channels, shares=first, part=(part, count * groups)))
    return filters
