"""RMSNorm with eps inside or outside the root, and LayerNorm; statistics in float32 (or float64)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from crocuta.ops.blocks import compute_dtype


def rms_norm(
    x: Float[Tensor, "*b d"], scale: Float[Tensor, " d"], eps: float, *, eps_inside_root: bool
) -> Float[Tensor, "*b d"]:
    """scale · x / sqrt(mean(x²) + eps) (StripedHyena-7B), or scale · x / (sqrt(mean(x²)) + eps) (Evo).

    Computed in float32 (or float64), returned in x's dtype. Saves x and one number a row.
    """
    dtype = compute_dtype(x.dtype)
    return _RMSNorm.apply(x.to(dtype), scale.to(dtype), eps, eps_inside_root).to(x.dtype)


def rms_norm_stepwise(x: Float[Tensor, "*b d"], scale: Float[Tensor, " d"], eps: float) -> Float[Tensor, "*b d"]:
    """scale · (x / (‖x‖₂ · d^-1/2 + eps)) with every step rounded to x's dtype, as Evo and Evo 2 compute it.

    The sum of squares alone is in float32. For float32 and float64 this is ``rms_norm``, to the bit.
    """
    if compute_dtype(x.dtype) == x.dtype:
        return rms_norm(x, scale, eps, eps_inside_root=False)
    rms = torch.linalg.vector_norm(x, dim=-1, keepdim=True) * x.shape[-1] ** -0.5
    return scale.to(x.dtype) * (x / (rms + eps))


def layer_norm(
    x: Float[Tensor, "*b d"], scale: Float[Tensor, " d"], bias: Float[Tensor, " d"], eps: float
) -> Float[Tensor, "*b d"]:
    """scale · (x - mean) / sqrt(var + eps) + bias in float32 (or float64), returned in x's dtype."""
    dtype = compute_dtype(x.dtype)
    return F.layer_norm(x.to(dtype), scale.shape, scale.to(dtype), bias.to(dtype), eps).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, eps: float, inside: bool) -> Tensor:
        rms = torch.linalg.vector_norm(x, dim=-1, keepdim=True) * x.shape[-1] ** -0.5
        inverse = torch.rsqrt(rms * rms + eps) if inside else 1 / (rms + eps)
        ctx.save_for_backward(x, scale, rms, inverse)
        ctx.inside = inside
        return (x * inverse).mul_(scale)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, scale, rms, inverse = ctx.saved_tensors
        width = x.shape[-1]
        product = (dy * x).reshape(-1, width)
        dscale = torch.mv(product.t(), inverse.reshape(-1))
        along = torch.mv(product, scale).view(inverse.shape)
        # d(inverse)/dx = -slope · x: r³/d inside the root, r²/(d · rms) outside; a zero row has no direction, and
        # the floor keeps 1/(eps² rms) finite in float32 while it is far below any eps
        slope = inverse**3 / width if ctx.inside else inverse**2 / (width * rms.clamp(min=1e-20))
        dx = (dy * scale).mul_(inverse).addcmul_(x, along * slope, value=-1)
        return dx, dscale, None, None
