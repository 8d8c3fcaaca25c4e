"""A fine-tune as data: a task, labelled examples in explicit splits, the model to start from, and what of it moves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias

from crocuta.config import MeanPoolingConfig, PoolingConfig
from crocuta.data.labelled import LabelKind, LabelledFormat
from crocuta.data.splits import SplitConfig
from crocuta.errors import ConfigError
from crocuta.training.config import ModelSpec, OptimizerConfig
from crocuta.training.task_metrics import ClassificationFigure, RegressionFigure


def _require(holds: bool, what: str, given: object, expected: str) -> None:
    if not holds:
        raise ConfigError(what, given=given, expected=expected)


# --- tasks: what a sequence is given ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ClassificationTask:
    """One label a sequence. ``metric`` of the validation split chooses the weights and stops the run."""

    type: ClassVar[str] = "classification"
    kind: ClassVar[LabelKind] = "class"
    pooling: PoolingConfig = MeanPoolingConfig()
    dropout: float = 0.1
    """Of what enters the head."""
    metric: ClassificationFigure = "mcc"
    positive: str | None = None
    """With two labels, the one that F1 and AUROC are of; by default the second of the sorted names."""


@dataclass(frozen=True, kw_only=True)
class TokenClassificationTask:
    """One label a token; tokens without a label count neither in the loss nor in the figures."""

    type: ClassVar[str] = "token-classification"
    kind: ClassVar[LabelKind] = "tokens"
    dropout: float = 0.1
    metric: ClassificationFigure = "mcc"
    positive: str | None = None


@dataclass(frozen=True, kw_only=True)
class RegressionTask:
    """One or more numbers a sequence. Targets are standardised by their training mean and deviation while the head
    learns; the saved head gives them in their own units."""

    type: ClassVar[str] = "regression"
    kind: ClassVar[LabelKind] = "numbers"
    pooling: PoolingConfig = MeanPoolingConfig()
    dropout: float = 0.1
    metric: RegressionFigure = "mse"


TaskConfig: TypeAlias = ClassificationTask | TokenClassificationTask | RegressionTask

# --- tuning: which weights move ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FullTuning:
    """Every weight."""

    type: ClassVar[str] = "full"


@dataclass(frozen=True, kw_only=True)
class FrozenTuning:
    """The head and attention pooling alone; the backbone stays as it is, without dropout."""

    type: ClassVar[str] = "frozen"


@dataclass(frozen=True, kw_only=True)
class LoRATuning:
    """The head, and low-rank updates of the layers of ``targets`` (``model.lora``), merged into them at the end."""

    type: ClassVar[str] = "lora"
    rank: int = 8
    alpha: float = 16.0
    targets: tuple[Literal["projections", "attention", "mlp"], ...] = ("projections", "attention", "mlp")


TuningConfig: TypeAlias = FullTuning | FrozenTuning | LoRATuning

# --- the run ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LabelledDataConfig:
    """Which examples, where their parts stand, and how they are split."""

    splits: SplitConfig
    format: LabelledFormat = LabelledFormat()
    allow_shared: bool = False
    """Let one sequence stand in several splits. For nucleotides the reverse complement is the same sequence."""


@dataclass(frozen=True, kw_only=True)
class FineTuneConfig:
    """One fine-tune. On one machine the result is a function of this and the data, bit for bit."""

    task: TaskConfig
    model: ModelSpec
    """``load`` starts from a pretrained model, with its tokenizer; the others start from scratch, from ``seed``."""
    data: LabelledDataConfig
    tokenizer: dict[str, Any] = field(default_factory=lambda: {"type": "bytes"})
    tuning: TuningConfig = FullTuning()
    reverse_complement: Literal["off", "augment", "shared"] = "off"
    """augment: each training sequence is shown on a random strand. shared: both strands are read with the same
    weights and averaged, always (``EncoderConfig.complement``)."""
    dropout: float | None = None
    """Of the branches of every block; None keeps the model's."""
    batch_size: int = 16
    """Sequences an update; those of one batch are of similar lengths."""
    epochs: int = 20
    evaluate_every: int | None = None
    """Updates between two looks at the validation split; None: one an epoch."""
    patience: int = 5
    """Looks without a better figure after which the run stops. The best weights are kept in any case."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-3)
    head_learning_rate: float | None = None
    """For what is not pretrained: the head and the query of attention pooling. None: as the rest."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: autocast of the matrix products while training; evaluations are in float32."""
    log_every: int = 10
    tensorboard: bool = False
    seed: int = 0
    device: str = "cpu"
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "epochs", "patience", "log_every"):
            _require(getattr(self, name) >= 1, f"{name} must be positive", getattr(self, name), ">= 1")
        every, rate = self.evaluate_every, self.head_learning_rate
        _require(every is None or every >= 1, "evaluate_every must be positive", every, ">= 1, or none")
        _require(rate is None or rate > 0, "head_learning_rate must be positive", rate, "> 0")
        _require(0 <= self.seed < 2**63, "seed is impossible", self.seed, "0 <= seed < 2^63")
        for name, value in (("dropout", self.dropout), ("task.dropout", self.task.dropout)):
            _require(value is None or 0 <= value < 1, f"{name} is impossible", value, "0 <= dropout < 1")
