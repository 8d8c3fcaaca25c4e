"""The fused Hyena operators are their parts one after the other, forward and backward."""

import pytest
import torch
from compiled import each_isa, needs_library, on, poisoned, relative_error, threads
from torch import Tensor

from crocuta.ops import reference
from crocuta.ops.kernels.hyena import hyena_modal
from crocuta.ops.kernels.modal import BLOCK, modal_constants

pytestmark = needs_library

SIZES = [
    (2, 130, 37, 3, 3),
    (1, 64, 16, 8, 4),
    (3, 1, 5, 1, 3),
    (1, 200, 70, 2, 3),
    (2, 65, 33, 11, 12),
    (1, 70, 300, 2, 1),
]
KINDS = pytest.mark.parametrize("is_complex", [True, False], ids=["complex", "real"])
NAMES = ["y", "state", "dz", "dtaps", "dbias", "dlogs", "dR", "dD", "dtail", "dstate"]


def example(b: int, l: int, d: int, n: int, k: int, is_complex: bool, dtype=torch.float64) -> list[Tensor]:
    """z, taps, bias, log-poles, residues, D, tail and state, all to be differentiated."""
    generator = torch.Generator().manual_seed(b + 10 * l + 1000 * d + n)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    decay = -1e-3 - 0.2 * torch.rand(d, n, generator=generator, dtype=torch.float64)
    logs = torch.stack([decay, 3 * torch.rand(d, n, generator=generator, dtype=torch.float64)], -1)
    pair = (2,) if is_complex else ()
    tensors = (
        *(normal(b, l, 3 * d), normal(3 * d, k) / k, normal(3 * d), logs if is_complex else decay),
        *(normal(d, n, *pair) / n, normal(d), normal(b, k - 1, 3 * d), normal(b, d, n, *pair)),
    )
    return [t.to(dtype).requires_grad_() for t in tensors]


def run(z, taps, bias, logs, residues, skip, tail, state, lengths=None):
    constants = modal_constants(logs, residues, z.shape[2] // 3)
    return hyena_modal(z, taps, bias, constants, skip, tail, state, lengths)


def truth(z, taps, bias, logs, residues, skip, tail, state):
    history = z.new_zeros(len(z), 0, z.shape[2]) if tail is None else tail
    filtered = reference.causal_convolution(z, taps, history)
    x2, x1, v = (filtered if bias is None else filtered + bias).chunk(3, dim=-1)
    y, last = reference.modal_convolution(x1 * v, logs, residues, skip, state)
    return x2 * y, last


def weights(outputs) -> list[Tensor]:
    return [torch.linspace(-1, 2, o.numel(), dtype=o.dtype).view(o.shape) for o in outputs]


@each_isa
@KINDS
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_float64_equals_the_parts_with_all_gradients(isa, is_complex, size):
    inputs = example(*size, is_complex)
    expected = truth(*inputs)
    with on(isa), poisoned():
        ours = run(*inputs)
        got = [*ours, *torch.autograd.grad(ours, inputs, weights(expected))]
    wanted = [*expected, *torch.autograd.grad(expected, inputs, weights(expected))]
    for name, value, right in zip(NAMES, got, wanted, strict=True):
        assert relative_error(value, right) < 1e-12, name


@each_isa
@KINDS
def test_float32_is_within_1e_5_of_float64(isa, is_complex):
    inputs = example(2, 1000, 35, 8, 3, is_complex, torch.float32)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = truth(*exact)
    with on(isa):
        ours = run(*inputs)
        got = [*ours, *torch.autograd.grad(ours, inputs, [w.float() for w in weights(expected)])]
    wanted = [*expected, *torch.autograd.grad(expected, exact, weights(expected))]
    for name, value, right in zip(NAMES, got, wanted, strict=True):
        assert relative_error(value, right) < 1e-5, name


@KINDS
def test_gradcheck(is_complex):
    assert torch.autograd.gradcheck(run, example(2, BLOCK + 3, 3, 2, 3, is_complex), fast_mode=True)


@KINDS
def test_without_what_may_be_missing(is_complex):
    z, taps, _, logs, residues, _, _, _ = inputs = example(2, 70, 6, 2, 3, is_complex)
    ours, expected = (f(z, taps, None, logs, residues, None, None, None) for f in (run, truth))
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    some = [z, taps, logs, residues]
    for value, right in zip(*(torch.autograd.grad(o[0].sum(), some) for o in (ours, expected)), strict=True):
        assert relative_error(value, right) < 1e-12
    assert len(inputs) == 8


@KINDS
def test_rows_of_different_lengths_end_where_they_end(is_complex):
    inputs = example(4, 2 * BLOCK + 5, 18, 3, 3, is_complex)
    lengths = torch.tensor([0, 1, BLOCK + 1, 2 * BLOCK + 5])
    z, *parameters, tail, state = inputs
    with poisoned():
        ours = run(*inputs, lengths)
        got = [*ours, *torch.autograd.grad(ours, inputs, weights(ours))]
    rows = [
        truth(z[r : r + 1, :n], *parameters, tail[r : r + 1], state[r : r + 1]) for r, n in enumerate(lengths.tolist())
    ]
    padded = torch.stack([torch.nn.functional.pad(o[0], (0, 0, 0, z.shape[1] - o.shape[1])) for o, _ in rows])
    expected = padded, torch.cat([s for _, s in rows])
    wanted = [*expected, *torch.autograd.grad(expected, inputs, weights(expected))]
    for name, value, right in zip(NAMES, got, wanted, strict=True):
        assert relative_error(value, right) < 1e-11, name


@each_isa
@KINDS
def test_strided_inputs_and_empty_ones(isa, is_complex):
    z, *rest = (t.detach() for t in example(2, 70, 30, 2, 3, is_complex))
    wide = torch.full((3, 70, 100), torch.nan, dtype=z.dtype)
    wide[:2, :, 5:95] = z
    with on(isa):
        whole = run(z, *rest)[0]
        assert torch.equal(run(wide[:2, :, 5:95], *rest)[0], whole)
        assert torch.equal(run(z.transpose(0, 2).contiguous().transpose(0, 2), *rest)[0], whole)
        nothing, state = run(z[:, :0], *rest)
        assert nothing.shape == (2, 0, 30)
        assert torch.equal(state, rest[-1])


@KINDS
def test_bits_do_not_depend_on_run_or_threads(is_complex):
    inputs = example(3, 150, 600, 3, 3, is_complex, torch.float32)
    results = []
    for count in (1, 2, 2, 3):
        with threads(count):
            ours = run(*inputs)
            results.append([*ours, *torch.autograd.grad(ours, inputs, weights(ours))])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_half_precision_is_summed_in_float32():
    z, *rest = (t.detach() for t in example(1, 300, 16, 4, 3, True, torch.float32))
    y, state = run(z.bfloat16(), *rest)
    assert y.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    assert torch.equal(y, run(z.bfloat16().float(), *rest)[0].bfloat16())


@KINDS
def test_opcheck(is_complex):
    z, taps, bias, logs, residues, skip, tail, _ = example(2, 70, 5, 2, 3, is_complex)
    rows = modal_constants(logs, residues, 5).rows.detach().requires_grad_()
    flat = torch.randn(2, rows.shape[1] * 2, 5, dtype=z.dtype, requires_grad=True)
    op = torch.ops.crocuta.hyena_modal.default
    torch.library.opcheck(op, (z, taps, bias, tail, rows, skip, flat, None, True))
    without = (t.detach() for t in (z, taps))
    torch.library.opcheck(op, (*without, None, None, rows.detach(), None, None, None, False))


@each_isa
def test_gradients_that_no_cache_holds_are_those_of_single_rows(isa):
    """Of many rows at once they are written past the caches, of one row they are not."""
    z, taps, bias, logs, residues, skip, _, _ = example(6, 1000, 64, 2, 3, True)
    with on(isa):
        whole, *single = (
            torch.autograd.grad(run(some, taps, bias, logs, residues, skip, None, None)[0].square().sum(), some)[0]
            for some in [z, *(z.detach()[r : r + 1].requires_grad_() for r in range(6))]
        )
    assert torch.equal(whole, torch.cat(single))
