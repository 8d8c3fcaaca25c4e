"""Normalisation layers."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod

import torch
from torch import nn

from crocuta.config import LayerNormConfig, NormConfig, Precision, RMSNormConfig
from crocuta.ops import norm as ops
from crocuta.types import Hidden


class Norm(nn.Module, ABC):
    """A norm over channels."""

    scale: nn.Parameter

    @abstractmethod
    def forward(self, x: Hidden, y: Hidden | None = None) -> tuple[Hidden, Hidden]:
        """x + y (x where there is no y), and its norm: what goes on beside the norm shares its passes over memory."""


class RMSNorm(Norm):
    """Root-mean-square norm over channels; where the eps stands is part of the configuration."""

    def __init__(self, config: RMSNormConfig, channels: int, precision: Precision = "exact") -> None:
        super().__init__()
        self.config = config
        self.scale = nn.Parameter(torch.empty(channels))
        stepwise = precision == "upstream" and not config.eps_inside_root
        self._add = (
            ops.add_rms_norm_stepwise
            if stepwise
            else functools.partial(ops.add_rms_norm, eps_inside_root=config.eps_inside_root)
        )

    def forward(self, x: Hidden, y: Hidden | None = None) -> tuple[Hidden, Hidden]:
        return self._add(x, y, self.scale, self.config.eps)


class LayerNorm(Norm):
    """Mean and variance norm over channels, with scale and bias."""

    def __init__(self, config: LayerNormConfig, channels: int) -> None:
        super().__init__()
        self.eps = config.eps
        self.scale = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, x: Hidden, y: Hidden | None = None) -> tuple[Hidden, Hidden]:
        return ops.add_layer_norm(x, y, self.scale, self.bias, self.eps)


def build_norm(config: NormConfig, channels: int, precision: Precision) -> Norm:
    """The norm module of a configuration."""
    match config:
        case RMSNormConfig():
            return RMSNorm(config, channels, precision)
        case LayerNormConfig():
            return LayerNorm(config, channels)
