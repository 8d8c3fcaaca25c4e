"""One block: a mixer along length and an MLP along channels, each with its norm and residual."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crocuta.config import (
    AttentionConfig,
    BidirectionalHyenaConfig,
    BlockConfig,
    GatedConvConfig,
    GatedMLPConfig,
    HyenaConfig,
    MixerConfig,
    MLPConfig,
    MultiHeadHyenaConfig,
    OrderNHyenaConfig,
    PlainMLPConfig,
    Precision,
)
from crocuta.model.attention import AttentionMixer
from crocuta.model.bidirectional import BidirectionalHyenaMixer
from crocuta.model.gated_conv import GatedConvMixer
from crocuta.model.hyena import HyenaMixer
from crocuta.model.mixer import Mixer
from crocuta.model.mlp import GatedMLP, PlainMLP
from crocuta.model.multi_head import MultiHeadHyenaMixer
from crocuta.model.norm import build_norm
from crocuta.model.order_n import OrderNHyenaMixer
from crocuta.model.state import State
from crocuta.ops.linear import add
from crocuta.types import Hidden


class Block(nn.Module):
    """x = x + mixer(pre_norm(x)); x = x + mlp(post_norm(x))."""

    def __init__(self, config: BlockConfig, channels: int, precision: Precision = "exact") -> None:
        super().__init__()
        self.dropout = config.dropout
        self.pre_norm = build_norm(config.norm, channels, precision)
        self.mixer = build_mixer(config.mixer, channels, precision)
        self.post_norm = None if config.mlp is None else build_norm(config.norm, channels, precision)
        self.mlp = None if config.mlp is None else build_mlp(config.mlp, channels)

    def forward(self, x: Hidden, lengths: Tensor | None = None) -> Hidden:
        x, normed = self.pre_norm(x)
        return self._residual(x, self.mixer(normed, lengths))

    def init_state(self, batch: int, max_length: int | None, *, device: torch.device, dtype: torch.dtype) -> State:
        return self.mixer.init_state(batch, max_length, device=device, dtype=dtype)

    def extend(self, x: Hidden, state: State, lengths: Tensor | None = None) -> Hidden:
        x, normed = self.pre_norm(x)
        return self._residual(x, self.mixer.extend(normed, state, lengths))

    def _residual(self, x: Hidden, mixed: Hidden) -> Hidden:
        mixed = F.dropout(mixed, self.dropout, self.training)
        if self.mlp is None or self.post_norm is None:
            return add(x, mixed)
        x, normed = self.post_norm(x, mixed)
        return add(x, F.dropout(self.mlp(normed), self.dropout, self.training))


def build_mixer(config: MixerConfig, channels: int, precision: Precision) -> Mixer:
    """The mixer module of a configuration."""
    match config:
        case HyenaConfig():
            return HyenaMixer(config, channels, precision)
        case OrderNHyenaConfig():
            return OrderNHyenaMixer(config, channels, precision)
        case MultiHeadHyenaConfig():
            return MultiHeadHyenaMixer(config, channels)
        case BidirectionalHyenaConfig():
            return BidirectionalHyenaMixer(config, channels)
        case GatedConvConfig():
            return GatedConvMixer(config, channels, precision)
        case AttentionConfig():
            return AttentionMixer(config, channels, precision)


def build_mlp(config: MLPConfig, channels: int) -> GatedMLP | PlainMLP:
    """The MLP module of a configuration."""
    match config:
        case GatedMLPConfig():
            return GatedMLP(config, channels)
        case PlainMLPConfig():
            return PlainMLP(config, channels)
