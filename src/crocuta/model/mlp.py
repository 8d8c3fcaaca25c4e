"""Feed-forward layers: gated (GLU) and plain."""

from __future__ import annotations

from torch import nn

from crocuta.config import GatedMLPConfig, PlainMLPConfig
from crocuta.model.linear import Linear, affine
from crocuta.ops.mlp import mlp
from crocuta.types import Hidden


class GatedMLP(nn.Module):
    """down( act(gate x) · up x ) (Shazeer 2020)."""

    def __init__(self, config: GatedMLPConfig, channels: int) -> None:
        super().__init__()
        self.activation = config.activation
        self.gate = Linear(channels, config.intermediate_size, bias=config.bias)
        self.up = Linear(channels, config.intermediate_size, bias=config.bias)
        self.down = Linear(config.intermediate_size, channels, bias=config.bias)

    def forward(self, x: Hidden) -> Hidden:
        return mlp(x, affine(self.gate), affine(self.up), affine(self.down), self.activation)


class PlainMLP(nn.Module):
    """down( act(up x) )."""

    def __init__(self, config: PlainMLPConfig, channels: int) -> None:
        super().__init__()
        self.activation = config.activation
        self.up = Linear(channels, config.intermediate_size, bias=config.bias)
        self.down = Linear(config.intermediate_size, channels, bias=config.bias)

    def forward(self, x: Hidden) -> Hidden:
        return mlp(x, None, affine(self.up), affine(self.down), self.activation)
