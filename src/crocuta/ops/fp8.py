"""A linear map in FP8 (E4M3) with constant scales, as Transformer Engine computes it at inference, on any device.

    y = (E4M3(W · s_w) · E4M3(x · s_x)) / (s_w s_x) + bias

E4M3 has 3 bits of mantissa and reaches 448 (Micikevicius et al. 2022, "FP8 Formats for Deep Learning"). A product of
two such numbers is exact in float32, so special hardware changes only the speed: all kernels agree but for the rounding
of one float32 sum.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from crocuta.ops.blocks import compute_dtype, full_precision
from crocuta.ops.dispatch import Case, choose
from crocuta.ops.products import accumulate, product

LARGEST = 448.0
"""The largest finite number of E4M3, which has no infinity."""
_WORKSPACE = 1 << 22
"""Elements of a matrix that are held in float32 at once: 16 MiB."""
_CACHED = 1 << 18
"""The same on a CPU, where they stay in its cache."""


def fp8_linear(
    x: Float[Tensor, "t d"],
    weight: Float[Tensor, "c d"],
    bias: Float[Tensor, " c"] | None,
    scales: tuple[Float[Tensor, ""], Float[Tensor, ""]],
    quantised: Tensor | None = None,
) -> Float[Tensor, "c t"]:
    """W x + bias with W and x in E4M3 under ``scales`` (s_x, s_w); the sum in float32 (or float64), in x's dtype.

    The result has tokens contiguous. ``quantised`` may be ``quantise(weight, s_w)`` of an earlier call. Gradients are
    straight-through, those of the product of the rounded matrices: dx = Wqᵀ dy, dW = dy xq, none for the scales.
    Each token is rounded on its own, so that none influences another. Keeps one byte an element of x and W.
    """
    wq = quantise(weight, scales[1]) if quantised is None else quantised
    return _FP8Linear.apply(x, weight, bias, *scales, wq)


@torch.no_grad()
def quantise(x: Float[Tensor, "r d"], scale: Float[Tensor, ""]) -> Tensor:
    """E4M3 [r d] of x · scale in float32: ties to even, saturated at ±448; NaN stays NaN."""
    rounded = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    for rows in _turns(x):
        rounded[rows] = _saturated(x[rows], scale)
    return rounded


def fp8_case(tokens: int, sizes: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Case:
    """The call of ``fp8_linear`` with a weight of ``sizes``, for ``choose`` and ``reasons``."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    capability = torch.cuda.get_device_capability(device) if nvidia else None
    return Case(op="fp8_linear", length=tokens, sizes=sizes, capability=capability, float64=dtype == torch.float64)


class _FP8Linear(torch.autograd.Function):
    @staticmethod
    @full_precision
    def forward(ctx, x, weight, bias, input_scale, weight_scale, wq):
        xq = quantise(x, input_scale)
        ctx.save_for_backward(xq, wq, input_scale, weight_scale)
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        case = fp8_case(len(x), (wq.shape[0], wq.shape[1]), x.device, x.dtype)
        run = _scaled_mm if choose(case).name == "scaled_mm" else _dequantised
        return run(wq, xq, bias, (input_scale, weight_scale), x.dtype)

    @staticmethod
    @full_precision
    def backward(ctx, dy):
        xq, wq, input_scale, weight_scale = ctx.saved_tensors
        wide = compute_dtype(dy.dtype)
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        dx = torch.zeros(xq.shape, dtype=wide, device=dy.device)
        dweight = torch.empty(wq.shape, dtype=weight_dtype, device=dy.device) if ctx.needs_input_grad[1] else None
        x = _widened(xq, wide).div_(input_scale)
        for rows in _turns(wq):
            part = dy[rows].to(wide)
            accumulate(part.t(), _widened(wq[rows], wide), out=dx)
            if dweight is not None:
                dweight[rows] = product(part, x)
        dbias = None if bias_dtype is None else dy.sum(1, dtype=wide).to(bias_dtype)
        return dx.div_(weight_scale).to(x_dtype), dweight, dbias, None, None, None


def _dequantised(
    wq: Tensor, xq: Tensor, bias: Tensor | None, scales: tuple[Tensor, Tensor], dtype: torch.dtype
) -> Tensor:
    """Exact products of widened E4M3 numbers; the weight is widened a few rows at a time."""
    wide = compute_dtype(dtype)
    scale = scales[0].to(wide) * scales[1].to(wide)
    x = _widened(xq, wide).t()
    y = torch.empty(wq.shape[0], xq.shape[0], dtype=dtype, device=xq.device)
    for rows in _turns(wq):
        part = product(_widened(wq[rows], wide), x).div_(scale)
        y[rows] = part if bias is None else part.add_(bias[rows, None])
    return y


def _scaled_mm(
    wq: Tensor, xq: Tensor, bias: Tensor | None, scales: tuple[Tensor, Tensor], dtype: torch.dtype
) -> Tensor:
    """The FP8 product of the hardware, for tokens in multiples of 16: zeros are added, and their results cut off."""
    tokens = len(xq)
    if tokens % 16:
        xq = F.pad(xq.view(torch.uint8), (0, 0, 0, -tokens % 16)).view(xq.dtype)
    once = bias is None and dtype == torch.bfloat16
    y = torch._scaled_mm(
        wq,
        xq.t(),
        scale_a=scales[1].float().reciprocal(),
        scale_b=scales[0].float().reciprocal(),
        out_dtype=dtype if once else torch.float32,
        use_fast_accum=False,
    )[:, :tokens]
    return (y if bias is None else y + bias[:, None]).to(dtype)


def _saturated(x: Tensor, scale: Tensor) -> Tensor:
    """x · scale in float32 within ±448: beyond, a cast saturates or gives NaN, as torch's version and device will."""
    return (x.float() * scale.float()).clamp_(-LARGEST, LARGEST)


def _widened(q: Tensor, dtype: torch.dtype) -> Tensor:
    """E4M3 numbers [r d] in float32 or float64.

    On a CPU torch casts them one by one, which would be most of a decoding step. Their bits, spread to the places of
    float16, are 2^-8 of the number, which takes a few operations on whole vectors. (m + 1) & 0x80 is set for NaN alone.
    """
    if q.device.type != "cpu":
        return q.to(dtype)
    wide = torch.empty(q.shape, dtype=dtype)
    for rows in _turns(q):
        bits = q[rows].view(torch.int8).to(torch.int16)
        m = bits & 0x7F
        m.add_((m + 1).bitwise_and_(0x80)).bitwise_left_shift_(7).bitwise_or_(bits.bitwise_and_(-0x8000))
        wide[rows].copy_(m.view(torch.float16)).mul_(2.0**8)
    return wide


def _turns(matrix: Tensor) -> Iterator[slice]:
    """Slices of rows that fit the workspace in float32."""
    workspace = _CACHED if matrix.device.type == "cpu" else _WORKSPACE
    count = max(1, workspace // max(1, matrix.shape[1]))
    for start in range(0, len(matrix), count):
        yield slice(start, start + count)
