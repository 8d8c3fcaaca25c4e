"""After the last step: baselines on the same split, the loss curve, and what to tell the person who waited."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from crocuta.checkpoints.commit import make_folders, replace_file
from crocuta.errors import MissingExtraError
from crocuta.training.baselines import Baseline, baselines
from crocuta.training.config import TrainConfig
from crocuta.training.evaluate import MaskedHeldOut
from crocuta.training.loop import Outcome
from crocuta.training.report import comparison_table, plot_loss

logger = logging.getLogger(__name__)

COMPARISON_FILE = "comparison.json"
PLOT_FILE = "loss.png"
TEXT_ORDERS, DNA_ORDERS = 5, 12


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What became of a run. ``bits`` and all baselines are held-out bits in ``unit``, fewer is better."""

    bits: float
    unit: str
    baselines: tuple[Baseline, ...]
    plot: Path | None
    """None without matplotlib."""
    sample: str | None

    @property
    def best(self) -> Baseline | None:
        """The best of the baselines."""
        return min(self.baselines, key=lambda baseline: baseline.bits_per_token, default=None)

    @property
    def beats_all(self) -> bool | None:
        """Whether the model needs fewer bits than every baseline; None without any."""
        return None if self.best is None else self.bits < self.best.bits_per_token

    @property
    def sentence(self) -> str:
        """The result in words and figures."""
        best, ours = self.best, f"{self.bits:.3f} {self.unit}"
        if best is None:
            return f"Held-out: {ours}."
        theirs = f"{best.bits_per_token:.3f} of the best of them, {best.name}"
        share = f"{abs(1 - self.bits / best.bits_per_token):.1%}"
        if self.beats_all:
            return f"The model beats every baseline: {ours} on held-out data against {theirs} ({share} fewer)."
        ahead = [b.name for b in self.baselines if b.bits_per_token <= self.bits]
        count = (
            f"{len(ahead)} of {len(self.baselines)} baselines {'does' if len(ahead) == 1 else 'do'} as well or better"
        )
        return (
            f"The model does not beat every baseline: {ours} on held-out data against {theirs} ({share} more); {count}."
        )


def finish(outcome: Outcome, config: TrainConfig, folder: str | Path, sample: str | None = None) -> Summary:
    """Compare, plot and report a finished run: comparison.json, loss.png, samples/step-N.txt, and standard output.

    ``sample`` is text that the model generated, if any. Without matplotlib there is no plot, and the log says so.

    Raises:
        CheckpointError: the disk refused a file. InputError: the metrics cannot be read.
    """
    run = Path(folder)
    bits, unit = _result(outcome, config)
    compared = tuple(_baselines(outcome, config))
    if compared:
        _write_comparison(run, outcome, bits, compared, unit)
    if sample is not None:
        make_folders(run / "samples")
        replace_file(run / "samples" / f"step-{outcome.step}.txt", f"{sample}\n".encode())
    summary = Summary(bits=bits, unit=unit, baselines=compared, plot=_plot(run, compared, unit), sample=sample)
    _tell(summary)
    return summary


def _result(outcome: Outcome, config: TrainConfig) -> tuple[float, str]:
    """The held-out figure of a finished run, and what it is."""
    assert outcome.held_out is not None, "the run has not finished"
    if isinstance(outcome.held_out, MaskedHeldOut):
        return outcome.held_out.bits_per_masked_token, "bits per masked token"
    in_pieces = outcome.tokenizer.type == "pieces"
    is_dna = config.baselines == "dna" or outcome.tokenizer.type == "dna"
    unit = "bits per token" if in_pieces else "bits per base" if is_dna else "bits per byte"
    return outcome.held_out.bits_per_token, unit


def _baselines(outcome: Outcome, config: TrainConfig) -> list[Baseline]:
    if config.baselines is None:
        return []
    is_dna = config.baselines == "dna"
    return baselines(
        outcome.train.read(0, len(outcome.train)),
        outcome.held_out_source.read(0, len(outcome.held_out_source)),
        outcome.tokenizer.num_ids,
        DNA_ORDERS if is_dna else TEXT_ORDERS,
        contiguous=config.data.split_by == "position",
        family="Markov" if is_dna else "n-gram",
    )


def _write_comparison(run: Path, outcome: Outcome, bits: float, compared: tuple[Baseline, ...], unit: str) -> None:
    value = {
        "unit": unit,
        "model": bits,
        "baselines": {baseline.name: baseline.bits_per_token for baseline in compared},
        "held_out_tokens": len(outcome.held_out_source),
        "training_tokens": len(outcome.train),
        "step": outcome.step,
        "seconds": outcome.seconds,
    }
    replace_file(run / COMPARISON_FILE, (json.dumps(value, indent=2) + "\n").encode())


def _plot(run: Path, compared: tuple[Baseline, ...], unit: str) -> Path | None:
    path = run / PLOT_FILE
    try:
        plot_loss(run / "metrics.jsonl", path, _landmarks(compared), unit=unit)
    except MissingExtraError as error:
        logger.warning("no loss curve was drawn: %s", error)
        return None
    return path


def _landmarks(compared: tuple[Baseline, ...]) -> list[Baseline]:
    """The baselines that a plot has room for: the best of the orders and the best of lzma."""
    families = ([b for b in compared if b.name.startswith("lzma") == is_lzma] for is_lzma in (False, True))
    return [min(family, key=lambda baseline: baseline.bits_per_token) for family in families if family]


def _tell(summary: Summary) -> None:
    out = sys.stdout
    if summary.sample is not None:
        out.write(f"{summary.sample}\n\n")
    if summary.baselines:
        table = comparison_table(summary.bits, summary.baselines, model="> this model", unit=summary.unit)
        Console(file=out, highlight=False).print(table)
        out.write("\n")
    out.write(f"{summary.sentence}\n")
    out.flush()
