"""torch.compile takes whole models as one graph: training of every kind of mixer, decoding of what needs no Python."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TRAIN = (
    "explicit-decay",
    "implicit",
    "complex-raw",
    "real-grouped",
    "attention-gqa",
    "order-n-norms",
    "gated-conv-edifice",
)
DECODE = ("explicit", "complex-stable", "real-raw", "attention-gqa")
TRAIN_ON_TORCH = ("explicit-decay", "implicit", "complex-raw")
DECODE_ON_TORCH = ("complex-stable",)
"""As on a machine without a compiler."""


@pytest.mark.timeout(500)  # compiling takes its time on a busy machine
def test_one_graph_gives_what_the_model_gives():
    script = Path(__file__).parent / "compile_models.py"
    kinds = {"train": TRAIN, "decode": DECODE, "train_on_torch": TRAIN_ON_TORCH, "decode_on_torch": DECODE_ON_TORCH}
    work = [f"{name}/{kind}" for name in kinds for kind in kinds[name]] + ["refuse/ids"]
    done = subprocess.run([sys.executable, str(script), *work], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    *found, refused = [json.loads(line) for line in done.stdout.splitlines()]
    assert [f"{each['work']}/{each['kind']}" for each in found] == work[:-1]
    for each in found:
        assert each["logits"] < 1e-9, each
        assert each.get("gradients", 0) < 1e-9, each
    assert refused["error"] == "an id is not from 0 to 15"
