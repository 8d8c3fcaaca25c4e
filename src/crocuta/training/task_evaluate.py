"""What an encoder makes of labelled rows: its outputs, in order, and their figures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from crocuta.data.label_map import LabelMap
from crocuta.model.encode import encode_rows
from crocuta.model.encoder import Encoder
from crocuta.training.task_data import IGNORED, Row, TargetScale
from crocuta.training.task_metrics import TaskMetrics, classification_metrics, regression_metrics


def predict(encoder: Encoder, rows: Sequence[Row]) -> list[Tensor]:
    """The outputs of every row in order, in float64 on the CPU: [c], or [l c] without pooling.

    Rows of similar lengths are run together, in evaluation mode. Raises NonFiniteError.
    """
    encoder.eval()
    return [output.double() for output in encode_rows(encoder, [row.ids for row in rows])]


def measure(
    encoder: Encoder,
    rows: Sequence[Row],
    labels: LabelMap | None,
    *,
    positive: int = 1,
    scale: TargetScale | None = None,
) -> TaskMetrics:
    """The figures of ``rows``; with ``scale`` the encoder gives standardised targets, and they are brought back."""
    outputs = predict(encoder, rows)
    if labels is None:
        numbers = torch.stack(outputs)
        numbers = numbers if scale is None else numbers * scale.deviation + scale.mean
        return regression_metrics(numbers.numpy(), torch.stack([row.target for row in rows]).numpy())
    logits = torch.cat([output.reshape(-1, output.shape[-1]) for output in outputs])
    classes = torch.cat([row.target.reshape(-1) for row in rows])
    counted = classes != IGNORED
    return classification_metrics(
        logits[counted].numpy(), classes[counted].numpy(), positive=positive, names=labels.names
    )
