"""Normalisation layers."""

from __future__ import annotations

import functools

import torch
from torch import nn

from crocuta.config import LayerNormConfig, NormConfig, Precision, RMSNormConfig
from crocuta.ops import norm as ops
from crocuta.types import Hidden


class RMSNorm(nn.Module):
    """Root-mean-square norm over channels; where the eps stands is part of the configuration."""

    def __init__(self, config: RMSNormConfig, channels: int, precision: Precision = "exact") -> None:
        super().__init__()
        self.config = config
        self.scale = nn.Parameter(torch.empty(channels))
        stepwise = precision == "upstream" and not config.eps_inside_root
        self._norm = (
            ops.rms_norm_stepwise
            if stepwise
            else functools.partial(ops.rms_norm, eps_inside_root=config.eps_inside_root)
        )

    def forward(self, x: Hidden) -> Hidden:
        return self._norm(x, self.scale, self.config.eps)


class LayerNorm(nn.Module):
    """Mean and variance norm over channels, with scale and bias."""

    def __init__(self, config: LayerNormConfig, channels: int) -> None:
        super().__init__()
        self.eps = config.eps
        self.scale = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, x: Hidden) -> Hidden:
        return ops.layer_norm(x, self.scale, self.bias, self.eps)


def build_norm(config: NormConfig, channels: int, precision: Precision) -> RMSNorm | LayerNorm:
    """The norm module of a configuration."""
    match config:
        case RMSNormConfig():
            return RMSNorm(config, channels, precision)
        case LayerNormConfig():
            return LayerNorm(config, channels)
