"""A training run of a second, with everything in it that could spoil a resumed one."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

from crocuta.config import ComplexModalFilterConfig
from crocuta.training.config import DataConfig, ModelSpec, OptimizerConfig, StripedSpec, TrainConfig

PIECES = json.dumps(
    {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "WordLevel",
            "vocab": {"[UNK]": 0, "whale": 1, "ship": 2, "é": 3},
            "unk_token": "[UNK]",
        },
    }
)
"""A tokenizer.json of four words."""


def write_text(path: Path, size: int = 6000) -> Path:
    """Words drawn from a small vocabulary: text that a tiny model can learn something of."""
    draw = random.Random(1)
    words = ["".join(draw.choices("etaoinshr", k=draw.randint(2, 6))) for _ in range(30)]
    path.write_text(" ".join(draw.choices(words, k=size // 5))[:size])
    return path


def tiny_run(text: Path, **changes: Any) -> TrainConfig:
    """Hyena and attention with dropout, accumulation, evaluations and a checkpoint every few steps."""
    filter_ = ComplexModalFilterConfig(modes=2, timescales=(1.0, 30.0))
    spec = StripedSpec(hidden_size=16, num_layers=2, num_heads=2, filter=filter_, attention_layers=(1,), dropout=0.1)
    config = TrainConfig(
        model=ModelSpec(striped=spec),
        data=DataConfig(files=(str(text),), held_out=0.1),
        tokenizer={"type": "bytes", "vocab_size": 256},
        length=32,
        batch_size=2,
        accumulation=2,
        steps=30,
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=5),
        evaluate_every=10,
        evaluate_tokens=200,
        checkpoint_every=4,
        log_every=3,
        threads=1,
        seed=3,
    )
    return dataclasses.replace(config, **changes)


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without the clock's."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
