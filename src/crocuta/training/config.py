"""A training run as data: everything that decides its outcome, in one frozen object, JSON or YAML on disk."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias

from crocuta.config import FilterConfig, ModelConfig
from crocuta.errors import ConfigError


def _require(holds: bool, what: str, given: object, expected: str) -> None:
    if not holds:
        raise ConfigError(what, given=given, expected=expected)


@dataclass(frozen=True, kw_only=True)
class StripedSpec:
    """A StripedHyena in a few numbers (``crocuta.presets.striped``); the vocabulary is the tokenizer's."""

    hidden_size: int
    num_layers: int
    num_heads: int
    filter: FilterConfig
    attention_layers: tuple[int, ...] = ()
    dropout: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Which model to train: exactly one of the four."""

    striped: StripedSpec | None = None
    preset: str | None = None
    config: ModelConfig | None = None
    load: str | None = None
    """A saved model to go on from, with its tokenizer."""

    def __post_init__(self) -> None:
        given = [name for name in ("striped", "preset", "config", "load") if getattr(self, name) is not None]
        _require(
            len(given) == 1, "model needs exactly one description", given or "none", "striped, preset, config or load"
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to read. ``files``: FASTA, text or JSONL (also compressed), or with format "tokens" the prefixes that
    ``crocuta prepare`` wrote."""

    files: tuple[str, ...]
    format: Literal["auto", "text", "lines", "fasta", "jsonl", "tokens"] = "auto"
    field: str = "text"
    case: Literal["upper", "keep"] = "upper"
    held_out: float = 0.05
    split_by: Literal["position", "record"] = "position"
    reverse_complement: bool = False
    """Show each training window on a random strand."""

    def __post_init__(self) -> None:
        _require(len(self.files) > 0, "data.files is empty", self.files, "at least one path")
        _require(0 < self.held_out < 1, "data.held_out is impossible", self.held_out, "0 < held_out < 1")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with decay on matrices only, linear warm-up, then cosine or linear decay to ``final_fraction``.

    ``filter_learning_rate`` is for everything inside a long filter (None: the same as the rest).
    """

    learning_rate: float = 3e-3
    filter_learning_rate: float | None = None
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    warmup_steps: int = 50
    schedule: Literal["cosine", "linear"] = "cosine"
    final_fraction: float = 0.0

    def __post_init__(self) -> None:
        _require(self.learning_rate > 0, "optimizer.learning_rate must be positive", self.learning_rate, "> 0")
        _require(self.clip > 0, "optimizer.clip must be positive", self.clip, "> 0")
        _require(all(0 <= b < 1 for b in self.betas), "optimizer.betas are impossible", self.betas, "0 <= beta < 1")
        _require(0 <= self.final_fraction <= 1, "optimizer.final_fraction is impossible", self.final_fraction, "0 to 1")


@dataclass(frozen=True, kw_only=True)
class NextTokenConfig:
    """Each token from those before it."""

    type: ClassVar[str] = "next_token"


@dataclass(frozen=True, kw_only=True)
class MaskedConfig:
    """Hidden tokens from all that is left of the window (Devlin et al. 2019, section 3.1); see ``training.masking``."""

    type: ClassVar[str] = "masked"
    fraction: float = 0.15
    """Of the tokens, which are chosen to be predicted."""
    mask_token: float = 0.8
    """Of the chosen ones, which become the mask."""
    random_token: float = 0.1
    """Of the chosen ones, which become a random token; the rest stay what they are."""
    mask_id: int | None = None
    """The id of the mask; None: the tokenizer's own, if it has one, as that of nucleotides has."""

    def __post_init__(self) -> None:
        _require(0 < self.fraction <= 1, "objective.fraction is impossible", self.fraction, "0 < fraction <= 1")
        shares = self.mask_token, self.random_token
        _require(
            min(shares) >= 0 and sum(shares) <= 1 + 1e-9,
            "objective.mask_token and random_token are impossible",
            shares,
            "0 or more, and not over 1 together",
        )
        _require(self.mask_id is None or self.mask_id >= 0, "objective.mask_id is impossible", self.mask_id, ">= 0")


ObjectiveConfig: TypeAlias = NextTokenConfig | MaskedConfig


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """What to generate when the run ends, to look at."""

    prompt: str = ""
    tokens: int = 400
    temperature: float = 0.8
    top_p: float | None = None


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. The result is a function of this and the data, bit for bit on one machine, if there is no
    ``time_limit`` or the run stays ahead of it."""

    model: ModelSpec
    data: DataConfig
    tokenizer: dict[str, Any] = field(default_factory=lambda: {"type": "bytes"})
    objective: ObjectiveConfig = NextTokenConfig()
    """What is learnt. Models that look ahead learn masked tokens only."""
    length: int = 512
    """Tokens a training window."""
    batch_size: int = 8
    """Windows an update and pass; an update sees batch_size · accumulation windows."""
    accumulation: int = 1
    steps: int = 1000
    time_limit: float | None = None
    """Seconds of training after which the run ends; the learning rate decays in time for it."""
    optimizer: OptimizerConfig = OptimizerConfig()
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: autocast of the matrix products; parameters, filters, norms and losses stay in float32."""
    checkpoint_activations: bool = False
    evaluate_every: int = 200
    evaluate_tokens: int = 16384
    """Held-out tokens of the evaluations on the way; the last one uses all of them."""
    checkpoint_every: int = 200
    keep_checkpoints: int = 2
    log_every: int = 10
    tensorboard: bool = False
    baselines: Literal["text", "dna"] | None = None
    """Compare the model at the end with n-gram models and lzma on the same split."""
    sample: SampleConfig | None = None
    seed: int = 0
    device: str = "cpu"
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in (
            "length",
            "batch_size",
            "accumulation",
            "steps",
            "evaluate_every",
            "evaluate_tokens",
            "checkpoint_every",
            "log_every",
        ):
            _require(getattr(self, name) >= 1, f"{name} must be positive", getattr(self, name), ">= 1")
        for name in ("baselines", "sample"):
            _require(
                getattr(self, name) is None or isinstance(self.objective, NextTokenConfig),
                f"{name} needs a model that predicts the next token",
                "objective.type masked",
                f"objective.type next_token, or no {name}",
            )
        _require(self.keep_checkpoints >= 2, "keep_checkpoints is too small", self.keep_checkpoints, ">= 2")
        _require(self.time_limit is None or self.time_limit > 0, "time_limit must be positive", self.time_limit, "> 0")
