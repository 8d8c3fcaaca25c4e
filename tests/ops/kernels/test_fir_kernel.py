"""The compiled FIR is ``reference.causal_convolution``, and with the gate its thirds multiplied, forward and backward.

The reference takes seconds for some hundred products; longer ones are compared with the torch ops, which
tests/ops/test_fir.py compares with it.
"""

import pytest
import torch
from compiled import each_isa, needs_library, on, poisoned, relative_error, threads
from torch import Tensor

from crocuta.ops import fir as torch_fir
from crocuta.ops import reference
from crocuta.ops.kernels.fir import fir, fir_gate

pytestmark = needs_library

# b, l, d, g, k: every number of taps that is unrolled, medium ones, and lengths about blocks of 16, 64 and 120 steps
SIZES = [
    *((2, 19, 37, 37, k) for k in range(1, 9)),
    *((1, 2, 6, 3, 5), (3, 65, 16, 1, 3), (2, 130, 40, 10, 4), (1, 1, 1, 1, 2), (1, 16, 70, 70, 8)),
    *((1, 7, 5, 5, 9), (2, 121, 37, 37, 12), (1, 260, 18, 2, 33), (2, 50, 20, 20, 128), (1, 700, 3, 1, 512)),
]
GATE_SIZES = [
    *((2, 19, 37, k) for k in range(1, 9)),
    *((1, 2, 5, 4), (3, 65, 16, 3), (2, 130, 40, 3), (1, 1, 1, 2), (2, 70, 35, 12), (1, 5, 17, 30)),
]


def normal(*shapes: tuple[int, ...], dtype=torch.float64) -> list[Tensor]:
    """One tensor a shape, to be differentiated."""
    generator = torch.Generator().manual_seed(sum(map(sum, shapes)))
    values = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [value.to(dtype).requires_grad_() for value in values]


def example(b: int, l: int, d: int, g: int, k: int, dtype=torch.float64) -> list[Tensor]:
    """u, taps, bias, tail and D."""
    return normal((b, l, d), (g, k), (d,), (b, k - 1, d), (d,), dtype=dtype)


def gate_example(b: int, l: int, d: int, k: int, dtype=torch.float64) -> list[Tensor]:
    """z, taps, bias and tail."""
    return normal((b, l, 3 * d), (3 * d, k), (3 * d,), (b, k - 1, 3 * d), dtype=dtype)


def filtered(u: Tensor, taps: Tensor, bias=None, tail=None, skip=None) -> tuple[Tensor]:
    """What ``fir`` is."""
    small = u.shape[1] * taps.shape[1] <= 100
    y = reference.causal_convolution(u, taps, tail) if small else torch_fir.fir(u, taps, None, tail)
    return ((y if bias is None else y + bias) + (0 if skip is None else skip * u),)


def gated(z: Tensor, taps: Tensor, bias=None, tail=None) -> tuple[Tensor, Tensor]:
    """What ``fir_gate`` is."""
    x2, x1, v = filtered(z, taps, bias, tail)[0].chunk(3, dim=-1)
    return x2, x1 * v


def our_fir(*inputs: Tensor | None) -> tuple[Tensor]:
    return (fir(*inputs),)


BOTH = pytest.mark.parametrize(
    ("ours", "inputs"),
    [(our_fir, lambda **k: example(2, 70, 6, 3, 4, **k)),
     (our_fir, lambda **k: example(2, 135, 6, 3, 20, **k)),
     (fir_gate, lambda **k: gate_example(2, 70, 21, 3, **k))],
    ids=["short", "medium", "gate"],
)  # fmt: skip


def with_gradients(function, inputs: list[Tensor | None]) -> list[Tensor]:
    """Outputs and gradients of all inputs that are there, the outputs weighted differently from place to place."""
    outputs = function(*inputs)
    weights = [torch.linspace(-1, 2, o.numel(), dtype=o.dtype).view(o.shape) for o in outputs]
    return [*outputs, *torch.autograd.grad(outputs, [i for i in inputs if i is not None], weights)]


def check(ours, truth, inputs: list[Tensor | None], isa: str, bound: float = 1e-12) -> None:
    with on(isa), poisoned():
        got = with_gradients(ours, inputs)
    for value, expected in zip(got, with_gradients(truth, inputs), strict=True):
        assert relative_error(value, expected) < bound


@each_isa
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_fir_equals_its_definition_with_all_gradients(isa, size):
    u, taps, bias, tail, skip = example(*size)
    check(our_fir, filtered, [u, taps, bias, tail, skip], isa)
    check(our_fir, filtered, [u, taps], isa)


@each_isa
@pytest.mark.parametrize("size", GATE_SIZES, ids=str)
def test_fir_gate_equals_its_definition_with_all_gradients(isa, size):
    z, taps, bias, tail = gate_example(*size)
    check(fir_gate, gated, [z, taps, bias, tail], isa)
    check(fir_gate, gated, [z, taps], isa)


@each_isa
@pytest.mark.parametrize("k", [3, 512])
def test_float32_is_within_1e_6_of_float64(isa, k):
    rounded = example(1, 2000, 20, 20, k, dtype=torch.float32)
    exact = [t.detach().double().requires_grad_() for t in rounded]
    with on(isa):
        got = with_gradients(our_fir, rounded)
    for name, value, expected in zip(
        ["y", "du", "dtaps", "dbias", "dtail", "dD"], got, with_gradients(filtered, exact), strict=True
    ):
        assert relative_error(value, expected) < 1e-6, name


@each_isa
def test_float32_gate_is_within_1e_6_of_float64(isa):
    rounded = gate_example(2, 3000, 20, 3, dtype=torch.float32)
    exact = [t.detach().double().requires_grad_() for t in rounded]
    with on(isa):
        got = with_gradients(fir_gate, rounded)
    for name, value, expected in zip(
        ["x2", "u", "dz", "dtaps", "dbias", "dtail"], got, with_gradients(gated, exact), strict=True
    ):
        assert relative_error(value, expected) < 1e-6, name


@BOTH
def test_gradcheck(ours, inputs):
    assert torch.autograd.gradcheck(ours, inputs(), fast_mode=True)


@each_isa
@BOTH
def test_strided_inputs_give_the_same_bits(isa, ours, inputs):
    x, *rest = inputs()
    b, l, d = x.shape
    wide = torch.full((b + 1, l, d + 10), torch.nan, dtype=x.dtype)
    wide[:b, :, 5 : d + 5] = x.detach()
    middle = wide[:b, :, 5 : d + 5].requires_grad_()
    first_channels = x.detach().transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
    with on(isa):
        whole = with_gradients(ours, [x, *rest])
        for other in (middle, first_channels):
            for value, expected in zip(with_gradients(ours, [other, *rest]), whole, strict=True):
                assert torch.equal(value, expected)


@BOTH
def test_nothing_in_nothing_out(ours, inputs):
    x, taps, bias, tail, *_ = inputs()
    y, *_, dtaps, dbias, dtail = with_gradients(ours, [x[:, :0], taps, bias, tail])
    assert y.shape[1] == 0
    for gradient, of in zip((dtaps, dbias, dtail), (taps, bias, tail), strict=True):
        assert torch.equal(gradient, torch.zeros_like(of))
    y, *_, dtaps, dbias, dtail = with_gradients(ours, [x[:0], taps, bias, tail[:0]])
    assert len(y) == len(dtail) == 0
    assert not dtaps.any()
    assert not dbias.any()


@BOTH
def test_halves_with_the_tail_between_them_are_the_whole(ours, inputs):
    x, taps, bias, *_ = (t.detach() for t in inputs())
    whole = ours(x, taps, bias)
    at, past = 41, taps.shape[1] - 1
    halves = ours(x[:, :at], taps, bias), ours(x[:, at:], taps, bias, x[:, at - past : at])
    for first, second, both in zip(*halves, whole, strict=True):
        assert torch.equal(torch.cat([first, second], 1), both)


@pytest.mark.parametrize("k", [3, 20])
def test_bits_do_not_depend_on_run_or_threads(k):
    cases = [
        (our_fir, example(3, 500, 50, 25, k, torch.float32)),
        (fir_gate, gate_example(3, 500, 50, k, torch.float32)),
    ]
    for ours, inputs in cases:
        results = []
        for count in (1, 2, 2, 3):
            with threads(count):
                results.append(with_gradients(ours, inputs))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@BOTH
def test_half_precision_is_summed_in_float32_under_autocast_too(ours, inputs):
    x, *rest = (t.detach() for t in inputs(dtype=torch.float32))
    expected = ours(x.bfloat16().float(), *rest)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for value, wanted in zip(ours(x.bfloat16(), *rest), expected, strict=True):
            assert torch.equal(value, wanted.bfloat16())
        for value, wanted in zip(ours(x.bfloat16().float(), *rest), expected, strict=True):
            assert torch.equal(value, wanted)


@BOTH
def test_opcheck(ours, inputs):
    x, taps, bias, tail, *skip = inputs()
    op = torch.ops.crocuta.fir.default if ours is our_fir else torch.ops.crocuta.fir_gate.default
    torch.library.opcheck(op, (x, taps, bias, *skip, tail))
    torch.library.opcheck(op, (x, taps, None, *(None for _ in skip), None))


@BOTH
def test_compiles_into_one_graph(ours, inputs):
    x, taps, bias, tail, *skip = inputs()
    op = torch.ops.crocuta.fir if ours is our_fir else torch.ops.crocuta.fir_gate

    def run(x: Tensor, taps: Tensor, bias: Tensor, tail: Tensor) -> tuple[Tensor, ...]:  # without checks of shapes
        y = op(2 * x, taps, bias, *(None for _ in skip), tail)
        return tuple(part.tanh() for part in (y if isinstance(y, tuple) else (y,)))

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    results = [with_gradients(f, [x, taps, bias, tail]) for f in (compiled, run)]
    for value, expected in zip(*results, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
