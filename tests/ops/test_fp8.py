"""The FP8 product against a float64 one of E4M3 numbers that are looked up in a table of all of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from crocuta.ops import fp8
from crocuta.ops.dispatch import Case, choose, reasons
from crocuta.ops.fp8 import fp8_linear, quantise

ONE = torch.tensor(1.0)


def e4m3_table() -> np.ndarray:
    """Every finite number >= 0 of the format, in the order of their codes: even codes have an even mantissa."""
    codes = np.arange(0x7F)
    exponent, mantissa = codes >> 3, codes & 7
    return np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))


def e4m3_nearest(x: torch.Tensor) -> torch.Tensor:
    """The nearest number of the table, ties to the even code, beyond it the largest; float64."""
    table, size = e4m3_table(), x.double().abs().numpy()
    above = np.searchsorted(table, size).clip(1, len(table) - 1)
    low, high = table[above - 1], table[above]
    upper = (size - low > high - size) | ((size - low == high - size) & (above % 2 == 0))
    return torch.from_numpy(np.where(upper, high, low)).copysign(x.double())


def exact_product(x, weight, scales, bias=None) -> torch.Tensor:
    """[c t], float64 throughout."""
    input_scale, weight_scale = (float(scale) for scale in scales)
    xq = e4m3_nearest(x.float() * scales[0])
    wq = e4m3_nearest(weight.float() * scales[1])
    y = wq @ xq.t() / (input_scale * weight_scale)
    return y if bias is None else y + bias.double()[:, None]


def example(tokens=37, width=256, out=96, *, dtype=torch.float32, seed=0):
    """x [t d], weight [c d], bias [c] and scales [(), ()] that bring both near the format's end, as delayed scaling
    does; a few elements of x lie beyond it."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=draw)
    weight = torch.randn(out, width, generator=draw) * 0.02
    bias = torch.randn(out, generator=draw)
    scales = 448 / (0.8 * x.abs().max()), 448 / weight.abs().max()
    return x.to(dtype), weight.to(dtype), bias.to(dtype), scales


def relative_error(y: torch.Tensor, expected: torch.Tensor) -> float:
    return float((y.double() - expected).norm() / expected.norm())


# --- rounding ---


def test_the_table_ends_at_448():
    assert e4m3_table()[[0, 1, 8, -1]].tolist() == [0, 2.0**-9, 2.0**-6, 448]


def test_every_number_and_every_tie():
    numbers = torch.from_numpy(e4m3_table())
    ties = (numbers[1:] + numbers[:-1]) / 2
    nudged = torch.cat([torch.nextafter(ties.float(), torch.tensor(end)) for end in (0.0, 1e9)]).double()
    x = torch.cat([numbers, ties, nudged, -numbers, -ties, -nudged])[None]
    assert torch.equal(quantise(x.float(), ONE).double(), e4m3_nearest(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_random_numbers_of_all_sizes(dtype):
    draw = torch.Generator().manual_seed(1)
    x = (torch.randn(50, 400, generator=draw) * torch.exp2(torch.randint(-12, 10, (50, 400), generator=draw))).to(dtype)
    scale = torch.tensor(1.7)
    assert torch.equal(quantise(x, scale).double(), e4m3_nearest(x.float() * scale))


def test_saturates_and_keeps_nan():
    x = torch.tensor([[449.0, 465.0, 1e30, float("inf"), -500.0, float("-inf"), float("nan"), 3e38]])
    rounded = quantise(x, torch.tensor(2.0)).float()[0]
    assert rounded[:6].tolist() == [448, 448, 448, 448, -448, -448]
    assert torch.isnan(rounded[6])
    assert rounded[7] == 448  # 3e38 · 2 is infinite in float32
    assert fp8._saturated(x, torch.tensor(2.0)).nan_to_num(0).abs().max() == 448  # whatever the cast would do


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_code_is_widened_exactly(dtype):
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16).view(torch.float8_e4m3fn)
    wide = fp8._widened(codes, dtype)
    assert wide.dtype == dtype
    assert torch.isnan(wide).sum() == 2
    assert torch.equal(wide.nan_to_num(nan=-1e3), codes.to(dtype).nan_to_num(nan=-1e3))
    assert torch.equal(wide.flatten()[:127].double(), torch.from_numpy(e4m3_table()))
    assert torch.equal(torch.signbit(wide), torch.signbit(codes.to(dtype)))


def test_nan_reaches_the_result():
    x, weight, bias, scales = example()
    x[3, 5] = weight[7, 1] = float("nan")
    y = torch.isnan(fp8_linear(x, weight, bias, scales))
    expected = torch.zeros_like(y)
    expected[7, :] = expected[:, 3] = True
    assert torch.equal(y, expected)


def test_rows_in_turns_are_the_same_rows(monkeypatch):
    x, weight, bias, scales = example()
    rounded, y = quantise(x, scales[0]), fp8_linear(x, weight, bias, scales)
    monkeypatch.setattr(fp8, "_CACHED", 5 * x.shape[1])
    assert torch.equal(quantise(x, scales[0]).double(), rounded.double())
    torch.testing.assert_close(fp8_linear(x, weight, bias, scales), y, rtol=1e-5, atol=1e-5)


# --- the product ---


@pytest.mark.parametrize("width", [8, 96, 1024])
@pytest.mark.parametrize("with_bias", [False, True])
def test_float32_agrees_with_the_exact_product(width, with_bias):
    x, weight, bias, scales = example(width=width)
    y = fp8_linear(x, weight, bias if with_bias else None, scales)
    expected = exact_product(x, weight, scales, bias if with_bias else None)
    assert y.dtype == torch.float32
    assert relative_error(y, expected) < 1e-6
    assert (y.double() - expected).abs().max() < 1e-6 * expected.abs().max()


def test_products_without_the_rounding_do_not_agree():
    """The control: what would be wrong by 3 % without being noticed, in float32 as in bfloat16."""
    x, weight, _, scales = example()
    expected = exact_product(x, weight, scales)
    for dtype in (torch.float32, torch.bfloat16):
        plain = weight.to(dtype) @ x.to(dtype).t()
        assert relative_error(plain, expected) > 0.02
    one_only = quantise(weight, scales[1]).float() @ x.t() / scales[1]
    assert relative_error(one_only, expected) > 0.01
    unscaled = quantise(weight, ONE).float() @ quantise(x, ONE).float().t()
    assert relative_error(unscaled, expected) > 0.02


def test_bfloat16_rounds_once():
    x, weight, bias, scales = example(dtype=torch.bfloat16)
    for b in (None, bias):
        y, expected = fp8_linear(x, weight, b, scales), exact_product(x, weight, scales, b)
        assert y.dtype == torch.bfloat16
        size = expected.abs()
        half_a_step = torch.exp2(torch.floor(torch.log2(size)) - 8)
        assert ((y.double() - expected).abs() <= half_a_step + 1e-6 * size.max()).all()


def test_float64_adds_up_in_float64():
    x, weight, bias, scales = example(dtype=torch.float64)
    scales = tuple(scale.double() for scale in scales)
    y = fp8_linear(x, weight, bias, scales)
    assert y.dtype == torch.float64
    assert relative_error(y, exact_product(x, weight, tuple(s.float() for s in scales), bias)) < 1e-13


def test_a_token_does_not_depend_on_others():
    """Even a huge neighbour: scales are constants, not maxima of the batch."""
    x, weight, bias, scales = example(dtype=torch.float64)
    neighbours = x.clone()
    neighbours[1:] *= 1e6
    alone = fp8_linear(x[:1], weight, bias, scales)
    torch.testing.assert_close(fp8_linear(neighbours, weight, bias, scales)[:, :1], alone, rtol=1e-13, atol=1e-13)


def test_a_kept_weight_is_used():
    x, weight, bias, scales = example()
    kept = quantise(weight, scales[1])
    assert torch.equal(fp8_linear(x, weight, bias, scales, kept), fp8_linear(x, weight, bias, scales))
    other = quantise(-weight, scales[1])
    assert torch.equal(fp8_linear(x, weight, None, scales, other), -fp8_linear(x, weight, None, scales))


# --- gradients ---


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_gradients_are_straight_through(dtype, tolerance, monkeypatch):
    monkeypatch.setattr(fp8, "_CACHED", 40 * 256)  # weights in turns, too
    x, weight, bias, scales = example(dtype=dtype)
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    dy = torch.randn(len(weight), len(x), generator=torch.Generator().manual_seed(3)).to(dtype)
    dx, dweight, dbias = torch.autograd.grad(fp8_linear(x, weight, bias, scales), leaves, dy)
    xq = e4m3_nearest(x.detach().float() * scales[0]) / float(scales[0])
    wq = e4m3_nearest(weight.detach().float() * scales[1]) / float(scales[1])
    expected = dy.double().t() @ wq, dy.double() @ xq, dy.double().sum(1)
    for gradient, wanted in zip((dx, dweight, dbias), expected, strict=True):
        assert gradient.dtype == dtype
        assert relative_error(gradient, wanted) < tolerance
    assert relative_error(dx, dy.double().t() @ weight.detach().double()) > 0.01, "the control: of the plain weight"


def test_a_frozen_weight_gets_no_gradient():
    x, weight, _, scales = example()
    fp8_linear(x.requires_grad_(), weight, None, scales).sum().backward()
    assert x.grad is not None
    assert weight.grad is None


def test_autocast_does_not_narrow_the_product():
    x, weight, bias, scales = example()
    with torch.autocast("cpu", torch.bfloat16):
        y = fp8_linear(x, weight, bias, scales)
    assert relative_error(y, exact_product(x, weight, scales, bias)) < 1e-6


# --- kernels ---


def fp8_call(**fields) -> Case:
    return Case(op="fp8_linear", length=37, **{"sizes": (96, 64), "capability": (9, 0), **fields})


def test_the_hardware_product_is_chosen_where_it_can_run():
    assert choose(fp8_call()).name == "scaled_mm"
    assert choose(fp8_call(capability=(8, 9))).name == "scaled_mm"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"capability": None}, "not on an NVIDIA device"),
        ({"capability": (8, 0)}, "compute capability 8.0 is below 8.9"),
        ({"sizes": (96, 40)}, "(96, 40) are not multiples of 16"),
        ({"float64": True}, "not in float64"),
    ],
)
def test_why_the_hardware_product_does_not_run(fields, reason):
    call = fp8_call(**fields)
    assert choose(call).name == "dequantised"
    assert reason in reasons(call)[0]
    assert reasons(call)[0].startswith("scaled_mm: ")


def test_a_cpu_is_no_nvidia_device():
    call = fp8.fp8_case(5, (96, 64), torch.device("cpu"), torch.float64)
    assert (call.capability, call.sizes, call.length, call.float64) == (None, (96, 64), 5, True)


def as_strict_as_cuda(scaled_mm):
    """What the documentation of cuBLASLt asks of FP8 products, and a CPU does not."""

    def run(a, b, scale_a, scale_b, out_dtype, use_fast_accum):
        assert a.dtype == b.dtype == torch.float8_e4m3fn
        assert a.is_contiguous()
        assert b.t().is_contiguous()
        assert a.shape[1] % 16 == b.shape[0] % 16 == b.shape[1] % 16 == 0
        assert scale_a.dtype == scale_b.dtype == torch.float32
        assert scale_a.numel() == scale_b.numel() == 1
        assert out_dtype in (torch.float32, torch.bfloat16)
        assert use_fast_accum is False
        return scaled_mm(a, b, scale_a, scale_b, out_dtype=out_dtype, use_fast_accum=use_fast_accum)

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 16, 37])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_hardware_product_agrees(dtype, tokens, with_bias, monkeypatch):
    """torch's scaled product exists on CPUs too, so that its scales, layouts and padding can be tested on any."""
    monkeypatch.setattr(torch, "_scaled_mm", as_strict_as_cuda(torch._scaled_mm))
    x, weight, bias, scales = example(tokens, dtype=dtype)
    bias = bias if with_bias else None
    xq, wq = quantise(x, scales[0]), quantise(weight, scales[1])
    y = fp8._scaled_mm(wq, xq, bias, scales, dtype)
    expected = exact_product(x, weight, scales, bias)
    assert y.shape == expected.shape
    assert y.dtype == dtype
    assert relative_error(y, expected) < (1e-6 if dtype == torch.float32 else 3e-3)
    assert ((y - fp8_linear(x, weight, bias, scales)).abs() <= 2**-7 * expected.abs() + 1e-6).all()
