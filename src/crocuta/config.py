"""Every architecture as data: frozen, keyword-only, JSON both ways, without importing torch.

A variant is a class of its own, chosen once by ``match`` in ``model/build.py``; there are no strings plus flags.
``ModelConfig`` lists its blocks one by one, so one model class serves every member of the family.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

from crocuta.errors import ConfigError
from crocuta.schema import decode, encode

Activation: TypeAlias = Literal["silu", "gelu", "gelu_tanh", "identity"]
Precision: TypeAlias = Literal["exact", "upstream"]


def _require(holds: bool, what: str, given: object, expected: str) -> None:
    if not holds:
        raise ConfigError(what, given=given, expected=expected)


_LARGEST = 1 << 40
"""More than any size, and little enough that torch can be asked for a few of them."""


def _positive(owner: str, **values: float | int | None) -> None:
    for name, value in values.items():
        if isinstance(value, int) and value > _LARGEST:
            raise ConfigError(f"{owner}.{name} is impossible", given=str(value)[:20], expected=f"at most {_LARGEST}")
        finite = value is None or isinstance(value, int) or math.isfinite(value)
        _require(finite and (value is None or value > 0), f"{owner}.{name} must be positive", value, "> 0")


# --- filters: what makes the kernel of a long convolution -----------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DecayConfig:
    """A fixed exponential envelope on explicit taps: exp(-rate_g · t / horizon), rates log-spaced over groups.

    StripedHyena 2 (Hyena-MR); there ``rates`` is (0.01, 100) ("weak") and horizon the training length.
    """

    rates: tuple[float, float] = (0.01, 100.0)
    horizon: int

    def __post_init__(self) -> None:
        _positive("DecayConfig", slowest=self.rates[0], fastest=self.rates[1], horizon=self.horizon)


@dataclass(frozen=True, kw_only=True)
class ExplicitFilterConfig:
    """Learned taps h[0..taps-1]; tap 0 multiplies the current token (Hyena-SE, Hyena-MR)."""

    type: ClassVar[str] = "explicit"
    taps: int
    groups: int | None = None
    """Number of distinct filters; channel c uses filter c // (channels / groups). None: one a channel."""
    decay: DecayConfig | None = None

    def __post_init__(self) -> None:
        _positive("ExplicitFilterConfig", taps=self.taps, groups=self.groups)


@dataclass(frozen=True, kw_only=True)
class ImplicitFilterConfig:
    """Taps from a sine MLP over positional features, under an exponential window (Hyena, HyenaDNA).

    Position t is measured in units of ``max_length``, never of the current length, so that a prefix keeps its
    filter when text is appended.
    """

    type: ClassVar[str] = "implicit"
    max_length: int
    width: int = 64
    inner_layers: int = 2
    features: int = 5
    frequency: float = 10.0
    window_decay: tuple[float, float] = (0.3, 1.5)
    """Fractions of max_length at which the fastest and the slowest channel reach ``window_target``."""
    window_target: float = 1e-2
    window_shift: float = 0.0
    train_features: bool = False

    def __post_init__(self) -> None:
        _positive("ImplicitFilterConfig", max_length=self.max_length, width=self.width, frequency=self.frequency)
        _require(
            self.features >= 3 and self.features % 2 == 1,
            "ImplicitFilterConfig.features is impossible",
            self.features,
            "an odd number >= 3 (one scalar and pairs of a sine and a cosine)",
        )
        _require(self.max_length >= 2, "ImplicitFilterConfig.max_length is too short", self.max_length, ">= 2")
        _require(self.inner_layers >= 0, "ImplicitFilterConfig.inner_layers is negative", self.inner_layers, ">= 0")


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
        _positive(
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
        _positive(
            "RealModalFilterConfig",
            modes=self.modes,
            groups=self.groups,
            shortest=self.timescales[0],
            longest=self.timescales[1],
        )


FilterConfig: TypeAlias = ExplicitFilterConfig | ImplicitFilterConfig | ComplexModalFilterConfig | RealModalFilterConfig


# --- mixers ---------------------------------------------------------------------------------------------------


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
        _positive("HyenaConfig", short_taps=self.short_taps)


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary embedding over the whole head, halves convention: angle = position / scale · inv_freq.

    ``stored``: inv_freq is a tensor of the checkpoint (Evo 2) instead of base^(-2i/head_dim).
    """

    base: float = 10_000.0
    scale: float = 1.0
    stored: bool = False

    def __post_init__(self) -> None:
        _positive("RopeConfig", base=self.base, scale=self.scale)


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Causal grouped-query attention; query head j reads key/value head j // (num_heads / num_kv_heads)."""

    type: ClassVar[str] = "attention"
    num_heads: int
    num_kv_heads: int | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    rope: RopeConfig | None = RopeConfig()

    def __post_init__(self) -> None:
        _positive("AttentionConfig", num_heads=self.num_heads, num_kv_heads=self.num_kv_heads)
        _require(
            self.num_heads % (self.num_kv_heads or 1) == 0,
            "AttentionConfig.num_kv_heads must divide num_heads",
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}",
            "a divisor",
        )


MixerConfig: TypeAlias = HyenaConfig | AttentionConfig


# --- MLPs and norms -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class GatedMLPConfig:
    """W3( act(W1 x) · (W2 x) ); activation "identity" makes it bilinear (Evo 2 after layer 0)."""

    type: ClassVar[str] = "gated"
    intermediate_size: int
    activation: Activation = "silu"
    bias: bool = False

    def __post_init__(self) -> None:
        _positive("GatedMLPConfig", intermediate_size=self.intermediate_size)


@dataclass(frozen=True, kw_only=True)
class PlainMLPConfig:
    """W2 act(W1 x) (HyenaDNA: gelu_tanh, biases)."""

    type: ClassVar[str] = "plain"
    intermediate_size: int
    activation: Activation = "gelu_tanh"
    bias: bool = True

    def __post_init__(self) -> None:
        _positive("PlainMLPConfig", intermediate_size=self.intermediate_size)


MLPConfig: TypeAlias = GatedMLPConfig | PlainMLPConfig


@dataclass(frozen=True, kw_only=True)
class RMSNormConfig:
    """eps inside the root: x · rsqrt(mean(x²) + eps) (StripedHyena-7B); outside: x / (rms(x) + eps) (Evo)."""

    type: ClassVar[str] = "rms"
    eps: float = 1e-6
    eps_inside_root: bool = False

    def __post_init__(self) -> None:
        _positive("RMSNormConfig", eps=self.eps)


@dataclass(frozen=True, kw_only=True)
class LayerNormConfig:
    """Mean and variance over channels, with scale and bias (HyenaDNA)."""

    type: ClassVar[str] = "layer"
    eps: float = 1e-5

    def __post_init__(self) -> None:
        _positive("LayerNormConfig", eps=self.eps)


NormConfig: TypeAlias = RMSNormConfig | LayerNormConfig


# --- block and model ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """x = x + mixer(norm(x)); x = x + mlp(norm(x)). ``dropout`` acts on both branches while training."""

    mixer: MixerConfig
    mlp: MLPConfig | None
    norm: NormConfig = RMSNormConfig()
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _require(0 <= self.dropout < 1, "BlockConfig.dropout is impossible", self.dropout, "0 <= dropout < 1")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """ids [b l] -> logits [b l v]: embedding, blocks, final norm, head."""

    vocab_size: int
    hidden_size: int
    blocks: tuple[BlockConfig, ...]
    norm: NormConfig = RMSNormConfig()
    tie_embeddings: bool = True
    embedding_dropout: float = 0.0
    precision: Precision = "exact"
    """exact: ops compute in float32 and round their results, and logits are float32. upstream: below float32, and only
    there, values are rounded to the model's dtype wherever StripedHyena, Evo and Evo 2 round them:

    - RMSNorm with eps outside the root: the norm ‖x‖₂, ‖x‖₂ · d^-1/2, that plus eps, x divided by that, times scale;
    - rotary embedding: the cosines and sines, before the float32 rotation;
    - short filter: its sum, that plus the bias, and the gate x1 · v. (StripedHyena 1 runs it in bfloat16, 2 in float32
      with a cast after it: the same numbers, since a convolution in bfloat16 adds up in float32);
    - explicit and implicit long filters: h ∗ u + D·u, summed in float32; then the gate x2 · (...);
    - modal long filters: h ∗ u, D·u, their sum, and the gate;
    - output projection of Hyena: the product, then that plus the bias;
    - head: the product, so that logits have the model's dtype, and in ``score`` their log-softmax.

    These are the steps that read a whole sequence; decoding takes the same ones, so that ``extend`` still is
    ``forward``, where the published decoders round a little differently. Everything else rounds alike in both modes.
    """
    unverified: str = ""
    """Why results of this checkpoint are not known to agree with its publisher's; empty if there is no doubt."""

    def __post_init__(self) -> None:
        _positive("ModelConfig", vocab_size=self.vocab_size, hidden_size=self.hidden_size)
        _require(
            0 <= self.embedding_dropout < 1,
            "ModelConfig.embedding_dropout is impossible",
            self.embedding_dropout,
            "0 <= dropout < 1",
        )
        _require(
            self.precision in ("exact", "upstream"),
            "ModelConfig.precision is unknown",
            self.precision,
            "exact or upstream",
        )
        for index, block in enumerate(self.blocks):
            self._check_block(index, block)

    def _check_block(self, index: int, block: BlockConfig) -> None:
        match block.mixer:
            case AttentionConfig(num_heads=heads, rope=rope):
                _require(
                    self.hidden_size % heads == 0,
                    f"blocks[{index}].mixer.num_heads must divide hidden_size",
                    f"num_heads={heads}, hidden_size={self.hidden_size}",
                    "a divisor",
                )
                _require(
                    rope is None or (self.hidden_size // heads) % 2 == 0,
                    f"blocks[{index}].mixer.rope needs an even head size",
                    self.hidden_size // heads,
                    "an even number",
                )
            case HyenaConfig(filter=filter_) if not isinstance(filter_, ImplicitFilterConfig):
                groups = filter_.groups or self.hidden_size
                _require(
                    self.hidden_size % groups == 0,
                    f"blocks[{index}].mixer.filter.groups must divide hidden_size",
                    f"groups={groups}, hidden_size={self.hidden_size}",
                    "a divisor",
                )

    @property
    def max_length(self) -> int | None:
        """The longest sequence that every filter is defined for, or None where no filter sets a limit."""
        limits = [
            b.mixer.filter.max_length
            for b in self.blocks
            if isinstance(b.mixer, HyenaConfig) and isinstance(b.mixer.filter, ImplicitFilterConfig)
        ]
        return min(limits, default=None)

    def to_json(self) -> dict[str, Any]:
        """A plain JSON object; ``ModelConfig.from_json`` is its inverse."""
        return encode(self)

    @classmethod
    def from_json(cls, value: Any) -> ModelConfig:
        """Strict inverse of ``to_json``; also takes the text itself. Raises ConfigError."""
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except json.JSONDecodeError as error:
                raise ConfigError("the configuration is not JSON", given=str(error)) from error
        return decode(cls, value)
