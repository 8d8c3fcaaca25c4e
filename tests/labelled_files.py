"""Small labelled files that a tiny model learns something of, and the description of a run of a second."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from crocuta.config import ComplexModalFilterConfig
from crocuta.data.splits import FileSplits, FractionSplits
from crocuta.training.config import ModelSpec, OptimizerConfig, StripedSpec
from crocuta.training.finetune_config import ClassificationTask, FineTuneConfig, LabelledDataConfig

SPEC = StripedSpec(
    hidden_size=8,
    num_layers=2,
    num_heads=2,
    filter=ComplexModalFilterConfig(modes=2, timescales=(1.0, 20.0)),
    attention_layers=(1,),
)


def sequences(count: int = 120, seed: int = 0) -> list[tuple[str, bool]]:
    """Nucleotides of 12 to 30 letters, and whether they are rich in A and T."""
    draw = random.Random(seed)
    rows = []
    for index in range(count):
        rich = index % 2 == 0
        weights = (4, 1, 1, 4) if rich else (1, 2, 2, 1)
        rows.append(("".join(draw.choices("ACGT", weights, k=draw.randint(12, 30))), rich))
    return rows


def labels_of(kind: str, sequence: str, rich: bool) -> Any:
    """The label of one sequence: a class, one of each token, or two numbers on different scales."""
    if kind == "class":
        return "rich" if rich else "poor"
    share = sum(letter in "AT" for letter in sequence) / len(sequence)
    return ["W" if letter in "AT" else "S" for letter in sequence] if kind == "tokens" else [100 * share, 5 - share]


def write_examples(folder: Path, kind: str, form: str = "tsv", rows: list[tuple[str, bool]] | None = None) -> str:
    """The rows as a TSV, JSONL or FASTA with labels of ``kind``; returns its path."""
    lines = ["sequence\tlabel"] if form == "tsv" else []
    for index, (sequence, rich) in enumerate(rows or sequences()):
        label = labels_of(kind, sequence, rich)
        text = {"class": str, "tokens": "".join, "numbers": lambda values: ",".join(map(repr, values))}[kind](label)
        if form == "tsv":
            lines.append(f"{sequence}\t{text}")
        elif form == "jsonl":
            lines.append(json.dumps({"sequence": sequence, "label": label}))
        else:
            lines.append(f">s{index} label={text}\n{sequence}")
    path = folder / f"{kind}.{form}"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def tiny_fine_tune(path: str, **changes: Any) -> FineTuneConfig:
    """Three epochs of a tiny striped model on the examples of ``path``, a fifth each for validation and test."""
    config = FineTuneConfig(
        task=ClassificationTask(),
        model=ModelSpec(striped=SPEC),
        tokenizer={"type": "dna"},
        data=LabelledDataConfig(splits=FractionSplits(files=(path,), validation=0.2, test=0.2)),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=5),
        batch_size=8,
        epochs=3,
        log_every=1,
        threads=1,
        seed=1,
    )
    return dataclasses.replace(config, **changes)


def three_files(folder: Path, test_labels: dict[str, str] | None = None) -> LabelledDataConfig:
    """Explicit splits; ``test_labels`` puts other labels on the test sequences."""
    rows = sequences()
    parts = {"train": rows[:72], "validation": rows[72:96], "test": rows[96:]}
    paths = {}
    for name, part in parts.items():
        labels = [labels_of("class", *row) for row in part]
        if name == "test" and test_labels is not None:
            labels = [test_labels[label] for label in labels]
        lines = ["sequence\tlabel", *(f"{row[0]}\t{label}" for row, label in zip(part, labels))]
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
        paths[name] = (str(folder / f"{name}.tsv"),)
    return LabelledDataConfig(splits=FileSplits(**paths))


# --- what became of a run ---


def weights(encoder: nn.Module) -> dict[str, Tensor]:
    """A copy of every weight."""
    return {name: tensor.clone() for name, tensor in encoder.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two models have the same bits."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def events(folder: Path, event: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl about ``event``."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]
