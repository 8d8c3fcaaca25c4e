"""Causal grouped-query attention on torch's scaled-dot-product attention, with keys and values of earlier tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

_MASK_ELEMENTS = 1 << 26
"""Largest boolean mask made at once; longer chunks of queries are done in turns."""


def causal_attention(
    q: Float[Tensor, "b l h c"],
    k: Float[Tensor, "b p m c"],
    v: Float[Tensor, "b p m c"],
    starts: Int[Tensor, " b"] | None,
) -> Float[Tensor, "b l h c"]:
    """softmax(q kᵀ / √c) v; query t of a row sees the keys 0 .. starts[row] + t, and no others.

    ``starts`` [b], on the CPU, counts the tokens that each row had before this call (None: no row had any, and
    p = l). Keys beyond a row's own are masked, whatever they hold, so rows may have different lengths. Query head
    j reads key head j // (h / m). The softmax is in float32 inside SDPA; the result has q's dtype.
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    grouped = q.shape[1] != k.shape[1]
    if starts is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)
    b, _, l, _ = q.shape
    first = starts.to(q.device)[:, None]
    columns = torch.arange(k.shape[2], device=q.device)
    turn = max(1, _MASK_ELEMENTS // (b * k.shape[2]))
    outputs = []
    for begin in range(0, l, turn):
        rows = torch.arange(begin, min(l, begin + turn), device=q.device)
        mask = columns <= (first + rows)[:, None, :, None]
        outputs.append(F.scaled_dot_product_attention(q[:, :, rows], k, v, attn_mask=mask, enable_gqa=grouped))
    return torch.cat(outputs, dim=2).transpose(1, 2)
