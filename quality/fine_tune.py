"""Does pretraining help? Which strand a piece of a genome has a gene on, learned from 300 labelled pieces.

    python quality/fine_tune.py            # on one core some minutes
    python quality/fine_tune.py --smoke    # tiny sizes, seconds; its figures mean nothing

A small StripedHyena learns to predict the next base of E. coli, on the stretch of the genome that the training pieces
are from; no base of the validation and test stretches is shown to it. Then a classification head is fine-tuned on the
labelled pieces (examples/data/ecoli_genes.tsv.gz), from those weights and from scratch: the same model, data, updates,
learning rates to choose from, early stopping. The learning rate of each start and seed is the one with the best figure
on the validation split, and the test figures of the other are not looked at. Both starts are printed with their seeds,
and the script ends with 1 if the pretrained runs are not better on average.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from crocuta.config import ComplexModalFilterConfig
from crocuta.data.fasta import Record, write_fasta
from crocuta.data.splits import ColumnSplits
from crocuta.training.config import DataConfig, ModelSpec, OptimizerConfig, StripedSpec, TrainConfig
from crocuta.training.finetune import FineTuneOutcome, fine_tune
from crocuta.training.finetune_config import ClassificationTask, FineTuneConfig, LabelledDataConfig
from crocuta.training.loop import train

EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "data"
TRAINING_BASES = 500_000
"""The stretch of the training pieces, see examples/data/build_genes.py."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of the model, its pretraining and the fine-tunes."""

    hidden: int = 64
    layers: int = 3
    modes: int = 8
    steps: int = 1000
    length: int = 256
    batch: int = 8
    epochs: int = 12
    patience: int = 12
    rates: tuple[float, ...] = (1e-3, 3e-3)


SMOKE = Sizes(hidden=8, layers=1, modes=2, steps=3, length=32, batch=2, epochs=1, rates=(3e-3,))


@dataclass(frozen=True)
class Arm:
    """The chosen run of one start and one seed."""

    start: str
    seed: int
    learning_rate: float
    validation_mcc: float
    test_mcc: float
    test_accuracy: float
    step: int
    seconds: float
    """Of process time, both learning rates."""


def spec(sizes: Sizes) -> StripedSpec:
    """Hyena layers and one of attention in the middle."""
    filter_ = ComplexModalFilterConfig(modes=sizes.modes, timescales=(1.0, 128.0))
    return StripedSpec(
        hidden_size=sizes.hidden,
        num_layers=sizes.layers,
        num_heads=4,
        filter=filter_,
        attention_layers=(sizes.layers // 2,),
    )


def pretrain(sizes: Sizes, folder: Path, seed: int) -> tuple[ModelSpec, float]:
    """A model of the next base on the training stretch; returns where it is, and its held-out bits a base."""
    with gzip.open(EXAMPLES / "ecoli_dh1.fa.gz", "rt") as stream:
        genome = "".join(line.strip() for line in stream if not line.startswith(">"))
    write_fasta([Record("training-stretch", "", genome[:TRAINING_BASES])], folder / "stretch.fa")
    config = TrainConfig(
        model=ModelSpec(striped=spec(sizes)),
        data=DataConfig(files=(str(folder / "stretch.fa"),), held_out=0.04, reverse_complement=True),
        tokenizer={"type": "dna"},
        length=sizes.length,
        batch_size=sizes.batch,
        steps=sizes.steps,
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=50),
        evaluate_every=max(1, sizes.steps // 4),
        checkpoint_every=sizes.steps,
        log_every=50,
        seed=seed,
        threads=1,
    )
    outcome = train(config, folder / "pretrained")
    assert outcome.held_out is not None
    return ModelSpec(load=str(folder / "pretrained")), outcome.held_out.bits_per_token


def tune(sizes: Sizes, start: str, model: ModelSpec, seed: int, folder: Path) -> Arm:
    """The best of the learning rates by validation; nothing of the test split but that run's figures is looked at."""
    began, runs = time.process_time(), []
    for rate in sizes.rates:
        config = FineTuneConfig(
            task=ClassificationTask(metric="mcc"),
            model=model,
            data=LabelledDataConfig(splits=ColumnSplits(files=(str(EXAMPLES / "ecoli_genes.tsv.gz"),))),
            tokenizer={"type": "dna"},
            optimizer=OptimizerConfig(learning_rate=rate, warmup_steps=20),
            batch_size=16,
            epochs=sizes.epochs,
            patience=sizes.patience,
            seed=seed,
            threads=1,
        )
        runs.append(fine_tune(config, folder / f"{start}-{seed}-{rate}"))
    best = max(runs, key=_validation_mcc)
    assert best.test is not None
    test: Any = best.test
    return Arm(
        start,
        seed,
        best.config.optimizer.learning_rate,
        _validation_mcc(best),
        test.mcc,
        test.accuracy,
        best.step,
        time.process_time() - began,
    )


def _validation_mcc(outcome: FineTuneOutcome) -> float:
    validation: Any = outcome.validation
    return float(validation.mcc)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes")
    parser.add_argument("--output", type=Path, help="file for the result as JSON")
    options = parser.parse_args()
    sizes, began, arms = SMOKE if options.smoke else Sizes(), time.process_time(), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pretrained, bits = pretrain(sizes, folder, seed=0)
        pretraining = time.process_time() - began
        for seed in options.seeds:
            for start, model in (("pretrained", pretrained), ("scratch", ModelSpec(striped=spec(sizes)))):
                arms.append(tune(sizes, start, model, seed, folder))
    means = {
        start: statistics.mean(a.test_mcc for a in arms if a.start == start) for start in ("pretrained", "scratch")
    }
    show(arms, means, bits, pretraining, time.process_time() - began)
    if options.output is not None:
        options.output.write_text(
            json.dumps(result(sizes, arms, means, bits, time.process_time() - began), indent=2) + "\n"
        )
    return 0 if options.smoke or means["pretrained"] > means["scratch"] else 1


def show(arms: list[Arm], means: dict[str, float], bits: float, pretraining: float, seconds: float) -> None:
    print(f"pretraining: {bits:.3f} bits a base on held-out bases of the training stretch, {pretraining:.0f} s")
    print(
        f"{'start':<12}{'seed':>5}{'rate':>8}{'validation MCC':>16}{'test MCC':>10}{'test accuracy':>15}{'seconds':>9}"
    )
    for arm in arms:
        print(
            f"{arm.start:<12}{arm.seed:>5}{arm.learning_rate:>8g}{arm.validation_mcc:>16.3f}"
            f"{arm.test_mcc:>10.3f}{arm.test_accuracy:>15.3f}{arm.seconds:>9.0f}"
        )
    seeds = ", ".join(str(arm.seed) for arm in arms if arm.start == "scratch")
    print(
        f"test MCC, mean over seeds {seeds}: pretrained {means['pretrained']:.3f}, from scratch {means['scratch']:.3f} "
        f"(chance 0); {seconds:.0f} s in all"
    )


def result(sizes: Sizes, arms: list[Arm], means: dict[str, float], bits: float, seconds: float) -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} thread",
        "torch": torch.__version__,
        "sizes": dataclasses.asdict(sizes),
        "pretraining_bits": bits,
        "runs": [dataclasses.asdict(arm) for arm in arms],
        "mean_test_mcc": means,
        "pretrained_is_better": means["pretrained"] > means["scratch"],
        "seconds": seconds,
    }


if __name__ == "__main__":
    sys.exit(main())
