"""RMSNorm with eps inside or outside the root, and LayerNorm; statistics in float32 (or float64).

Each takes what is to be added first, and then gives the sum as well: the residual stream and its norm, in one pass over
memory where there is a compiled kernel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from crocuta.ops.blocks import compute_dtype
from crocuta.ops.kernels.library import runs_here
from crocuta.ops.kernels.norm import Norm


def add_rms_norm(
    x: Float[Tensor, "*b d"],
    y: Float[Tensor, "*b d"] | None,
    scale: Float[Tensor, " d"],
    eps: float,
    *,
    eps_inside_root: bool,
) -> tuple[Float[Tensor, "*b d"], Float[Tensor, "*b d"]]:
    """s = x + y, and scale · s / sqrt(mean(s²) + eps) (StripedHyena-7B), or scale · s / (sqrt(mean(s²)) + eps) (Evo).

    The sum in x's dtype (x itself where y is None), the norm in float32 (or float64), returned in x's dtype. Saves s
    and two numbers a row.
    """
    kind = Norm.RMS_INSIDE if eps_inside_root else Norm.RMS_OUTSIDE
    if runs_here(x):
        return _compiled(x, y, scale, None, eps, kind)
    s, dtype = x if y is None else x + y, compute_dtype(x.dtype)
    return s, _RMSNorm.apply(s.to(dtype), scale.to(dtype), eps, eps_inside_root).to(x.dtype)


def add_rms_norm_stepwise(
    x: Float[Tensor, "*b d"], y: Float[Tensor, "*b d"] | None, scale: Float[Tensor, " d"], eps: float
) -> tuple[Float[Tensor, "*b d"], Float[Tensor, "*b d"]]:
    """scale · (s / (‖s‖₂ · d^-1/2 + eps)) with every step rounded to x's dtype, as Evo and Evo 2 compute it.

    The sum of squares alone is in float32. For float32 and float64 this is ``add_rms_norm``, to the bit.
    """
    if compute_dtype(x.dtype) == x.dtype:
        return add_rms_norm(x, y, scale, eps, eps_inside_root=False)
    s = x if y is None else x + y
    rms = torch.linalg.vector_norm(s, dim=-1, keepdim=True) * s.shape[-1] ** -0.5
    return s, scale.to(s.dtype) * (s / (rms + eps))


def add_layer_norm(
    x: Float[Tensor, "*b d"],
    y: Float[Tensor, "*b d"] | None,
    scale: Float[Tensor, " d"],
    bias: Float[Tensor, " d"],
    eps: float,
) -> tuple[Float[Tensor, "*b d"], Float[Tensor, "*b d"]]:
    """s = x + y, and scale · (s - mean) / sqrt(var + eps) + bias; dtypes as in ``add_rms_norm``."""
    if runs_here(x):
        return _compiled(x, y, scale, bias, eps, Norm.LAYER)
    s, dtype = x if y is None else x + y, compute_dtype(x.dtype)
    return s, F.layer_norm(s.to(dtype), scale.shape, scale.to(dtype), bias.to(dtype), eps).to(x.dtype)


def _compiled(
    x: Tensor, y: Tensor | None, scale: Tensor, bias: Tensor | None, eps: float, kind: Norm
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(x.dtype)
    constants = scale.to(dtype), None if bias is None else bias.to(dtype), eps, int(kind)
    if dtype != x.dtype or (y is not None and y.dtype != dtype):  # the sum is rounded before its norm
        s = x if y is None else x + y
        return s, torch.ops.crocuta.add_norm(s.to(dtype), None, *constants)[1].to(s.dtype)
    if y is None:
        return _NormBeside.apply(x, *constants)
    s, n, _, _ = torch.ops.crocuta.add_norm(x, y, *constants)
    return s, n


class _NormBeside(torch.autograd.Function):
    """x itself and its norm: as both are outputs here, their gradients meet in one pass over memory.

    An op of torch.library may not return what it was given.
    """

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, bias: Tensor | None, eps: float, kind: int) -> tuple[Tensor, Tensor]:
        _, n, middle, inverse = torch.ops.crocuta.add_norm(x, None, scale, bias, eps, kind)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, scale, middle, inverse)
        ctx.constants, ctx.has_bias = (eps, kind), bias is not None
        return x, n

    @staticmethod
    def backward(ctx, ds: Tensor | None, dn: Tensor | None) -> tuple[Tensor | None, ...]:
        x, scale, middle, inverse = ctx.saved_tensors
        if dn is None:
            return ds, None, None, None, None
        dx, dscale, dbias = torch.ops.crocuta.add_norm_backward(ds, dn, x, scale, middle, inverse, *ctx.constants)
        return dx, dscale, dbias if ctx.has_bias else None, None, None


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
