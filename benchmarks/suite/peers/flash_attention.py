"""What stands in for flash-attention where there is no CUDA: rotary embedding and causal attention in plain torch.

Written from their documented behaviour, so that the published packages can be imported, and run where a model has
attention layers. Only what those packages use is here; the fused kernel underneath is torch's own.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, **_: object) -> Tensor:
    """x [b l h e], halves a and b of each head turned by an angle a position: (a cos - b sin, a sin + b cos)."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos[: x.shape[1], None].to(x.dtype), sin[: x.shape[1], None].to(x.dtype)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class RotaryEmbedding(nn.Module):
    """Angles position · base^(-2i/e)."""

    def __init__(self, dim: int, base: float = 10_000.0, **_: object) -> None:
        super().__init__()
        self.register_buffer("inv_freq", base ** (-torch.arange(0, dim, 2) / dim), persistent=False)

    def forward(self, x: Tensor, offset: int) -> Tensor:
        positions = torch.arange(offset, offset + x.shape[1], device=x.device)
        angles = positions[:, None] * self.inv_freq
        return apply_rotary(x, angles.cos(), angles.sin())


class MHA(nn.Module):
    """Causal attention with RoPE and grouped keys and values; rows of ``Wqkv``: all queries, all keys, all values."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_heads_kv: int,
        rotary_emb_dim: int,
        qkv_proj_bias: bool,
        out_proj_bias: bool,
        rotary_emb_base: float,
        layer_idx: int,
        **_: object,
    ) -> None:
        super().__init__()
        self.heads, self.layer_idx = (num_heads, num_heads_kv, num_heads_kv), layer_idx
        size = embed_dim // num_heads
        self.Wqkv = nn.Linear(embed_dim, sum(self.heads) * size, bias=qkv_proj_bias)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=out_proj_bias)
        self.rotary_emb = RotaryEmbedding(rotary_emb_dim, rotary_emb_base)

    def forward(self, x: Tensor, inference_params: Any = None) -> Tensor:
        q, k, v = self.Wqkv(x).unflatten(-1, (sum(self.heads), -1)).split(self.heads, dim=2)
        past = None if inference_params is None else inference_params.key_value_memory_dict.get(self.layer_idx)
        offset = 0 if past is None else past[0].shape[1]
        q, k = self.rotary_emb(q, offset), self.rotary_emb(k, offset)
        if past is not None:
            k, v = torch.cat([past[0], k], 1), torch.cat([past[1], v], 1)
        if inference_params is not None:
            inference_params.key_value_memory_dict[self.layer_idx] = (k, v)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        grouped = self.heads[0] != self.heads[1]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=past is None, enable_gqa=grouped)
        return self.out_proj(y.transpose(1, 2).flatten(2))


@contextmanager
def standing_in() -> Iterator[None]:
    """While a published package is imported: the modules that it would find where flash-attention is installed.

    They go afterwards, because other packages look whether flash-attention is there.
    """
    offers: dict[str, dict[str, object]] = {
        "flash_attn": {},
        "flash_attn.layers": {},
        "flash_attn.layers.rotary": {"RotaryEmbedding": RotaryEmbedding},
        "flash_attn.modules": {},
        "flash_attn.modules.mha": {"MHA": MHA},
        "flash_attn_2_cuda": {},
        "vortex.ops.embedding.rotary": {"apply_rotary": apply_rotary},
    }
    for name, members in offers.items():
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__dict__.update(members)
    try:
        yield
    finally:
        for name in offers:
            del sys.modules[name]
