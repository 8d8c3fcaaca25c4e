"""The training run: build, restore, update, evaluate, save, finish. Readable from top to bottom."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from crocuta.checkpoints import commit
from crocuta.checkpoints.native import save
from crocuta.data.loader import WindowLoader
from crocuta.data.windows import TokenSource
from crocuta.errors import CheckpointError, ConfigError, InputError
from crocuta.model.lm import Model
from crocuta.schema import encode
from crocuta.tokenizers.base import Tokenizer
from crocuta.training.checkpoint import Restored, TrainingCheckpoints
from crocuta.training.config import MaskedConfig, NextTokenConfig, TrainConfig
from crocuta.training.data import open_data
from crocuta.training.evaluate import HeldOut, MaskedHeldOut, evaluate, evaluate_masked
from crocuta.training.masking import EVALUATION_SEED, Masking
from crocuta.training.metrics import Metrics
from crocuta.training.models import model_of
from crocuta.training.optim import (
    learning_rate_factor,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    set_learning_rate,
)
from crocuta.training.progress import Display, Status, duration
from crocuta.training.step import PATIENCE, clear_gradients, refuse_to_go_on, train_step

CONFIG_FILE = "train.json"


@dataclass
class Progress:
    """Where the run stands; all of it is in every checkpoint."""

    step: int = 0
    seconds: float = 0.0
    skipped: int = 0
    """Updates skipped in a row as not finite."""
    held_out_bits: float | None = None
    """A byte, or a hidden token where those are learnt."""
    loss: float = math.nan


@dataclass(frozen=True)
class Outcome:
    """How a run ended: finished, or stopped by a signal after saving."""

    finished: bool
    step: int
    seconds: float
    held_out: HeldOut | MaskedHeldOut | None
    train: TokenSource
    held_out_source: TokenSource
    model: Model
    tokenizer: Tokenizer


def train(config: TrainConfig, folder: str | Path, *, resume: bool = False) -> Outcome:
    """Run ``config`` in ``folder``, which receives train.json, metrics.jsonl, checkpoints/ and the model.

    With ``resume`` the run goes on from its newest good checkpoint, to the same bits as if it had never stopped
    (on one machine, with the same number of threads). SIGINT and SIGTERM save and return; a second one kills.

    Raises:
        InputError: the folder holds another run; ConfigError: resuming under another configuration, and every error
        of data, tokenizer and checkpoints. NonFiniteError: ten updates in a row were not finite.
    """
    run = Path(folder)
    _check_folder(run, config, resume)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    model, tokenizer = model_of(config.model, config.tokenizer, config.seed)
    maskings = _maskings(config, model, tokenizer)
    train_source, held_out = open_data(config.data, tokenizer, model.config.vocab_size)
    loader = _loader(config, train_source, tokenizer)
    if not resume:  # only now, so that a run that cannot start leaves nothing behind
        commit.make_folders(run)
        commit.remove_unfinished(run, CONFIG_FILE)  # of a run that was killed here
        commit.replace_file(run / CONFIG_FILE, _config_text(config).encode())
    with TrainingCheckpoints(run / "checkpoints", keep=config.keep_checkpoints) as checkpoints:
        trainer = _Trainer(config, run, model, tokenizer, loader, held_out, checkpoints, maskings)
        return trainer.run(checkpoints.latest() if resume else None)


class _Trainer:
    """One run's moving parts."""

    def __init__(
        self,
        config: TrainConfig,
        run: Path,
        model: Model,
        tokenizer: Tokenizer,
        loader: WindowLoader,
        held_out: TokenSource,
        checkpoints: TrainingCheckpoints,
        maskings: _Maskings | None,
    ) -> None:
        self.config = config
        self.folder = run
        self.model = model.to(config.device)
        self.model.checkpoint_activations = config.checkpoint_activations
        self.tokenizer = tokenizer
        self.loader = loader
        self.held_out = held_out
        self.checkpoints = checkpoints
        self.maskings = maskings
        self.optimizer = make_optimizer(self.model, config.optimizer)
        self.progress = Progress()
        self.stop = _StopSignal()

    def run(self, restored: Restored | None) -> Outcome:
        if restored is not None:
            self._restore(restored)
        resume_step = None if restored is None else self.progress.step
        metrics = Metrics(self.folder, resume_step=resume_step, tensorboard=self.config.tensorboard)
        try:
            with Display(str(self.folder)) as display, self.stop:
                self._announce(display, restored)
                self._loop(metrics, display)
            return self._finish(metrics, display)
        finally:
            metrics.close()

    def _loop(self, metrics: Metrics, display: Display) -> None:
        self.model.train()
        began, already = time.monotonic(), self.progress.seconds
        while self._fraction() < 1 and not self.stop.asked:
            self._update(metrics)
            self.progress.seconds = already + time.monotonic() - began
            step = self.progress.step
            if step % self.config.evaluate_every == 0:
                result = self._evaluate(max_tokens=self.config.evaluate_tokens)
                self.progress.held_out_bits = result.headline
                metrics.write("eval", step, **result.figures)
            self.progress.seconds = already + time.monotonic() - began
            if step % self.config.checkpoint_every == 0:
                self._save_checkpoint()
            display.show(self._status(), final=self._fraction() >= 1)

    def _update(self, metrics: Metrics) -> None:
        config, progress = self.config, self.progress
        factor = learning_rate_factor(config.optimizer, progress.step, self._fraction())
        set_learning_rate(self.optimizer, factor)
        result = train_step(self.model, self.optimizer, self._batch, config)
        progress.skipped = progress.skipped + 1 if result.skipped else 0
        if result.skipped:
            metrics.write("skipped", progress.step + 1, loss=result.loss, gradient_norm=result.gradient_norm)
            if progress.skipped >= PATIENCE:
                refuse_to_go_on(self.model, progress.step + 1, progress.skipped)
        clear_gradients(self.optimizer)
        progress.step += 1
        progress.loss = result.loss
        if progress.step % config.log_every == 0 or progress.step == 1:
            rate = config.optimizer.learning_rate * factor
            metrics.write(
                "train",
                progress.step,
                loss=result.loss,
                gradient_norm=result.gradient_norm,
                learning_rate=rate,
                epoch=self.loader.epoch(progress.step * config.accumulation),
                seconds=progress.seconds,
            )

    def _batch(self, micro: int) -> tuple[Tensor, Tensor]:
        index = self.progress.step * self.config.accumulation + micro
        inputs, targets = self.loader.batch(index)
        if self.maskings is not None:
            inputs, targets = self.maskings.training.batch(inputs, index)
        return torch.from_numpy(inputs).to(self.config.device), torch.from_numpy(targets).to(self.config.device)

    def _evaluate(self, *, max_tokens: int | None = None, context: int = 0) -> HeldOut | MaskedHeldOut:
        length = self.config.length
        if self.maskings is not None:
            return evaluate_masked(self.model, self.held_out, self.maskings.held_out, length, max_tokens=max_tokens)
        return evaluate(self.model, self.held_out, self.tokenizer, length, max_tokens=max_tokens, context=context)

    def _fraction(self) -> float:
        """How much of the run is done: by steps, or by time where the clock is ahead."""
        by_steps = self.progress.step / self.config.steps
        limit = self.config.time_limit
        return min(1.0, by_steps if limit is None else max(by_steps, self.progress.seconds / limit))

    def _status(self) -> Status:
        progress, config = self.progress, self.config
        fraction, seconds = self._fraction(), max(progress.seconds, 1e-9)
        tokens = progress.step * config.batch_size * config.accumulation * config.length
        left = seconds * (1 - fraction) / max(fraction, 1e-9)
        return Status(
            progress.step,
            config.steps,
            fraction,
            progress.loss / math.log(2),
            progress.held_out_bits,
            tokens / seconds,
            left,
            masked=self.maskings is not None,
        )

    def _announce(self, display: Display, restored: Restored | None) -> None:
        parameters = sum(p.numel() for p in self.model.parameters())
        data = f"{len(self.loader.source):,} training and {len(self.held_out):,} held-out tokens"
        display.say(f"{parameters:,} parameters; {data}; {torch.get_num_threads()} threads")
        if restored is not None:
            display.say(f"resumed from {restored.path.name}, {duration(self.progress.seconds)} into the run")

    def _save_checkpoint(self) -> None:
        tensors = {
            "model": {name: p.detach() for name, p in self.model.named_parameters()} | dict(self.model.named_buffers()),
            "optimizer": optimizer_tensors(self.model, self.optimizer),
            "random": _random_state(),
        }
        self.checkpoints.save(self.progress.step, tensors, _plain(dataclasses.asdict(self.progress)))

    def _restore(self, restored: Restored) -> None:
        wanted = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        if wanted.keys() != restored.tensors["model"].keys():
            raise CheckpointError(
                f"{restored.path} holds another model", fix="resume with the configuration it was made with"
            )
        with torch.no_grad():
            for name, tensor in restored.tensors["model"].items():
                wanted[name].copy_(tensor)
        load_optimizer_tensors(self.model, self.optimizer, restored.tensors["optimizer"])
        _set_random_state(restored.tensors["random"])
        state: dict[str, Any] = {k: math.nan if v == "nan" else v for k, v in restored.state.items()}
        self.progress = Progress(**state)

    def _finish(self, metrics: Metrics, display: Display) -> Outcome:
        finished = not self.stop.asked
        result = None
        if finished:
            result = self._evaluate(context=self.config.length // 2)
            metrics.write("final", self.progress.step, **result.figures, seconds=self.progress.seconds)
            save(self.model, self.tokenizer, self.folder)
        else:
            self._save_checkpoint()
            display.say(f"stopped by a signal and saved at step {self.progress.step}; go on with --resume")
        self.model.eval()
        return Outcome(
            finished,
            self.progress.step,
            self.progress.seconds,
            result,
            self.loader.source,
            self.held_out,
            self.model,
            self.tokenizer,
        )


class _StopSignal:
    """Turns the first SIGINT or SIGTERM into a request to stop after the current step; a second one acts at once."""

    def __init__(self) -> None:
        self.asked = False
        self._former: dict[int, Any] = {}

    def __enter__(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._former[number] = signal.signal(number, self._ask)
            except ValueError:  # not the main thread: whoever runs us there handles signals
                return

    def __exit__(self, *error: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        for other, handler in self._former.items():
            signal.signal(other, handler)


def _config_text(config: TrainConfig) -> str:
    return json.dumps(encode(config), indent=2) + "\n"


def _check_folder(run: Path, config: TrainConfig, resume: bool) -> None:
    """The folder is free, or holds this very run."""
    recorded = run / CONFIG_FILE
    if resume:
        if not recorded.exists():
            raise InputError(f"there is no run to resume in {run}", fix="start one without --resume")
        try:
            found = json.loads(recorded.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{recorded} cannot be read", given=error, fix="start a new run") from error
        if found != json.loads(_config_text(config)):
            raise ConfigError(
                f"{run} was started with another configuration", expected=str(recorded), fix="resume with that file"
            )
    elif run.exists() and (not run.is_dir() or any(not p.name.startswith(commit.TEMPORARY) for p in run.iterdir())):
        raise InputError(
            f"{run} is not empty", expected="a new folder", fix="choose another, or --resume, or --overwrite"
        )


@dataclass(frozen=True)
class _Maskings:
    """How batches are masked, and how held-out windows are, in the same way in every run."""

    training: Masking
    held_out: Masking


def _maskings(config: TrainConfig, model: Model, tokenizer: Tokenizer) -> _Maskings | None:
    match config.objective:
        case MaskedConfig() as masked:
            size = model.config.vocab_size
            return _Maskings(
                training=Masking(masked, tokenizer, size, config.seed),
                held_out=Masking(masked, tokenizer, size, EVALUATION_SEED),
            )
        case NextTokenConfig():
            if not model.config.causal:
                raise ConfigError(
                    "a model that looks ahead cannot learn to predict the next token: it sees it",
                    given="objective.type next_token",
                    fix="set objective.type to masked",
                )
            return None


def _loader(config: TrainConfig, source: TokenSource, tokenizer: Tokenizer) -> WindowLoader:
    strands = config.data.reverse_complement
    return WindowLoader(
        source,
        config.length,
        config.batch_size,
        config.seed,
        reverse_complement=strands,
        complement_ids=tokenizer.complement_ids if strands else None,
    )


def _random_state() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_state(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN."""
    return {key: "nan" if isinstance(value, float) and math.isnan(value) else value for key, value in values.items()}
