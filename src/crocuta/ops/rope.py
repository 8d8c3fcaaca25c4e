"""Rotary position embedding (Su et al. 2021), halves convention: plain, interpolated, or with given frequencies."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def inverse_frequencies(head_size: int, base: float) -> Float[Tensor, " c"]:
    """base^(-2i / head_size), i = 0 .. head_size/2 - 1, as 1 / base^(...) in float32.

    In the steps of the published code, to its last bit: far into a text a rounding becomes a visible angle.
    """
    return 1 / base ** (torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)


def rotation(
    positions: Float[Tensor, "b l"], inverse: Float[Tensor, " c"], dtype: torch.dtype
) -> tuple[Float[Tensor, "b l 1 c"], Float[Tensor, "b l 1 c"]]:
    """cos and sin of position · inv_freq in float32 (float64 where dtype is); positions may be fractions."""
    wide = torch.promote_types(dtype, torch.float32)
    angles = positions.to(wide)[..., None] * inverse.to(wide)
    return angles.cos()[:, :, None], angles.sin()[:, :, None]


def rotate(
    x: Float[Tensor, "b l h c"], cosine: Float[Tensor, "b l 1 c2"], sine: Float[Tensor, "b l 1 c2"]
) -> Float[Tensor, "b l h c"]:
    """Rotate each pair (x[i], x[i + c/2]); in the dtype of the tables, returned in x's."""
    first, second = x.to(cosine.dtype).chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1).to(x.dtype)
