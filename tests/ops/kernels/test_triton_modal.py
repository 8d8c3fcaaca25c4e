"""The modal scan in Triton is the recurrence of ``reference.modal_convolution``, forward and backward.

On a GPU the kernels run there, elsewhere in the interpreter.
"""

import pytest
import torch
from compiled import poisoned, relative_error
from torch import Tensor
from triton_paths import DEVICE, ON_GPU, in_triton, needs_triton  # noqa: F401

from crocuta.ops import reference
from crocuta.ops.kernels.modal import BLOCK, modal_constants, modal_scan

pytestmark = needs_triton

SPAN = 16 * BLOCK
"""What a program works on at once."""

SIZES = [(2, 130, 2, 3), (1, 1, 1, 1), (1, SPAN, 1, 2), (1, SPAN + 70, 1, 4), (1, 65, 2, 17)]
KINDS = pytest.mark.parametrize("is_complex", [True, False], ids=["complex", "real"])
NAMES = ["y", "last", "du", "dlogs", "dR", "dD", "dstate"]


def example(b: int, l: int, d: int, n: int, is_complex: bool, dtype=torch.float64, groups=None) -> list[Tensor]:
    """u, log-poles, residues, D and a state, all to be differentiated."""
    generator = torch.Generator().manual_seed(b + 10 * l + 1000 * d + n)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    g, pair = groups or d, (2,) if is_complex else ()
    decay = -1e-4 - 0.2 * torch.rand(g, n, generator=generator, dtype=torch.float64)
    logs = torch.stack([decay, 3 * torch.rand(g, n, generator=generator, dtype=torch.float64)], -1)
    tensors = normal(b, l, d), logs if is_complex else decay, normal(g, n, *pair) / n, normal(d), normal(b, d, n, *pair)
    return [t.to(DEVICE, dtype).requires_grad_() for t in tensors]


def run(u: Tensor, logs: Tensor, residues: Tensor, skip: Tensor | None, state: Tensor | None, lengths=None):
    return modal_scan(u, modal_constants(logs, residues, u.shape[2]), skip, state, lengths)


def weights_of(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Weights of the outputs that differ from place to place."""
    return [torch.linspace(-1, 2, o.numel(), dtype=o.dtype, device=o.device).view(o.shape) for o in outputs]


def with_gradients(function, inputs: list[Tensor]) -> list[Tensor]:
    outputs = function(*inputs)
    return [*outputs, *torch.autograd.grad(outputs, inputs, weights_of(outputs))]


@KINDS
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_float64_equals_the_recurrence_with_all_gradients(is_complex, size):
    inputs = example(*size, is_complex)
    wanted = with_gradients(reference.modal_convolution, inputs)
    with poisoned():
        got = with_gradients(run, inputs)
    for name, value, expected in zip(NAMES, got, wanted, strict=True):
        assert relative_error(value, expected) < 1e-12, name


@KINDS
def test_float32_is_within_1e_5_of_float64_over_slow_modes(is_complex):
    rounded = example(1, 3 * SPAN, 1, 4, is_complex, torch.float32)
    with torch.no_grad():
        rounded[1].select(-1, 0).fill_(-1e-5) if is_complex else rounded[1].fill_(-1e-5)
    exact = [t.detach().double().requires_grad_() for t in rounded]  # the same inputs; only the sums differ
    got, wanted = with_gradients(run, rounded), with_gradients(reference.modal_convolution, exact)
    for name, value, expected in zip(NAMES, got, wanted, strict=True):
        assert relative_error(value, expected) < 1e-5, name


@torch.no_grad()
@KINDS
def test_rounding_of_a_pole_does_not_add_up(is_complex):
    # products rounded to float32 from one end to the other would be off by 2e-6
    inputs = example(1, 50 * SPAN, 1, 1, is_complex, torch.float32)
    logs = torch.full_like(inputs[1], -3.1e-6)
    *_, last = run(torch.zeros_like(inputs[0]), logs, *inputs[2:])
    pole = torch.exp(torch.view_as_complex(logs.double()) if is_complex else logs.double())
    state = torch.view_as_complex(inputs[4].double()) if is_complex else inputs[4].double()
    truth = pole ** (50 * SPAN) * state
    assert relative_error(last, torch.view_as_real(truth) if is_complex else truth) < 2e-7


@KINDS
def test_groups_without_skip_or_state(is_complex):
    u, logs, residues, _, _ = example(1, 70, 4, 2, is_complex, groups=2)
    ours, truth = run(u, logs, residues, None, None), reference.modal_convolution(u, logs, residues)
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        *(torch.autograd.grad(o[0].sum(), [u, logs, residues]) for o in (ours, truth)), rtol=1e-11, atol=1e-11
    )


@KINDS
def test_rows_of_different_lengths_end_where_they_end(is_complex):
    ends = [0, 1, BLOCK, SPAN, SPAN + 5]
    inputs = example(len(ends), SPAN + 5, 1, 2, is_complex)
    u, logs, residues, skip, state = inputs
    with torch.no_grad():
        for row, end in enumerate(ends):
            u[row, end:] = torch.nan  # what is padding is never read
    with poisoned():
        ours = run(*inputs, torch.tensor(ends))
        got = [*ours, *torch.autograd.grad(ours, inputs, weights_of(ours))]
    rows = [
        reference.modal_convolution(u[r : r + 1, :n], logs, residues, skip, state[r : r + 1])
        for r, n in enumerate(ends)
    ]
    padded = torch.stack([torch.nn.functional.pad(o[0], (0, 0, 0, u.shape[1] - o.shape[1])) for o, _ in rows])
    truth = padded, torch.cat([s for _, s in rows])
    wanted = [*truth, *torch.autograd.grad(truth, inputs, weights_of(truth))]
    for name, value, expected in zip(NAMES, got, wanted, strict=True):
        assert relative_error(value, expected) < 1e-11, name


@torch.no_grad()
@KINDS
def test_strided_inputs_and_empty_ones(is_complex):
    u, logs, residues, skip, state = example(2, 70, 2, 2, is_complex)
    wide = u.new_full((3, 80, 4), torch.nan)
    wide[:2, 5:75, 1:3] = u
    whole, _ = run(u, logs, residues, skip, None)
    for other in (wide[:2, 5:75, 1:3], wide.permute(2, 0, 1).contiguous().permute(1, 2, 0)[:2, 5:75, 1:3]):
        assert torch.equal(run(other, logs, residues, skip, None)[0], whole)
    nothing, last = run(u[:, :0], logs, residues, skip, state)
    assert nothing.shape == (2, 0, 2)
    assert torch.equal(last, state)
    assert run(u[:0], logs, residues, skip, None)[0].shape == (0, 70, 2)


def test_outputs_have_time_contiguous():
    y, _ = run(*example(2, 5, 1, 2, True))
    assert y.stride() == (5, 1, 10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype):
    rounded = example(1, 300, 1, 4, True, torch.float32)
    narrow = [rounded[0].detach().to(dtype).requires_grad_(), *rounded[1:]]
    exact = [t.detach().double().requires_grad_() for t in narrow]
    ours, truth = run(*narrow), reference.modal_convolution(*exact)
    weights = weights_of(ours)
    got = [*ours, *torch.autograd.grad(ours, narrow, weights)]
    wanted = [*truth, *torch.autograd.grad(truth, exact, [w.double() for w in weights])]
    assert got[0].dtype == got[2].dtype == dtype
    half = 2.0 ** -(7 if dtype == torch.bfloat16 else 11)  # the interpreter cuts off bfloat16, a GPU rounds it
    for name, value, expected in zip(NAMES, got, wanted, strict=True):
        assert relative_error(value, expected) < (half if value.dtype == dtype else 3e-5), name


def test_opcheck():
    u, logs, residues, skip, _ = example(1, 70, 1, 2, True)
    rows = modal_constants(logs, residues, 1).rows.detach().requires_grad_()
    flat = torch.randn(1, 4, 1, dtype=u.dtype, device=DEVICE, requires_grad=True)
    torch.library.opcheck(torch.ops.crocuta.modal_scan.default, (u, rows, skip, flat, None, True))


def test_compiles_into_one_graph():
    u, logs, residues, skip, _ = example(1, 70, 1, 2, True)
    rows = modal_constants(logs, residues, 1).rows.detach().requires_grad_()

    def scan(u: Tensor, rows: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:  # without the checks of shapes
        y, last, _ = torch.ops.crocuta.modal_scan(2 * u, rows, skip, None, None, True)
        return y.tanh(), last

    inputs = [u, rows, skip]
    compiled = torch.compile(scan, backend="aot_eager", fullgraph=True)
    for value, expected in zip(with_gradients(compiled, inputs), with_gradients(scan, inputs), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


def test_chunks_are_those_of_the_states_that_are_kept():
    from crocuta.ops.kernels.triton import modal_tables

    assert modal_tables.CHUNK.value == BLOCK
    assert modal_tables.JUMPS.value == 2 * BLOCK
    assert modal_tables.HEIGHT.value == 2 * BLOCK + modal_tables.ROWS.value + 2
    assert ON_GPU or modal_tables.ROWS.value * BLOCK == SPAN
