"""Fine-tuning: a head on a pretrained (or new) backbone, chosen by the validation split and measured once on the test.

The order is fixed: train, look at the validation split, keep the best weights, stop when they no longer improve; then
put the best weights back, merge what was added, save, and only then look at the test split.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crocuta.checkpoints import commit
from crocuta.checkpoints.adapters import save_adapter
from crocuta.checkpoints.native import save
from crocuta.config import ClassificationConfig, HeadConfig, RegressionConfig
from crocuta.data.label_map import LabelMap
from crocuta.errors import ConfigError, InputError, NonFiniteError
from crocuta.model.build import build_encoder, encoder_from
from crocuta.model.encoder import Encoder
from crocuta.model.lm import Model
from crocuta.model.lora import LoRAConfig, add_lora, merge_lora
from crocuta.schema import encode
from crocuta.tokenizers.base import Tokenizer
from crocuta.training.finetune_config import (
    FineTuneConfig,
    FrozenTuning,
    FullTuning,
    LoRATuning,
    RegressionTask,
    TokenClassificationTask,
)
from crocuta.training.metrics import Metrics
from crocuta.training.models import model_of
from crocuta.training.optim import learning_rate_factor, make_optimizer, set_learning_rate
from crocuta.training.progress import Display
from crocuta.training.step import PATIENCE
from crocuta.training.task_data import IGNORED, Batch, Batches, TargetScale, TaskData, read_task_data
from crocuta.training.task_evaluate import measure
from crocuta.training.task_metrics import TaskMetrics, is_better

CONFIG_FILE = "fine_tune.json"
RESULT_FILE = "result.json"
ADAPTER_FILE = "adapter.safetensors"


@dataclass(frozen=True)
class FineTuneOutcome:
    """What a fine-tune came to. ``validation`` chose the weights and is too kind; ``test`` decided nothing."""

    validation: TaskMetrics
    test: TaskMetrics | None
    """None without a test split."""
    step: int
    """Updates after which the weights were the best."""
    steps: int
    """Updates that were made."""
    stopped_early: bool
    examples: dict[str, int]
    parameters: int
    """Of the saved encoder; adapters are merged by then."""
    trained_parameters: int
    labels: LabelMap | None
    encoder: Encoder
    tokenizer: Tokenizer
    config: FineTuneConfig


def fine_tune(config: FineTuneConfig, folder: str | Path) -> FineTuneOutcome:
    """Run ``config`` in ``folder``, which must be new or empty.

    The folder receives fine_tune.json, metrics.jsonl, the encoder with its tokenizer, labels.json for classes,
    adapter.safetensors for LoRA, and result.json with the figures of validation and test.

    Raises:
        InputError: the folder holds something; and every error of model, data and tokenizer. NonFiniteError: ten
        updates in a row, or a prediction, were not finite.
    """
    run = Path(folder)
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise InputError(f"{run} is not empty", expected="a new folder", fix="choose another, or --overwrite")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    model, tokenizer = model_of(config.model, config.tokenizer, config.seed)
    limits = model.config
    data = read_task_data(config, tokenizer, vocab_size=limits.vocab_size, max_length=limits.max_length)
    positive = _positive(config, data.labels)
    encoder = _make_encoder(config, model, tokenizer, data).to(config.device)
    new = _prepare(encoder, config)
    tuner = _Tuner(config, encoder, new, tokenizer, data, positive)
    commit.make_folders(run)  # only now, so that a run that cannot start leaves nothing behind
    text = json.dumps(encode(config), indent=2) + "\n"
    commit.replace_file(run / CONFIG_FILE, text.encode())
    display = Display(str(run))
    metrics = Metrics(run, resume_step=None, tensorboard=config.tensorboard)
    try:
        tuner.announce(display)
        tuner.train(metrics, display)
        tuner.restore_best()
        outcome = _finish(tuner, run, tokenizer)
        metrics.write("final", outcome.step, **_figures(outcome.validation))
        if outcome.test is not None:
            metrics.write("test", outcome.step, **_figures(outcome.test))
    finally:
        metrics.close()
    return outcome


# --- the model ----------------------------------------------------------------------------------------------------


def _make_encoder(config: FineTuneConfig, model: Model, tokenizer: Tokenizer, data: TaskData) -> Encoder:
    complement = None
    if config.reverse_complement == "shared":
        table = _complement(tokenizer).tolist()
        complement = (*table, *range(len(table), model.config.vocab_size))
    task = config.task
    head: HeadConfig = ClassificationConfig(labels=data.outputs, dropout=task.dropout)
    if isinstance(task, RegressionTask):
        head = RegressionConfig(targets=data.outputs, dropout=task.dropout)
    pooling = None if isinstance(task, TokenClassificationTask) else task.pooling
    encoder = encoder_from(model, pooling=pooling, head=head, complement=complement, seed=config.seed)
    if config.dropout is None:
        return encoder
    blocks = tuple(dataclasses.replace(block, dropout=config.dropout) for block in encoder.config.blocks)
    changed = build_encoder(dataclasses.replace(encoder.config, blocks=blocks), dtype=encoder.norm.scale.dtype)
    changed.load_state_dict(encoder.state_dict())
    return changed


def _complement(tokenizer: Tokenizer) -> npt.NDArray[np.int64]:
    """The complement of each id of the tokenizer. Raises ConfigError where ids are not nucleotides."""
    table = tokenizer.complement_ids
    if table is None:
        given = f"a tokenizer of type {tokenizer.type}"
        raise ConfigError("reverse_complement needs a tokenizer of nucleotides", given=given)
    return table


def _prepare(encoder: Encoder, config: FineTuneConfig) -> list[nn.Parameter]:
    """Freeze what ``config.tuning`` leaves alone, add adapters; returns the parameters that did not come pretrained."""
    backbone = {id(p) for part in (encoder.embedding, encoder.blocks, encoder.norm) for p in part.parameters()}
    new = [p for p in encoder.parameters() if id(p) not in backbone]
    match config.tuning:
        case FullTuning():
            pass
        case FrozenTuning():
            encoder.requires_grad_(False)
        case LoRATuning(rank=rank, alpha=alpha, targets=targets):
            add_lora(encoder, LoRAConfig(rank=rank, alpha=alpha, targets=targets), seed=config.seed)
    for parameter in new:
        parameter.requires_grad_()
    return new


# --- the run ------------------------------------------------------------------------------------------------------


class _Tuner:
    """One run's moving parts."""

    def __init__(
        self,
        config: FineTuneConfig,
        encoder: Encoder,
        new: Sequence[nn.Parameter],
        tokenizer: Tokenizer,
        data: TaskData,
        positive: int,
    ) -> None:
        self.config = config
        self.encoder = encoder
        self.data = data
        self.positive = positive
        complement = _complement(tokenizer) if config.reverse_complement == "augment" else None
        self.batches = Batches(data.rows["train"], config.batch_size, config.seed, complement=complement)
        self.optimizer = make_optimizer(encoder, config.optimizer, new, config.head_learning_rate)
        self.step = 0
        self.skipped = 0
        """Updates skipped in a row as not finite."""
        self.best: TaskMetrics | None = None
        self.best_step = 0
        self.best_weights: dict[str, Tensor] = {}
        self.stale = 0
        """Looks at the validation split since the best."""

    @property
    def steps(self) -> int:
        """Updates of the whole run, if it is not stopped."""
        return self.config.epochs * len(self.batches)

    def announce(self, display: Display) -> None:
        trained = sum(p.numel() for p in self.encoder.parameters() if p.requires_grad)
        every = sum(p.numel() for p in self.encoder.parameters())
        counts = ", ".join(f"{len(rows)} {name}" for name, rows in self.data.rows.items())
        display.say(f"training {trained:,} of {every:,} parameters; examples: {counts}; seed {self.config.seed}")

    def train(self, metrics: Metrics, display: Display) -> None:
        """Update until the epochs are over or the validation split has been no better for ``patience`` looks."""
        began, every = time.monotonic(), self.config.evaluate_every or len(self.batches)
        for epoch in range(self.config.epochs):
            for batch in self.batches.epoch(epoch):
                self._update(batch, metrics, time.monotonic() - began)
                if self.step % every == 0 or self.step == self.steps:
                    self._look(metrics, display)
                    if self.stale >= self.config.patience:
                        return

    def restore_best(self) -> None:
        """Put the best weights back."""
        with torch.no_grad():
            for name, parameter in self.encoder.named_parameters():
                if name in self.best_weights:
                    parameter.copy_(self.best_weights[name])

    def _update(self, batch: Batch, metrics: Metrics, seconds: float) -> None:
        config, device = self.config, self.config.device
        factor = learning_rate_factor(config.optimizer, self.step, self.step / self.steps)
        set_learning_rate(self.optimizer, factor)
        self.encoder.train()
        if isinstance(config.tuning, FrozenTuning):
            self.encoder.blocks.eval()
        kind = torch.device(device).type
        with torch.autocast(kind, torch.bfloat16, enabled=config.precision == "bfloat16"):
            outputs = self.encoder(batch.ids.to(device), batch.lengths)
        targets = batch.targets if self.data.scale is None else self.data.scale.standardised(batch.targets)
        loss = task_loss(outputs.float(), targets.to(device))
        loss.backward()
        trained = [p for p in self.encoder.parameters() if p.requires_grad]
        norm = float(torch.nn.utils.clip_grad_norm_(trained, config.optimizer.clip))
        value = float(loss.detach())
        self.step += 1
        if math.isfinite(value) and math.isfinite(norm):
            self.skipped = 0
            self.optimizer.step()
        else:
            self._skip(metrics, value, norm)
        self.optimizer.zero_grad(set_to_none=True)
        if self.step % config.log_every == 0 or self.step == 1:
            rate = config.optimizer.learning_rate * factor
            metrics.write("train", self.step, loss=value, gradient_norm=norm, learning_rate=rate, seconds=seconds)

    def _skip(self, metrics: Metrics, loss: float, norm: float) -> None:
        self.skipped += 1
        metrics.write("skipped", self.step, loss=loss, gradient_norm=norm)
        if self.skipped >= PATIENCE:
            raise NonFiniteError(
                f"{self.skipped} updates in a row were not finite, up to step {self.step}",
                given=f"loss {loss}, gradient norm {norm}",
                fix="lower the learning rate",
            )

    def _look(self, metrics: Metrics, display: Display) -> None:
        """Measure the validation split, and keep the weights if they are the best so far."""
        data = self.data
        rows = data.rows["validation"]
        found = measure(self.encoder, rows, data.labels, positive=self.positive, scale=data.scale)
        name = self.config.task.metric
        value: float | None = getattr(found, name)
        if value is None:
            fix = "choose another task.metric, or a larger validation split"
            raise InputError(f"the validation split has no {name}", given="; ".join(found.notes), fix=fix)
        if self.best is None or is_better(name, value, getattr(self.best, name)):
            self.best, self.best_step, self.stale = found, self.step, 0
            self.best_weights = {
                name: p.detach().clone() for name, p in self.encoder.named_parameters() if p.requires_grad
            }
        else:
            self.stale += 1
        metrics.write("validation", self.step, **_figures(found))
        display.say(f"step {self.step}/{self.steps}  validation {name} {value:.4f}  best at step {self.best_step}")


def task_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of [b c] or [b l c], where IGNORED does not count, or mean squared error of [b t].

    A batch without any label has the loss 0.
    """
    if targets.is_floating_point():
        return F.mse_loss(outputs, targets)
    counted = (targets != IGNORED).sum().clamp(min=1)
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="sum") / counted


# --- the end ------------------------------------------------------------------------------------------------------


def _finish(tuner: _Tuner, run: Path, tokenizer: Tokenizer) -> FineTuneOutcome:
    """Make the encoder what is saved, save it, and only then measure the test split."""
    config, encoder, data = tuner.config, tuner.encoder, tuner.data
    trained = sum(p.numel() for p in encoder.parameters() if p.requires_grad)
    if data.scale is not None:
        _unstandardise(encoder, data.scale)
    if isinstance(config.tuning, LoRATuning):
        save_adapter(encoder, run / ADAPTER_FILE)
        merge_lora(encoder)
    encoder.requires_grad_()
    save(encoder, tokenizer, run)
    if data.labels is not None:
        data.labels.save(run)
    validation = measure(encoder, data.rows["validation"], data.labels, positive=tuner.positive)
    test = measure(encoder, data.rows["test"], data.labels, positive=tuner.positive) if data.rows["test"] else None
    outcome = FineTuneOutcome(
        validation=validation,
        test=test,
        step=tuner.best_step,
        steps=tuner.step,
        stopped_early=tuner.step < tuner.steps,
        examples={name: len(rows) for name, rows in data.rows.items()},
        parameters=sum(p.numel() for p in encoder.parameters()),
        trained_parameters=trained,
        labels=data.labels,
        encoder=encoder,
        tokenizer=tokenizer,
        config=config,
    )
    commit.replace_file(run / RESULT_FILE, (json.dumps(result_of(outcome), indent=2) + "\n").encode())
    return outcome


@torch.no_grad()
def _unstandardise(encoder: Encoder, scale: TargetScale) -> None:
    """Fold the scale into the head: (W x + b) · deviation + mean."""
    assert encoder.head is not None
    assert encoder.head.bias is not None
    weight, bias = encoder.head.weight, encoder.head.bias
    mean, deviation = scale.mean.to(weight.device), scale.deviation.to(weight.device)
    weight.copy_(weight * deviation[:, None])
    bias.copy_(bias * deviation + mean)


def result_of(outcome: FineTuneOutcome) -> dict[str, Any]:
    """The JSON object of result.json: a function of configuration and data, so that two runs can be compared."""
    task = outcome.config.task
    return {
        "task": task.type,
        "seed": outcome.config.seed,
        "metric": task.metric,
        "best_step": outcome.step,
        "steps": outcome.steps,
        "stopped_early": outcome.stopped_early,
        "examples": outcome.examples,
        "parameters": outcome.parameters,
        "trained_parameters": outcome.trained_parameters,
        "labels": None if outcome.labels is None else list(outcome.labels.names),
        "validation": dataclasses.asdict(outcome.validation),
        "test": None if outcome.test is None else dataclasses.asdict(outcome.test),
    }


def _positive(config: FineTuneConfig, labels: LabelMap | None) -> int:
    """The class that F1 and AUROC are of, where there are two."""
    if labels is None or isinstance(config.task, RegressionTask) or config.task.positive is None:
        return 1
    if len(labels.names) > 2:
        given = f"{config.task.positive!r} and {len(labels.names)} labels"
        raise ConfigError("task.positive is for two labels", given=given, fix="leave it out")
    return labels.index(config.task.positive)


def _figures(metrics: TaskMetrics) -> dict[str, Any]:
    """The numbers of ``metrics`` for a line of metrics.jsonl."""
    return {name: value for name, value in dataclasses.asdict(metrics).items() if isinstance(value, int | float)}
