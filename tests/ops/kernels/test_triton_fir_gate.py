"""The short FIR with the gate in Triton is ``reference.causal_convolution``, its thirds multiplied, with gradients."""

import pytest
import torch
from compiled import poisoned, relative_error
from torch import Tensor
from triton_paths import DEVICE, in_triton, needs_triton  # noqa: F401

from crocuta.ops import reference
from crocuta.ops.gate import fir_gate
from crocuta.ops.kernels.gpu import MOST_TAPS

pytestmark = needs_triton

# b, l, d, k: tiles have 64 times and 32 channels
SIZES = [(2, 70, 3, 3), (1, 66, 33, 2), (1, 2, 2, 4), (1, 5, 1, 1), (1, 20, 2, MOST_TAPS)]


def example(b: int, l: int, d: int, k: int, dtype=torch.float64) -> list[Tensor]:
    """z, taps, bias and tail, to be differentiated."""
    generator = torch.Generator().manual_seed(b + l + d + k)
    shapes = (b, l, 3 * d), (3 * d, k), (3 * d,), (b, k - 1, 3 * d)
    values = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [value.to(DEVICE, dtype).requires_grad_() for value in values]


def gated(z: Tensor, taps: Tensor, bias=None, tail=None) -> tuple[Tensor, Tensor]:
    """What ``fir_gate`` is."""
    filtered = reference.causal_convolution(z, taps, tail)
    x2, x1, v = (filtered if bias is None else filtered + bias).chunk(3, dim=-1)
    return x2, x1 * v


def with_gradients(function, inputs: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients, the outputs weighted differently from place to place, in rows and in columns."""
    outputs = function(*inputs)
    weights = [torch.linspace(-1, 2, o.numel(), dtype=o.dtype, device=o.device).view(o.shape) for o in outputs]
    weights[0] = weights[0].transpose(1, 2).contiguous().transpose(1, 2)
    return [*outputs, *torch.autograd.grad(outputs, inputs, weights)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_float64_equals_its_definition_with_all_gradients(size):
    for inputs in (example(*size), example(*size)[:2]):
        with poisoned():
            got = with_gradients(fir_gate, inputs)
        for value, expected in zip(got, with_gradients(gated, inputs), strict=True):
            assert relative_error(value, expected) < 1e-12


def test_float32_is_within_1e_6_of_float64():
    rounded = example(1, 300, 2, 3, torch.float32)
    exact = [t.detach().double().requires_grad_() for t in rounded]
    for value, expected in zip(with_gradients(fir_gate, rounded), with_gradients(gated, exact), strict=True):
        assert relative_error(value, expected) < 1e-6


def test_strided_inputs_give_the_same_bits():
    z, *rest = example(2, 20, 3, 3)
    wide = z.new_full((3, 30, 20), torch.nan)
    wide[:2, 5:25, 3:12] = z.detach()
    first_channels = wide.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    whole = with_gradients(fir_gate, [z, *rest])
    for other in (wide[:2, 5:25, 3:12], first_channels[:2, 5:25, 3:12]):
        for value, expected in zip(with_gradients(fir_gate, [other.requires_grad_(), *rest]), whole, strict=True):
            assert torch.equal(value, expected)
    assert whole[0].stride() == (20, 1, 40)


def test_nothing_in_nothing_out():
    z, taps, bias, tail = example(2, 5, 3, 3)
    for inputs in ([z[:, :0], taps, bias, tail], [z[:0], taps, bias, tail[:0]]):
        outputs = with_gradients(fir_gate, inputs)
        assert outputs[0].numel() == outputs[1].numel() == 0
        assert not any(gradient.any() for gradient in outputs[3:])


def test_halves_with_the_tail_between_them_are_the_whole():
    z, taps, bias, _ = (t.detach() for t in example(1, 70, 3, 4))
    whole = fir_gate(z, taps, bias)
    halves = fir_gate(z[:, :41], taps, bias), fir_gate(z[:, 41:], taps, bias, z[:, 38:41])
    for first, second, both in zip(*halves, whole, strict=True):
        assert torch.equal(torch.cat([first, second], 1), both)


def test_half_precision_is_summed_in_float32():
    z, *rest = (t.detach() for t in example(1, 100, 3, 3, torch.float32))
    expected = fir_gate(z.bfloat16().float(), *rest)
    for value, wanted in zip(fir_gate(z.bfloat16(), *rest), expected, strict=True):
        assert value.dtype == torch.bfloat16
        assert relative_error(value, wanted) < 2**-8  # the interpreter cuts off, a GPU rounds


def test_more_taps_run_in_torch(monkeypatch):
    from crocuta.ops.kernels import gpu

    z, taps, *_ = (t.detach() for t in example(1, 20, 1, MOST_TAPS + 1))
    monkeypatch.setattr(gpu, "as_read", lambda _: pytest.fail("handed to the kernel"))
    monkeypatch.setattr("crocuta.ops.gate.runs_here", lambda _: False)
    torch.testing.assert_close(fir_gate(z, taps), gated(z, taps), rtol=1e-12, atol=1e-12)
    with pytest.raises(pytest.fail.Exception):
        fir_gate(z, taps[:, :MOST_TAPS])


def test_opcheck():
    torch.library.opcheck(torch.ops.crocuta.fir_gate.default, tuple(example(1, 5, 2, 3)))
