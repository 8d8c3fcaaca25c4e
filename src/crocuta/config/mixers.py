"""Mixers: what mixes along length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from crocuta.config.checks import positive, require, share
from crocuta.config.filters import FilterConfig
from crocuta.config.layers import Activation, NormConfig


@dataclass(frozen=True, kw_only=True)
class HyenaConfig:
    """y = W_o( x2 · (h ∗ (x1·v) + D·(x1·v)) ), with (x2, x1, v) = split(FIR(W_in x)) (Hyena, order 2)."""

    type: ClassVar[str] = "hyena"
    filter: FilterConfig
    short_taps: int = 3
    short_bias: bool = False
    projection_bias: bool = False
    output_bias: bool = True
    skip: bool = True
    """The D term, one number a channel."""
    fp8_projection: bool = False
    """W_in and its input are rounded to FP8 (E4M3) under two constant scales of the checkpoint (Evo 2)."""

    def __post_init__(self) -> None:
        positive("HyenaConfig", short_taps=self.short_taps)


@dataclass(frozen=True, kw_only=True)
class OrderNHyenaConfig:
    """Hyena with any number of long convolutions (Poli et al. 2023, definition 3.1), in both conventions.

    FIR(W_in x) is cut into one branch a gate, x_1 .. x_G, and the last branch, the value v. C is ``convolutions``:

        gate_first (safari, HyenaDNA; "order N" is C = N - 1, G = C + 1):    y = x_G · v, then for i = 1 .. C
        else (the paper, Edifice; order N is C = N, G = C):                  y = v,       then for i = 1 .. C

        y = x_{C+1-i} · (h_i ∗ y + D_i · y)

    and W_out y at the end. One convolution with ``gate_first`` is ``HyenaConfig``, which is the faster one.
    """

    type: ClassVar[str] = "hyena_order_n"
    filter: FilterConfig
    """Of each convolution."""
    convolutions: int = 2
    gate_first: bool = True
    shared_filter: bool = True
    """Implicit filters of all convolutions come from one MLP with as many outputs (safari), not from one MLP each."""
    interleaved_windows: bool = False
    """How windows of a shared MLP, whose decay goes from the slowest to the fastest over all its outputs, are dealt
    out: filter c of convolution i has that of output c · convolutions + i (safari) or i · channels + c (HyenaDNA)."""
    short_taps: int = 3
    short_bias: bool = False
    short_before_projection: bool = False
    """The short convolution filters x itself (Edifice), not the projected branches."""
    projection_bias: bool = False
    output_bias: bool = True
    skip: bool = True
    """The D term, one number a channel and convolution."""
    branch_norm: NormConfig | None = None
    """A norm of its own for every branch after the short convolution (the deep dive)."""
    residual: float = 0.0
    """After each convolution and gate but the first, y += residual · v (the deep dive)."""
    dropout: float = 0.0
    """Of what enters each convolution, while training (safari)."""

    def __post_init__(self) -> None:
        positive("OrderNHyenaConfig", short_taps=self.short_taps, convolutions=self.convolutions)
        share("OrderNHyenaConfig", dropout=self.dropout)

    @property
    def branches(self) -> int:
        """Projections of the input: the gates and the value."""
        return self.convolutions + 1 + self.gate_first


@dataclass(frozen=True, kw_only=True)
class MultiHeadHyenaConfig:
    """Multi-head Hyena (Massaroli et al. 2023, section 4): outer products of keys and values, one filter a head.

    (q, k, v) = FIR(W_in x), each cut into ``num_heads`` heads of N = d / num_heads channels:

        y_m[i] = Σ_j (h_m ∗ (k_m[i] · v_m[j])) · q_m[j]

    and W_out of all heads side by side. N times the convolutions and the state of Hyena, and filters for fewer
    channels; it recalls more.
    """

    type: ClassVar[str] = "hyena_multi_head"
    num_heads: int
    filter: FilterConfig
    """Its ``groups`` stay None: there are as many filters as heads."""
    short_taps: int = 3
    short_bias: bool = False
    projection_bias: bool = False
    output_bias: bool = True
    skip: bool = True
    """A D term for each head."""

    def __post_init__(self) -> None:
        positive("MultiHeadHyenaConfig", num_heads=self.num_heads, short_taps=self.short_taps)
        require(
            self.filter.groups is None, "MultiHeadHyenaConfig.filter.groups is given", self.filter.groups, "one a head"
        )


@dataclass(frozen=True, kw_only=True)
class BidirectionalHyenaConfig:
    """Hyena that sees both sides, for encoders: y = W_out( x2 · (h ∗ u + h' ⋆ u + D·u) ), u = x1 · v.

    h looks back, h' looks ahead: (h' ⋆ u)[t] = Σ_{j >= 0} h'[j] · u[t + j]; each is a filter of its own. The short
    filter is centred: tap k // 2 multiplies the current token. Such a model cannot generate or be read in pieces.
    """

    type: ClassVar[str] = "hyena_bidirectional"
    filter: FilterConfig
    """Of each direction."""
    short_taps: int = 3
    short_bias: bool = False
    projection_bias: bool = False
    output_bias: bool = True
    skip: bool = True

    def __post_init__(self) -> None:
        positive("BidirectionalHyenaConfig", short_taps=self.short_taps)
        require(
            self.short_taps % 2 == 1, "BidirectionalHyenaConfig.short_taps is even", self.short_taps, "an odd number"
        )


@dataclass(frozen=True, kw_only=True)
class GatedConvConfig:
    """y = W_out( f(FIR(a)) · σ(g) ), (a, g) = W_in x: a gated depthwise convolution.

    f is the identity, or, where they are asked for, a norm, an activation and a pointwise map, in this order: all
    three in Edifice's StripedHyena.
    """

    type: ClassVar[str] = "gated_conv"
    taps: int = 7
    bias: bool = True
    """Of the convolution and of all linear maps."""
    norm: NormConfig | None = None
    activation: Activation = "identity"
    pointwise: bool = False

    def __post_init__(self) -> None:
        positive("GatedConvConfig", taps=self.taps)


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary embedding over the whole head, halves convention: angle = position / scale · inv_freq.

    ``stored``: inv_freq is a tensor of the checkpoint (Evo 2) instead of base^(-2i/head_dim).
    """

    base: float = 10_000.0
    scale: float = 1.0
    stored: bool = False

    def __post_init__(self) -> None:
        positive("RopeConfig", base=self.base, scale=self.scale)


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Grouped-query attention; query head j reads key/value head j // (num_heads / num_kv_heads)."""

    type: ClassVar[str] = "attention"
    num_heads: int
    num_kv_heads: int | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    rope: RopeConfig | None = RopeConfig()
    causal: bool = True
    """False: every token sees the whole sequence, for encoders; such a model cannot generate or be read in pieces."""

    def __post_init__(self) -> None:
        positive("AttentionConfig", num_heads=self.num_heads, num_kv_heads=self.num_kv_heads)
        require(
            self.num_heads % (self.num_kv_heads or 1) == 0,
            "AttentionConfig.num_kv_heads must divide num_heads",
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}",
            "a divisor",
        )


MixerConfig: TypeAlias = (
    HyenaConfig
    | OrderNHyenaConfig
    | MultiHeadHyenaConfig
    | BidirectionalHyenaConfig
    | GatedConvConfig
    | AttentionConfig
)
