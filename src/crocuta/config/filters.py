"""Filters: what makes the kernel of a long convolution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

from crocuta.config.checks import positive, require


@dataclass(frozen=True, kw_only=True)
class DecayConfig:
    """A fixed exponential envelope on explicit taps: exp(-rate_g · t / horizon), rates log-spaced over groups.

    StripedHyena 2 (Hyena-MR); there ``rates`` is (0.01, 100) ("weak") and horizon the training length.
    """

    rates: tuple[float, float] = (0.01, 100.0)
    horizon: int

    def __post_init__(self) -> None:
        positive("DecayConfig", slowest=self.rates[0], fastest=self.rates[1], horizon=self.horizon)


@dataclass(frozen=True, kw_only=True)
class ExplicitFilterConfig:
    """Learned taps h[0..taps-1]; tap 0 multiplies the current token (Hyena-SE, Hyena-MR)."""

    type: ClassVar[str] = "explicit"
    taps: int
    groups: int | None = None
    """Number of distinct filters; channel c uses filter c // (channels / groups). None: one a channel."""
    decay: DecayConfig | None = None

    def __post_init__(self) -> None:
        positive("ExplicitFilterConfig", taps=self.taps, groups=self.groups)


# --- implicit filters: positions, an MLP with one activation, a window ---


@dataclass(frozen=True, kw_only=True)
class BandsConfig:
    """[t, cos(f·w), -sin(f·w)], w = 2π i / max_length, f evenly spaced from 1e-4 to bands - 1 (Hyena, D.3)."""

    type: ClassVar[str] = "bands"
    features: int = 5
    trained: bool = False
    """A tensor of the checkpoint instead of the formula (HyenaDNA's port trains it)."""

    def __post_init__(self) -> None:
        require(
            self.features >= 3 and self.features % 2 == 1,
            "BandsConfig.features is impossible",
            self.features,
            "an odd number >= 3 (one scalar and pairs of a sine and a cosine)",
        )


@dataclass(frozen=True, kw_only=True)
class ScalarConfig:
    """The position alone, t from 0 to 1 over max_length (Edifice)."""

    type: ClassVar[str] = "scalar"


@dataclass(frozen=True, kw_only=True)
class SinusoidalConfig:
    """sin and cos of i / base^(2j / features), side by side, times exp(-decay · t) (the deep dive)."""

    type: ClassVar[str] = "sinusoidal"
    features: int = 32
    base: float = 10_000.0
    decay: float = 4.0

    def __post_init__(self) -> None:
        even = self.features >= 2 and self.features % 2 == 0
        require(even, "SinusoidalConfig.features is impossible", self.features, "an even number >= 2")
        positive("SinusoidalConfig", base=self.base)
        require(self.decay >= 0, "SinusoidalConfig.decay is negative", self.decay, ">= 0")


PositionsConfig: TypeAlias = BandsConfig | ScalarConfig | SinusoidalConfig


@dataclass(frozen=True, kw_only=True)
class SineConfig:
    """sin(frequency · x), one frequency a unit, shared by all layers of the MLP (Hyena; SIREN)."""

    type: ClassVar[str] = "sine"
    frequency: float = 10.0
    trained: bool = True

    def __post_init__(self) -> None:
        positive("SineConfig", frequency=self.frequency)


@dataclass(frozen=True, kw_only=True)
class ReLUConfig:
    """max(x, 0); its filters are smooth, which the Hyena paper found to cost perplexity (appendix D.2)."""

    type: ClassVar[str] = "relu"


@dataclass(frozen=True, kw_only=True)
class FixedWindowConfig:
    """exp(-t |δ_c|) + shift (Hyena §3.3, HyenaDNA).

    Channel 0 reaches ``target`` at the larger share of max_length, the last at the smaller; δ is evenly spaced.
    """

    type: ClassVar[str] = "fixed"
    decay: tuple[float, float] = (0.3, 1.5)
    target: float = 1e-2
    shift: float = 0.0

    def __post_init__(self) -> None:
        _check_window("FixedWindowConfig", self.decay, self.target)


@dataclass(frozen=True, kw_only=True)
class LearnedWindowConfig:
    """exp(-t · rate_c) + shift with a rate above 0 for every channel, trained as its logarithm.

    Rates start log-spaced: channel 0 reaches ``target`` at the larger share of max_length, the last at the smaller.
    """

    type: ClassVar[str] = "learned"
    decay: tuple[float, float] = (0.05, 1.5)
    target: float = 1e-2
    shift: float = 0.0

    def __post_init__(self) -> None:
        _check_window("LearnedWindowConfig", self.decay, self.target)


def _check_window(owner: str, decay: tuple[float, float], target: float) -> None:
    positive(owner, fastest=decay[0], slowest=decay[1])
    require(0 < target < 1, f"{owner}.target is impossible", target, "0 < target < 1")


WindowConfig: TypeAlias = FixedWindowConfig | LearnedWindowConfig


@dataclass(frozen=True, kw_only=True)
class ImplicitFilterConfig:
    """h[t] = MLP(positions(t)) · window(t), bounded and normalised where asked (Hyena, HyenaDNA, Edifice).

    Position t is measured in units of ``max_length``, never of the current length, so that a prefix keeps its
    filter when text is appended.
    """

    type: ClassVar[str] = "implicit"
    max_length: int
    width: int = 64
    inner_layers: int = 2
    """Layers between the first and the last: the MLP has inner_layers + 2 linear maps."""
    positions: PositionsConfig = BandsConfig()
    activation: SineConfig | ReLUConfig = SineConfig()
    window: WindowConfig | None = FixedWindowConfig()
    wide_positions: bool = True
    """Positions and the MLP's first layer in float64. Where a filter of thousands of taps has high frequencies, float32
    would make its taps differ by a thousandth from machine to machine. Published models compute them in float32."""
    groups: int | None = None
    """Number of distinct filters; channel c uses filter c // (channels / groups). None: one a channel."""
    output_bias: bool = False
    """A bias of the MLP's last layer (Edifice)."""
    bound: bool = False
    """tanh of the MLP's output, before the window (the deep dive)."""
    normalise: Literal["absolute", "energy"] | None = None
    """Divide each filter, over max_length, by Σ|h[t]|, so that no output exceeds the largest input but long filters are
    quiet (white noise leaves them smaller by √length), or by √Σ h[t]², so that white noise keeps its size.

    Over time; the ``normalized`` of safari's code divides by the sum over channels.
    """

    def __post_init__(self) -> None:
        positive("ImplicitFilterConfig", max_length=self.max_length, width=self.width, groups=self.groups)
        require(self.max_length >= 2, "ImplicitFilterConfig.max_length is too short", self.max_length, ">= 2")
        require(self.inner_layers >= 0, "ImplicitFilterConfig.inner_layers is negative", self.inner_layers, ">= 0")


# --- modal filters ---


@dataclass(frozen=True, kw_only=True)
class ComplexModalFilterConfig:
    """h[t] = Re Σ_n R_n p_n^t with complex poles and residues (StripedHyena 1, Evo 1)."""

    type: ClassVar[str] = "modal_complex"
    modes: int
    groups: int | None = None
    poles: Literal["stable", "raw"] = "stable"
    """stable: |p| < 1 by parametrisation, for training. raw: (re, im) as published files store them."""
    timescales: tuple[float, float] = (1.0, 1024.0)
    """Shortest and longest decay time of the modes at initialisation, in tokens."""

    def __post_init__(self) -> None:
        positive(
            "ComplexModalFilterConfig",
            modes=self.modes,
            groups=self.groups,
            shortest=self.timescales[0],
            longest=self.timescales[1],
        )


@dataclass(frozen=True, kw_only=True)
class RealModalFilterConfig:
    """h[t] = Σ_n R_n exp(logp_n · t) with real negative log-poles (StripedHyena 2, Hyena-LI)."""

    type: ClassVar[str] = "modal_real"
    modes: int
    groups: int | None = None
    poles: Literal["stable", "raw"] = "stable"
    timescales: tuple[float, float] = (1.0, 1024.0)

    def __post_init__(self) -> None:
        positive(
            "RealModalFilterConfig",
            modes=self.modes,
            groups=self.groups,
            shortest=self.timescales[0],
            longest=self.timescales[1],
        )


FilterConfig: TypeAlias = ExplicitFilterConfig | ImplicitFilterConfig | ComplexModalFilterConfig | RealModalFilterConfig
