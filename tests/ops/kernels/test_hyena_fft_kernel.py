"""The fused Hyena operator with a long filter is its parts one after the other, forward and backward."""

import functools

import pytest
import torch
from compiled import each_isa, needs_library, on, poisoned, relative_error, threads
from torch import Tensor

from crocuta.errors import InputError
from crocuta.ops import reference
from crocuta.ops.kernels.fft_conv import fft_conv, filter_spectrum
from crocuta.ops.kernels.fir import fir
from crocuta.ops.kernels.hyena_fft import hyena_fft

pytestmark = needs_library

SIZES = [
    (2, 70, 37, 37, 12, 3),
    (1, 64, 16, 16, 40, 4),
    (3, 1, 5, 1, 4, 3),
    (2, 130, 160, 160, 130, 3),
    (1, 100, 40, 5, 9, 7),
    (2, 20, 24, 8, 30, 12),
]
"""b, l, d, g, m taps, k short taps: lanes not full, more vectors than a task has, groups, all kinds of taps."""
NAMES = ["y", "dz", "dshort_taps", "dshort_bias", "dtaps", "dskip"]


def example(b: int, l: int, d: int, g: int, m: int, k: int, dtype=torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(b + 10 * l + 1000 * d + m)
    shapes = (b, l, 3 * d), (3 * d, k), (3 * d,), (g, m), (d,)
    return [torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def specification(z, short_taps, short_bias, taps, skip) -> Tensor:
    filtered = reference.causal_convolution(z, short_taps)
    x2, x1, v = (filtered if short_bias is None else filtered + short_bias).chunk(3, dim=-1)
    w = x1 * v
    long = reference.causal_convolution(w, taps)
    return x2 * (long if skip is None else long + skip * w)


def by_parts(z, short_taps, short_bias, taps, skip) -> Tensor:
    """The compiled parts, each of which has tests of its own."""
    x2, x1, v = fir(z, short_taps, short_bias).chunk(3, dim=-1)
    return fft_conv(v, taps, skip, x1, x2)


def with_gradients(function, inputs: list[Tensor | None]) -> list[Tensor]:
    y = function(*inputs)
    weights = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).sin().to(y.dtype).view(y.shape)
    return [y, *torch.autograd.grad(y, [t for t in inputs if t is not None], weights)]


@functools.cache
def truth(size: tuple[int, ...]) -> list[Tensor]:
    return with_gradients(specification, example(*size))


@each_isa
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_float64_equals_the_specification_with_all_gradients(isa, size):
    with on(isa), poisoned():
        got = with_gradients(hyena_fft, example(*size))
    for name, value, right in zip(NAMES, got, truth(size), strict=True):
        assert relative_error(value, right) < 1e-12, name


def test_without_what_may_be_missing():
    z, short_taps, _, taps, _ = example(2, 70, 6, 6, 20, 3)
    inputs = [z, short_taps, None, taps, None]
    for value, right in zip(with_gradients(hyena_fft, inputs), with_gradients(specification, inputs), strict=True):
        assert relative_error(value, right) < 1e-12


@each_isa
def test_float32_is_within_1e_5_of_float64(isa):
    inputs = example(1, 3000, 35, 35, 3000, 3, torch.float32)
    with on(isa):
        got = with_gradients(hyena_fft, inputs)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    for name, value, right in zip(NAMES, got, with_gradients(by_parts, wide), strict=True):
        assert relative_error(value, right) < 1e-5, name


@each_isa
@pytest.mark.parametrize("size", [(1, 33_000, 16, 16, 70, 3), (1, 16_400, 33, 33, 9, 3)], ids=str)
def test_outputs_that_no_cache_holds(isa, size):
    """The first are written past the caches, where rows begin at whole vectors; the others are not."""
    inputs = example(*size)
    with on(isa), poisoned():
        got = with_gradients(hyena_fft, inputs)
    for name, value, right in zip(NAMES, got, with_gradients(by_parts, inputs), strict=True):
        assert relative_error(value, right) < 1e-11, name


def test_gradcheck():
    assert torch.autograd.gradcheck(hyena_fft, example(2, 9, 4, 2, 5, 3), fast_mode=True)


def test_opcheck():
    torch.library.opcheck(torch.ops.crocuta.hyena_fft.default, (*example(2, 9, 4, 4, 5, 3), None))


@each_isa
def test_slices_of_a_bigger_tensor_and_other_strides(isa):
    inputs = [t.detach() for t in example(2, 70, 20, 20, 30, 3)]
    z, *rest = inputs
    dy = torch.randn(2, 70, 20, dtype=z.dtype)
    wide = torch.full((3, 70, 90), torch.nan, dtype=z.dtype)
    wide[:2, :, 7:67] = z
    wide_dy = torch.full((2, 70, 30), torch.nan, dtype=z.dtype)
    wide_dy[:, :, 3:23] = dy
    backward = torch.ops.crocuta.hyena_fft_backward
    with on(isa):
        y, gradients = hyena_fft(*inputs), backward(dy, *inputs)
        for strided in (wide[:2, :, 7:67], z.transpose(0, 2).contiguous().transpose(0, 2)):
            assert torch.equal(hyena_fft(strided, *rest), y)
            for value, right in zip(backward(wide_dy[:, :, 3:23], strided, *rest), gradients, strict=True):
                assert torch.equal(value, right)


@pytest.mark.parametrize("size", [(2, 500, 300, 300, 500, 3), (1, 2000, 16, 16, 2000, 3)], ids=str)
def test_bits_do_not_depend_on_run_or_threads(size):
    inputs, results = example(*size, torch.float32), []
    for count in (1, 2, 2, 3):
        with threads(count):
            results.append(with_gradients(hyena_fft, inputs))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("groups", [24, 3])
def test_a_kept_spectrum_serves_shorter_sequences(groups):
    z, short_taps, short_bias, taps, skip = (t.detach() for t in example(1, 300, 24, groups, 300, 3))
    spectrum = filter_spectrum(taps, 300)
    for length in (300, 70):
        ours = hyena_fft(z[:, :length], short_taps, short_bias, taps, skip, spectrum)
        expected = specification(z[:, :length], short_taps, short_bias, taps, skip)
        assert relative_error(ours, expected) < 1e-12


def test_nothing_to_do():
    _, *rest = inputs = example(2, 5, 6, 6, 4, 3)
    nothing = inputs[0].detach()[:, :0].requires_grad_()
    y, dz, *others = with_gradients(hyena_fft, [nothing, *rest])
    assert y.shape == (2, 0, 6)
    assert dz.shape == nothing.shape
    assert not any(other.any() for other in others)


def test_half_precision_goes_through_float32():
    z, *rest = (t.detach() for t in example(1, 90, 16, 16, 90, 3, torch.float32))
    half = z.bfloat16()
    assert torch.equal(hyena_fft(half, *rest), hyena_fft(half.float(), *rest).bfloat16())


def test_shapes_that_do_not_fit_are_refused():
    z, short_taps, short_bias, taps, skip = (t.detach() for t in example(1, 8, 6, 6, 4, 3))
    op = torch.ops.crocuta.hyena_fft
    for wrong in (
        (z[..., :17], short_taps, short_bias, taps, skip),
        (z, short_taps[:12], short_bias, taps, skip),
        (z, short_taps, short_bias[:12], taps, skip),
        (z, short_taps, short_bias, taps[:4], skip),
        (z, short_taps, short_bias, taps, skip[:4]),
    ):
        with pytest.raises(AssertionError):
            op(*wrong, None)
    with pytest.raises(AssertionError):
        torch.ops.crocuta.hyena_fft_backward(z[:, :7, :6], z, short_taps, short_bias, taps, skip)
    with pytest.raises(InputError):
        hyena_fft(z, short_taps, short_bias, taps, skip, filter_spectrum(taps, 7))
