"""The scales of FP8 projections, out of what Transformer Engine pickled beside the weights; nothing is executed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from crocuta.checkpoints.torch_save.file import parse_torch_bytes
from crocuta.errors import WeightsFormatError

INPUT, WEIGHT = 0, 1
"""Places in ``scale_fwd``."""


def read_scales(where: str, blob: Any) -> tuple[Tensor, Tensor] | None:
    """The scales [] float32 of a projection's input and weight, or None where ``blob`` holds none.

    ``blob`` is what a checkpoint has as ``projections._extra_state``: bytes (an io.BytesIO), a uint8 tensor of
    bytes, the mapping itself, an empty tensor or None. Raises WeightsFormatError for scales that are not positive
    finite numbers.
    """
    if isinstance(blob, Tensor):
        blob = blob.to(torch.uint8).numpy().tobytes() if blob.dtype in (torch.uint8, torch.int8) else b""
    if not blob:
        return None
    if not isinstance(blob, bytes | Mapping):
        raise WeightsFormatError(f"{where} is not a pickle", given=type(blob).__name__, expected="bytes, or nothing")
    state = parse_torch_bytes(blob, where=where) if isinstance(blob, bytes) else blob
    if not isinstance(state, Mapping):
        return None
    scale = _numbers(where, state, "scale_fwd")
    if scale is None:
        inverse = _numbers(where, state, "scale_inv_fwd")
        if inverse is None:
            return None
        scale = 1 / inverse
    if len(scale) < 2 or not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise WeightsFormatError(
            f"{where} has impossible scales", given=scale.tolist()[:4], expected="positive numbers, input then weight"
        )
    return scale[INPUT].clone(), scale[WEIGHT].clone()


def _numbers(where: str, state: Mapping[str, Any], key: str) -> Tensor | None:
    value = state.get(key)
    if value is None:
        return None
    if isinstance(value, list | tuple) and all(isinstance(item, int | float) for item in value):
        value = torch.tensor(value)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise WeightsFormatError(f"{key} in {where} is no row of numbers", given=type(value).__name__)
    return value.float().flatten()
