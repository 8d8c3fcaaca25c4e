"""Configuration to model."""

from __future__ import annotations

import torch

from crocuta.config import ModelConfig
from crocuta.errors import InputError
from crocuta.model.init import initialise
from crocuta.model.lm import Model


def build_model(
    config: ModelConfig,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Model:
    """A model on ``device`` ("meta" allocates nothing) in ``dtype``, initialised from ``seed`` as ``init`` says.

    Filters stay in float32 in a bfloat16 model. The values do not depend on device or dtype before rounding.
    """
    if dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise InputError(
            "a model cannot have this dtype", given=dtype, expected="float32, float64, bfloat16 or float16"
        )
    with torch.device("meta"):
        model = Model(config)
    if torch.device(device).type == "meta":
        return model.to(dtype)
    model = model.to_empty(device="cpu")
    initialise(model, seed)
    return model.to(device=device, dtype=dtype)
