"""MLPs and norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

from crocuta.config.checks import positive

Activation: TypeAlias = Literal["silu", "gelu", "gelu_tanh", "identity"]


@dataclass(frozen=True, kw_only=True)
class GatedMLPConfig:
    """W3( act(W1 x) · (W2 x) ); activation "identity" makes it bilinear (Evo 2 after layer 0)."""

    type: ClassVar[str] = "gated"
    intermediate_size: int
    activation: Activation = "silu"
    bias: bool = False

    def __post_init__(self) -> None:
        positive("GatedMLPConfig", intermediate_size=self.intermediate_size)


@dataclass(frozen=True, kw_only=True)
class PlainMLPConfig:
    """W2 act(W1 x) (HyenaDNA: gelu_tanh, biases)."""

    type: ClassVar[str] = "plain"
    intermediate_size: int
    activation: Activation = "gelu_tanh"
    bias: bool = True

    def __post_init__(self) -> None:
        positive("PlainMLPConfig", intermediate_size=self.intermediate_size)


MLPConfig: TypeAlias = GatedMLPConfig | PlainMLPConfig


@dataclass(frozen=True, kw_only=True)
class RMSNormConfig:
    """eps inside the root: x · rsqrt(mean(x²) + eps) (StripedHyena-7B); outside: x / (rms(x) + eps) (Evo)."""

    type: ClassVar[str] = "rms"
    eps: float = 1e-6
    eps_inside_root: bool = False

    def __post_init__(self) -> None:
        positive("RMSNormConfig", eps=self.eps)


@dataclass(frozen=True, kw_only=True)
class LayerNormConfig:
    """Mean and variance over channels, with scale and bias (HyenaDNA)."""

    type: ClassVar[str] = "layer"
    eps: float = 1e-5

    def __post_init__(self) -> None:
        positive("LayerNormConfig", eps=self.eps)


NormConfig: TypeAlias = RMSNormConfig | LayerNormConfig
