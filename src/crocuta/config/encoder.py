"""Encoders: features or ids to one vector a sequence, or to the outputs of a head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from crocuta.config.blocks import BlockConfig, check_blocks, is_causal, max_length_of
from crocuta.config.checks import positive, require, share
from crocuta.config.layers import NormConfig, RMSNormConfig
from crocuta.config.model import ModelConfig, Precision
from crocuta.schema import decode_json, encode

# --- what goes in ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TokenInputConfig:
    """ids [b l], looked up in an embedding."""

    type: ClassVar[str] = "tokens"
    vocab_size: int

    def __post_init__(self) -> None:
        positive("TokenInputConfig", vocab_size=self.vocab_size)


@dataclass(frozen=True, kw_only=True)
class FeatureInputConfig:
    """Features [b l e], projected with a bias where ``size`` is not the encoder's."""

    type: ClassVar[str] = "features"
    size: int

    def __post_init__(self) -> None:
        positive("FeatureInputConfig", size=self.size)


InputConfig: TypeAlias = TokenInputConfig | FeatureInputConfig

# --- what comes out -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MeanPoolingConfig:
    """The mean over a sequence's own positions."""

    type: ClassVar[str] = "mean"


@dataclass(frozen=True, kw_only=True)
class LastPoolingConfig:
    """The mean over the last ``positions`` of a sequence's own positions, or all where it has fewer."""

    type: ClassVar[str] = "last"
    positions: int = 1

    def __post_init__(self) -> None:
        positive("LastPoolingConfig", positions=self.positions)


@dataclass(frozen=True, kw_only=True)
class AttentionPoolingConfig:
    """Σ softmax(w · x[t]) x[t] over a sequence's own positions, with one learned query w."""

    type: ClassVar[str] = "attention"


PoolingConfig: TypeAlias = MeanPoolingConfig | LastPoolingConfig | AttentionPoolingConfig


@dataclass(frozen=True, kw_only=True)
class ProjectionConfig:
    """A linear map into a shared space of ``size``, and with ``normalise`` onto its unit sphere."""

    size: int = 512
    normalise: bool = True

    def __post_init__(self) -> None:
        positive("ProjectionConfig", size=self.size)


@dataclass(frozen=True, kw_only=True)
class ClassificationConfig:
    """One logit a label; the loss is cross-entropy."""

    type: ClassVar[str] = "classification"
    labels: int
    dropout: float = 0.0
    """Of what enters the head, while training."""

    def __post_init__(self) -> None:
        require(self.labels >= 2, "ClassificationConfig.labels is too small", self.labels, ">= 2")
        share("ClassificationConfig", dropout=self.dropout)


@dataclass(frozen=True, kw_only=True)
class RegressionConfig:
    """One number a target; the loss is the mean squared error."""

    type: ClassVar[str] = "regression"
    targets: int = 1
    dropout: float = 0.0

    def __post_init__(self) -> None:
        positive("RegressionConfig", targets=self.targets)
        share("RegressionConfig", dropout=self.dropout)


HeadConfig: TypeAlias = ClassificationConfig | RegressionConfig


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Input, blocks, final norm; then pooling, projection and head, each where it is asked for.

    Without pooling every token has an output of its own: token classification, token regression.
    """

    input: InputConfig
    hidden_size: int
    blocks: tuple[BlockConfig, ...]
    norm: NormConfig = RMSNormConfig()
    pooling: PoolingConfig | None = MeanPoolingConfig()
    projection: ProjectionConfig | None = None
    head: HeadConfig | None = None
    embedding_dropout: float = 0.0
    precision: Precision = "exact"
    complement: tuple[int, ...] | None = None
    """The complement of each id. With it both strands are read with shared weights, and their hidden states averaged
    at each base: a sequence and its reverse complement have the same vector, and per-token outputs in reverse. Such an
    encoder cannot be read in pieces: the other strand begins at the end."""

    def __post_init__(self) -> None:
        positive("EncoderConfig", hidden_size=self.hidden_size)
        share("EncoderConfig", embedding_dropout=self.embedding_dropout)
        require(
            self.precision in ("exact", "upstream"),
            "EncoderConfig.precision is unknown",
            self.precision,
            "exact or upstream",
        )
        check_blocks(self.blocks, self.hidden_size)
        if self.complement is not None:
            self._check_complement(self.complement)

    def _check_complement(self, complement: tuple[int, ...]) -> None:
        size = self.vocab_size
        require(size is not None, "EncoderConfig.complement needs ids", self.input, "TokenInputConfig")
        in_range = len(complement) == size and all(0 <= i < len(complement) for i in complement)
        twice = in_range and all(complement[complement[i]] == i for i in range(len(complement)))
        last = isinstance(self.pooling, LastPoolingConfig)
        require(
            not last,
            "EncoderConfig.complement does not go with last pooling",
            "the end of one strand",
            "another pooling",
        )
        what = "EncoderConfig.complement is no complement"
        require(twice, what, complement[:20], f"{size} ids, each the complement of its complement")

    @property
    def vocab_size(self) -> int | None:
        """Number of ids, or None for an encoder of features."""
        return self.input.vocab_size if isinstance(self.input, TokenInputConfig) else None

    @property
    def max_length(self) -> int | None:
        """The longest sequence that every filter is defined for, or None where no filter sets a limit."""
        return max_length_of(self.blocks)

    @property
    def causal(self) -> bool:
        """Whether the encoder can be read in pieces: no mixer looks ahead, and no strand begins at the end."""
        return self.complement is None and all(is_causal(block.mixer) for block in self.blocks)

    @property
    def output_size(self) -> int:
        """Size of the last axis of what the encoder returns."""
        match self.head:
            case ClassificationConfig(labels=labels):
                return labels
            case RegressionConfig(targets=targets):
                return targets
            case None:
                return self.hidden_size if self.projection is None else self.projection.size

    def to_json(self) -> dict[str, Any]:
        """A plain JSON object; ``EncoderConfig.from_json`` is its inverse."""
        return encode(self)

    @classmethod
    def from_json(cls, value: Any) -> EncoderConfig:
        """Strict inverse of ``to_json``; also takes the text itself. Raises ConfigError."""
        return decode_json(cls, value)


BackboneConfig: TypeAlias = ModelConfig | EncoderConfig
