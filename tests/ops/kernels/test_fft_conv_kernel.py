"""The compiled FFT convolution is the causal convolution of the specification, forward and backward, gated or not."""

import functools

import pytest
import torch
from compiled import each_isa, needs_library, on, poisoned, relative_error, threads
from torch import Tensor

from crocuta.errors import InputError
from crocuta.ops import reference
from crocuta.ops.fft_conv import fft_convolution
from crocuta.ops.kernels import fft_conv as kernel
from crocuta.ops.kernels.fft_conv import block_size, fft_conv, filter_spectrum
from crocuta.ops.kernels.library import switched_off

pytestmark = needs_library

SIZES = [(2, 70, 37, 37, 12), (1, 64, 16, 16, 40), (3, 1, 5, 1, 4), (1, 130, 48, 3, 9), (2, 20, 24, 8, 30)]
"""b, l, d, g, k: lanes that are not full, groups of all kinds, taps shorter and longer than the inputs."""
EXTRAS = pytest.mark.parametrize("extras", ["plain", "skip", "gate_in", "gate_out", "all"])
NAMES = ["u", "taps", "skip", "gate_in", "gate_out"]


def by_torch(*inputs: Tensor) -> Tensor:
    """The torch op, which chooses the kernel where it can."""
    with switched_off():
        return fft_convolution(*inputs)


def example(b: int, l: int, d: int, g: int, k: int, extras: str = "all", dtype=torch.float64) -> list[Tensor | None]:
    """u, taps, D and the gates, or None for those that ``extras`` does not have."""
    generator = torch.Generator().manual_seed(b + 10 * l + 1000 * d + k)
    shapes = {"u": (b, l, d), "taps": (g, k), "skip": (d,), "gate_in": (b, l, d), "gate_out": (b, l, d)}
    tensors = [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes.values()]
    wanted = {"plain": [], "all": NAMES}.get(extras, [extras])
    return [t.requires_grad_() if name in ["u", "taps", *wanted] else None for t, name in zip(tensors, NAMES)]


def specification(u, taps, skip=None, gate_in=None, gate_out=None, convolution=reference.causal_convolution) -> Tensor:
    w = u if gate_in is None else gate_in * u
    z = convolution(w, taps)
    z = z if skip is None else z + skip * w
    return z if gate_out is None else gate_out * z


def with_gradients(function, inputs: list[Tensor | None]) -> list[Tensor]:
    """The output, and the gradients of all inputs under weights that differ from place to place."""
    y = function(*inputs)
    weights = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).sin().to(y.dtype).view(y.shape)
    return [y, *torch.autograd.grad(y, [t for t in inputs if t is not None], weights)]


@functools.cache
def truth(size: tuple[int, ...], extras: str) -> list[Tensor]:
    return with_gradients(specification, example(*size, extras))


def copies(inputs: list[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    return [None if t is None else t.detach().to(dtype).requires_grad_() for t in inputs]


@each_isa
@EXTRAS
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_float64_equals_the_specification_with_all_gradients(isa, extras, size):
    inputs = example(*size, extras)
    with on(isa), poisoned():
        got = with_gradients(fft_conv, inputs)
    for value, expected in zip(got, truth(size, extras), strict=True):
        assert relative_error(value, expected) < 1e-12


@each_isa
@pytest.mark.parametrize("length", [1000, 1024, 5000, 20000])
def test_long_float32_is_within_1e_6_of_float64(isa, length):
    """All the passes that long transforms have; the truth is the torch op in float64, itself held to the reference."""
    inputs = example(1, length, 9, 9, length, dtype=torch.float32)
    exact = copies(inputs, torch.float64)
    with on(isa), poisoned():
        got = with_gradients(fft_conv, inputs)
        double = with_gradients(fft_conv, exact)
    wanted = with_gradients(lambda *a: specification(*a, convolution=by_torch), exact)
    for name, value, precise, expected in zip(["y", *NAMES], got, double, wanted, strict=True):
        assert relative_error(value, expected) < 1e-6, name
        assert relative_error(precise, expected) < 1e-12, name


@each_isa
@pytest.mark.parametrize("size", [(2, 700, 20, 20, 700), (1, 500, 9, 3, 100), (1, 640, 5, 5, 200)], ids=str)
def test_many_blocks(isa, size, monkeypatch):
    """More than products are unrolled for; taps that fill some of the blocks."""
    monkeypatch.setattr(kernel, "block_size", lambda length, taps: 64)
    for extras in ("plain", "all"):
        inputs = example(*size, extras)
        wanted = with_gradients(lambda *a: specification(*a, convolution=by_torch), inputs)
        with on(isa), poisoned():
            got = with_gradients(fft_conv, inputs)
        for value, expected in zip(got, wanted, strict=True):
            assert relative_error(value, expected) < 1e-12


@each_isa
@pytest.mark.parametrize("levels", range(6, 17))
def test_transforms_of_every_size(isa, levels, monkeypatch):
    monkeypatch.setattr(kernel, "block_size", lambda length, taps: 1 << levels)
    length = (1 << levels) * 5 // 4  # two blocks
    inputs = example(1, length, 2, 2, length, "plain", torch.float32)
    with on(isa), torch.no_grad():
        assert relative_error(fft_conv(*inputs), by_torch(*copies(inputs[:2], torch.float64))) < 1e-6


@each_isa
def test_what_no_cache_holds_goes_past_them(isa):
    """Spectra of more than 20 MB are written by other instructions; twice, as the memory is kept between calls."""
    length = 400_000
    inputs = example(1, length, 2, 2, length, "skip", torch.float32)
    wanted = with_gradients(lambda *a: specification(*a, convolution=by_torch), copies(inputs, torch.float64))
    for _ in range(2):
        with on(isa), threads(2), poisoned():
            got = with_gradients(fft_conv, inputs)
        for name, value, expected in zip(["y", *NAMES], got, wanted, strict=False):
            assert relative_error(value, expected) < 1e-6, name


def test_gradcheck():
    inputs = example(2, 5, 3, 3, 4)
    torch.autograd.gradcheck(fft_conv, inputs)
    grouped = example(1, 6, 4, 2, 9)
    torch.autograd.gradcheck(fft_conv, grouped)


def test_opcheck():
    for extras in ("plain", "all"):
        inputs = [*example(2, 9, 5, 5, 7, extras), None]
        torch.library.opcheck(torch.ops.crocuta.fft_conv.default, inputs)
        dy = torch.randn(2, 9, 5, dtype=torch.float64)
        detached = [None if t is None else t.detach() for t in inputs[:5]]
        torch.library.opcheck(torch.ops.crocuta.fft_conv_backward.default, (dy, *detached))


def test_compiles_into_one_graph():
    inputs = example(1, 40, 6, 6, 40, dtype=torch.float32)

    def convolution(u, *others) -> Tensor:  # without the checks of shapes, which tests add to every function of ops
        return torch.ops.crocuta.fft_conv(2 * u, *others, None).tanh()

    compiled = torch.compile(convolution, fullgraph=True, backend="aot_eager")
    for value, expected in zip(with_gradients(compiled, inputs), with_gradients(convolution, inputs), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)


@each_isa
def test_slices_of_a_bigger_tensor_and_other_strides(isa):
    b, l, d = 2, 90, 21
    z = torch.randn(b, l + 3, 3 * d, dtype=torch.float64)
    thirds = [third[:, 2 : l + 2].detach().requires_grad_() for third in z.split(d, dim=2)]
    assert not thirds[0].is_contiguous()
    taps, skip = example(b, l, d, 7, 50)[1:3]
    turned = torch.randn(l, d, b, dtype=torch.float64).permute(2, 0, 1).requires_grad_()  # channels are not neighbours
    for u in (thirds[0], turned):
        inputs = [u, taps, skip, thirds[1], thirds[2]]
        with on(isa), poisoned():
            got = with_gradients(fft_conv, inputs)
        wanted = with_gradients(lambda *a: specification(*a, convolution=by_torch), inputs)
        for value, expected in zip(got, wanted, strict=True):
            assert relative_error(value, expected) < 1e-12


@each_isa
@pytest.mark.parametrize("size", [(2, 600, 40, 40, 600), (1, 600, 5, 5, 70), (2, 300, 48, 6, 300)], ids=str)
def test_threads_and_runs_give_the_same_bits(isa, size):
    """5 channels are fewer vectors than threads: there blocks are shared out."""
    inputs = example(*size, dtype=torch.float32)
    with on(isa):
        first = with_gradients(fft_conv, inputs)
        for count in (1, 2, 5):
            with threads(count), poisoned():
                for value, expected in zip(with_gradients(fft_conv, inputs), first, strict=True):
                    assert torch.equal(value, expected)


@each_isa
@pytest.mark.parametrize("size", [(2, 300, 40, 40, 300), (1, 300, 40, 10, 500), (2, 200, 6, 2, 30)], ids=str)
def test_a_kept_spectrum_serves_all_shorter_lengths(isa, size):
    u, taps, skip, *_ = (t.detach() for t in example(*size))
    with on(isa), poisoned():
        spectrum = filter_spectrum(taps, size[1])
        for length in (size[1], size[1] - 1, 65, 64, 1):
            part = u[:, :length]
            got = fft_conv(part, taps, skip, spectrum=spectrum)
            expected = specification(part, taps, skip, convolution=by_torch)
            assert relative_error(got, expected) < 1e-12


def test_nothing_to_do():
    for b, l, d in [(0, 5, 3), (2, 0, 3)]:
        inputs = [torch.zeros(b, l, d, requires_grad=True), torch.ones(1, 4, requires_grad=True)]
        with poisoned():
            y = fft_conv(*inputs)
            gradients = torch.autograd.grad(y.sum(), inputs)
        assert y.shape == (b, l, d)
        assert [g.shape for g in gradients] == [i.shape for i in inputs]
        assert not gradients[1].any()


def test_half_precision_goes_through_float32_and_autocast_changes_nothing():
    u, taps, skip, gate_in, gate_out = (t.detach() for t in example(1, 80, 5, 5, 80, dtype=torch.float32))
    plain = fft_conv(u, taps, skip, gate_in, gate_out)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fft_conv(u, taps, skip, gate_in, gate_out), plain)
    half = u.bfloat16()
    assert torch.equal(fft_conv(half, taps, skip), fft_conv(half.float(), taps, skip).bfloat16())


def test_blocks_follow_the_length_and_the_taps():
    for length in (1000, 10_000, 100_000):
        block = block_size(length, length)
        assert -(-length // block) * block <= 1.2 * length  # little padding
    assert block_size(100_000, 500) < block_size(100_000, 100_000)


def test_shapes_that_do_not_fit_are_refused():
    u, taps, check = (
        torch.zeros(1, 100, 6),
        torch.zeros(6, 100),
        kernel._check,
    )  # what annotations say tests check first
    with pytest.raises(InputError, match="groups of a filter"):
        fft_conv(u, taps[:4])
    with pytest.raises(InputError, match="has no taps"):
        fft_conv(u, taps[:, :0])
    with pytest.raises(InputError, match="skip does not fit"):
        check(u, taps, torch.zeros(5), None, None)
    with pytest.raises(InputError, match="gate_out does not fit"):
        check(u, taps, None, None, u[:, 1:])
    with pytest.raises(InputError, match="shorter inputs"):
        fft_conv(u, taps, spectrum=filter_spectrum(taps, 99))
    with pytest.raises(InputError, match="not of these taps"):
        fft_conv(u, taps, spectrum=filter_spectrum(taps.double(), 100))


@each_isa
def test_outputs_past_the_caches_are_those_of_rows_that_cannot_go_there(isa):
    """33,000 rows of 16 channels are; with a channel more, rows do not begin at whole vectors."""
    inputs = example(1, 33_000, 17, 17, 40)
    fewer = [t.detach()[..., :16].clone() if t.ndim != 2 else t.detach()[:16].clone() for t in inputs]
    with on(isa), poisoned():
        got = with_gradients(fft_conv, [t.requires_grad_() for t in fewer])
        y = fft_conv(*inputs)
        weights = torch.linspace(-1, 2, 33_000 * 16, dtype=torch.float64).sin().view(1, 33_000, 16)
        wanted = [y[..., :16], *torch.autograd.grad(y[..., :16], inputs, weights)]
    for value, right in zip(got, wanted, strict=True):
        assert torch.equal(value, right[:16] if value.ndim == 2 else right[..., :16])
