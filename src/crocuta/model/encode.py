"""An encoder over rows of any lengths: which are run together, and what each of them gives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from crocuta.errors import NonFiniteError
from crocuta.model.encoder import Encoder
from crocuta.model.memory import DEFAULT, group


@torch.no_grad()
def encode_rows(encoder: Encoder, rows: Sequence[Tensor], *, tokens: int = DEFAULT.tokens) -> list[Tensor]:
    """The encoder's output for each row of ids [l] or features [l e], in order, on the CPU: [c], or [l c] unpooled.

    In the mode that the encoder is in. Rows of similar lengths are run together, at most ``tokens`` with padding.
    Raises NonFiniteError, naming the row.
    """
    device = encoder.norm.scale.device
    outputs: list[Tensor] = [torch.empty(0)] * len(rows)
    for indices in group([len(row) for row in rows], tokens):
        x = torch.nn.utils.rnn.pad_sequence([rows[index] for index in indices], batch_first=True)
        lengths = torch.tensor([len(rows[index]) for index in indices])
        for index, output in zip(indices, encoder(x.to(device), lengths).cpu()):
            own = output[: len(rows[index])] if output.ndim == 2 else output
            if not torch.isfinite(own).all():
                raise NonFiniteError(
                    f"the output for sequence {index} is not finite", fix="check the encoder's weights"
                )
            outputs[index] = own
    return outputs
