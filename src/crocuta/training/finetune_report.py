"""What to tell the person who waited for a fine-tune: validation beside test, and how they came about."""

from __future__ import annotations

import math
from typing import Any

from crocuta.training.finetune import FineTuneOutcome

_NAMES = {
    "count": "examples",
    "loss": "cross-entropy (nats)",
    "accuracy": "accuracy",
    "f1": "F1",
    "mcc": "MCC",
    "auroc": "AUROC",
    "mse": "mean squared error",
    "pearson": "Pearson",
    "spearman": "Spearman",
    "r2": "R2",
}


def report(outcome: FineTuneOutcome) -> str:
    """The figures of validation and test as a table, and the seed, in lines of plain text."""
    task = outcome.config.task
    columns = {"validation": outcome.validation}
    if outcome.test is not None:
        columns["test"] = outcome.test
    lines = [f"{'':<22}" + "".join(f"{name:>14}" for name in columns)]
    for name in (name for name in _NAMES if hasattr(outcome.validation, name)):
        label = "tokens" if name == "count" and task.type == "token-classification" else _NAMES[name]
        lines.append(f"{label:<22}" + "".join(f"{_number(getattr(m, name)):>14}" for m in columns.values()))
    notes = {f"{split}: {note}" for split, m in columns.items() for note in m.notes}
    lines += ["", *sorted(notes)] if notes else [""]
    stopped = f", stopped after {outcome.steps}" if outcome.stopped_early else f" of {outcome.steps}"
    lines.append(
        f"Seed {outcome.config.seed}; weights of step {outcome.step}{stopped}, chosen by validation {task.metric}."
    )
    if outcome.labels is not None:
        lines.append("Labels: " + ", ".join(outcome.labels.names))
    lines.append(
        "There is no test split, so nothing says how well this does on new data."
        if outcome.test is None
        else "The test split decided nothing; it was measured once, at the end."
    )
    return "\n".join(lines)


def _number(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if math.isfinite(value) and abs(value) >= 1000 else f"{value:.4f}"
