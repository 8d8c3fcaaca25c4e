"""Grouped-query attention, causal with the keys and values of earlier tokens, or over whole sequences.

One chunk of queries on a long past needs no mask: it sees all that came before it, and itself causally. Both are
partial softmaxes, and two partial softmaxes o₁, o₂ with log-sum-exps a₁, a₂ of their scores make one:

    o = o₁ + (o₂ - o₁) · sigmoid(a₂ - a₁),   a = log(exp a₁ + exp a₂)

so that neither a mask nor a matrix of scores [l, p] ever exists as a whole (Rabe and Staats 2021; Dao et al. 2022).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from crocuta.ops.blocks import compute_dtype, full_precision, own_positions

MASK_ELEMENTS = 1 << 24
"""Largest boolean mask made at once; rows of different lengths are done in turns. torch makes floats of it."""
SCORES = 1 << 24
"""Scores that exist at once where torch has no fused operator that gives the log-sum-exp."""
_KEYS = 1 << 10
"""Keys that such a turn takes."""
_CAST = 1 << 22
"""Numbers of keys that are cast at once where they are kept in another dtype than the queries."""
_FEW = 8
"""Up to this many queries a mask is cheaper than two calls."""

Partial: TypeAlias = tuple[Tensor, Tensor]
"""Softmax over some of the keys: outputs [b h l c], and the log-sum-exp of the scores [b h l]."""


def causal_attention(
    q: Float[Tensor, "b l h c"],
    k: Float[Tensor, "b p m c"],
    v: Float[Tensor, "b p m c"],
    starts: Int[Tensor, " b"] | None,
) -> Float[Tensor, "b l h c"]:
    """softmax(q kᵀ / √c) v; query t of a row sees the keys 0 .. starts[row] + t, and no others.

    ``starts`` [b], on the CPU, counts the tokens that each row had before this call (None: no row had any, and
    p = l). Keys beyond a row's own do not count, whatever they hold, so rows may have different lengths. Query head
    j reads key head j // (h / m). Keys and values may have another dtype than q; the softmax is in float32 (or
    float64), the result has q's dtype. Rows that all begin at one position are done without a mask, in memory
    O(l) beside keys and values, unless gradients are asked for. There may be fewer keys than starts + l: then the
    last queries are padding, and see all.
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    grouped, l = q.shape[1] != k.shape[1], q.shape[2]
    if starts is None:
        if _flash_operator(q) is not None and not _differentiated(q, k, v):
            return _unmasked(q, k, v, 0).transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)
    first = int(starts[0])
    if not bool((starts == first).all()):
        return _masked(q, k.to(q.dtype), v.to(q.dtype), starts).transpose(1, 2)
    k, v = k[:, :, : first + l], v[:, :, : first + l]
    if l <= _FEW or k.shape[2] < first + l or _differentiated(q, k, v):
        return _masked(q, k.to(q.dtype), v.to(q.dtype), starts).transpose(1, 2)
    return _unmasked(q, k, v, first).transpose(1, 2)


def full_attention(
    q: Float[Tensor, "b l h c"],
    k: Float[Tensor, "b l m c"],
    v: Float[Tensor, "b l m c"],
    lengths: Int[Tensor, " b"] | None = None,
) -> Float[Tensor, "b l h c"]:
    """softmax(q kᵀ / √c) v over all keys of a row, or its first ``lengths[row]``, which must be at least one.

    Head groups and dtypes as in ``causal_attention``.
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    mask = None
    if lengths is not None:
        mask = own_positions(lengths, k.shape[2], q.device)[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


def attention_step(
    q: Float[Tensor, "b 1 h c"],
    k: Float[Tensor, "b p m c"],
    v: Float[Tensor, "b p m c"],
    positions: Int[Tensor, " b"],
) -> Float[Tensor, "b 1 h c"]:
    """``causal_attention`` of one query a row, which sees the keys 0 .. positions[row] of a buffer of any length p.

    ``positions`` lie on the device and are not looked at by the host: the operations are the same for all of them.
    Time and memory O(p), however few keys count. Head groups, dtypes and the softmax as in ``causal_attention``.
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2).to(q.dtype), v.transpose(1, 2).to(q.dtype)
    mask = (torch.arange(k.shape[2], device=q.device) <= positions[:, None])[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


def _differentiated(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _masked(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Tensor:
    """Any rows, in turns of queries; a single query that sees all keys needs no mask."""
    grouped, (b, _, l, _) = q.shape[1] != k.shape[1], q.shape
    if l == 1 and bool((starts == k.shape[2] - 1).all()):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
    first = starts.to(q.device)[:, None]
    columns = torch.arange(k.shape[2], device=q.device)
    turn = max(1, MASK_ELEMENTS // (b * k.shape[2]))
    outputs = []
    for begin in range(0, l, turn):
        rows = torch.arange(begin, min(l, begin + turn), device=q.device)
        mask = columns <= (first + rows)[:, None, :, None]
        outputs.append(F.scaled_dot_product_attention(q[:, :, rows], k, v, attn_mask=mask, enable_gqa=grouped))
    return torch.cat(outputs, dim=2)


# --- aligned rows: the past unmasked, the chunk itself causally --------------------------------------------------


@full_precision
def _unmasked(q: Tensor, k: Tensor, v: Tensor, first: int) -> Tensor:
    """Rows that all begin at ``first``, which is the number of keys before the chunk."""
    flash = _flash_operator(q)
    return _online_softmax(q, k, v, first) if flash is None else _flash(flash, q, k, v, first)


def _flash_operator(q: Tensor) -> torch._ops.OpOverloadPacket | None:
    """torch's fused attention that also gives the log-sum-exp; on a CPU only, and not a promise of its public API.

    The meta device stands for a CPU, so that ``model.memory`` books what a CPU would hold.
    """
    if q.device.type not in ("cpu", "meta"):
        return None
    return getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


def _flash(operator: torch._ops.OpOverloadPacket, q: Tensor, k: Tensor, v: Tensor, first: int) -> Tensor:
    """The operator wants one key head a query head. Over the past the queries of a group stand behind one another, so
    that the long keys are never repeated; inside the chunk they are.
    """
    b, h, l, c = q.shape
    m = k.shape[1]
    own = (t[:, :, first:].to(q.dtype).repeat_interleave(h // m, 1) for t in (k, v))
    output, total = operator(q, *own, is_causal=True)
    total = total.to(compute_dtype(q.dtype))
    output = output.to(total.dtype)
    folded = q.reshape(b, m, h // m * l, c)
    for keys, values in _past(k[:, :, :first], v[:, :, :first], q.dtype):
        partial = operator(folded, keys, values)
        output, total = _merge((output, total), (partial[0].reshape(q.shape), partial[1].reshape(total.shape)))
    return output.to(q.dtype)


def _past(k: Tensor, v: Tensor, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys and values in ``dtype``: as they are, or in pieces, so that a cast copy of all never exists."""
    b, m, p, c = k.shape
    piece = max(1, p if k.dtype == dtype else _CAST // (b * m * c))
    for begin in range(0, p, piece):
        yield k[:, :, begin : begin + piece].to(dtype), v[:, :, begin : begin + piece].to(dtype)


def _merge(old: Partial, new: Partial) -> Partial:
    """The softmax over the keys of both; overwrites ``old``."""
    (output, total), (more, log_sum) = old, new
    weight = torch.sigmoid(log_sum - total)[..., None]
    return output.lerp_(more.to(output.dtype), weight.to(output.dtype)), torch.logaddexp(total, log_sum)


def _online_softmax(q: Tensor, k: Tensor, v: Tensor, first: int) -> Tensor:
    """The same of plain matrix products: turns of queries on blocks of keys, at most ``SCORES`` scores at once."""
    b, h, l, c = q.shape
    m, wide = k.shape[1], compute_dtype(q.dtype)
    y = torch.empty_like(q)
    turn = max(1, SCORES // (b * h * _KEYS))
    for begin in range(0, l, turn):
        queries = q[:, :, begin : begin + turn].to(wide).unflatten(1, (m, h // m)) / math.sqrt(c)
        last = first + begin + queries.shape[3]
        output = queries.new_zeros(queries.shape)
        total = queries.new_full(queries.shape[:-1], -torch.inf)
        for key in range(0, last, _KEYS):
            keys, values = (t[:, :, None, key : min(last, key + _KEYS)].to(wide) for t in (k, v))
            scores = queries @ keys.transpose(-1, -2)
            ahead = key + keys.shape[3] - (first + begin) - 1
            if ahead > 0:  # the block reaches beyond the first of these queries
                seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(first + begin - key)
                scores.masked_fill_(~seen, -torch.inf)
            log_sum = scores.logsumexp(-1)
            weights = scores.sub_(log_sum.nan_to_num(neginf=0.0)[..., None]).exp_()
            output, total = _merge((output, total), (weights @ values, log_sum))
        y[:, :, begin : begin + turn] = output.flatten(1, 2).to(q.dtype)
    return y
