"""The compiled modal scan is the recurrence of ``reference.modal_convolution``, forward and backward."""

import pytest
import torch
from compiled import each_isa, needs_library, on, poisoned, relative_error, threads
from torch import Tensor

from crocuta.ops import reference
from crocuta.ops.kernels.modal import BLOCK, ModalConstants, modal_constants, modal_scan

pytestmark = needs_library

SIZES = [(2, 130, 37, 3), (1, 64, 16, 8), (3, 1, 5, 1), (1, 200, 70, 2), (2, 67, 33, 11), (1, 129, 300, 4)]
KINDS = pytest.mark.parametrize("is_complex", [True, False], ids=["complex", "real"])


def example(
    b: int, l: int, d: int, n: int, is_complex: bool, dtype=torch.float64, groups: int | None = None, slow: float = 1e-4
) -> list[Tensor]:
    """u, log-poles, residues, D and a state, all to be differentiated."""
    generator = torch.Generator().manual_seed(b + 10 * l + 1000 * d + n)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    g = groups or d
    decay = -slow - 0.2 * torch.rand(g, n, generator=generator, dtype=torch.float64)
    logs = torch.stack([decay, 3 * torch.rand(g, n, generator=generator, dtype=torch.float64)], -1)
    pair = (2,) if is_complex else ()
    tensors = normal(b, l, d), logs if is_complex else decay, normal(g, n, *pair) / n, normal(d), normal(b, d, n, *pair)
    return [t.to(dtype).requires_grad_() for t in tensors]


def run(u: Tensor, logs: Tensor, residues: Tensor, skip: Tensor | None, state: Tensor | None, lengths=None):
    return modal_scan(u, modal_constants(logs, residues, u.shape[2]), skip, state, lengths)


def gradients(outputs, inputs, weights) -> list[Tensor]:
    return list(torch.autograd.grad(outputs, inputs, weights))


def ones_like(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Weights of the outputs that differ from place to place."""
    return [torch.linspace(-1, 2, o.numel(), dtype=o.dtype).view(o.shape) for o in outputs]


@each_isa
@KINDS
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_float64_equals_the_recurrence_with_all_gradients(isa, is_complex, size):
    inputs = example(*size, is_complex)
    truth = reference.modal_convolution(*inputs)
    with on(isa), poisoned():
        ours = run(*inputs)
        weights = ones_like(truth)
        got = [*ours, *gradients(ours, inputs, weights)]
    wanted = [*truth, *gradients(truth, inputs, weights)]
    for value, expected in zip(got, wanted, strict=True):
        assert relative_error(value, expected) < 1e-12


@each_isa
@KINDS
def test_float32_is_within_1e_5_of_float64_over_slow_modes(isa, is_complex):
    # time constants of 10^5 steps: poles rounded to float32 would be off by 1e-4 at the end
    exact = example(1, 5000, 20, 4, is_complex, slow=1e-5)
    with torch.no_grad():
        exact[1].select(-1, 0).fill_(-1e-5) if is_complex else exact[1].fill_(-1e-5)
    rounded = [t.detach().float().requires_grad_() for t in exact]
    exact = [t.detach().double().requires_grad_() for t in rounded]  # the same inputs; only the sums differ
    truth = reference.modal_convolution(*exact)
    weights = ones_like(truth)
    with on(isa):
        ours = run(*rounded)
        got = [*ours, *gradients(ours, rounded, [w.float() for w in weights])]
    wanted = [*truth, *gradients(truth, exact, weights)]
    for name, value, expected in zip(["y", "s", "du", "dlogs", "dR", "dD", "ds"], got, wanted, strict=True):
        assert relative_error(value, expected) < 1e-5, name


@KINDS
def test_gradcheck(is_complex):
    inputs = example(2, BLOCK + 3, 3, 3, is_complex)
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@KINDS
@pytest.mark.parametrize("groups", [1, 3])
def test_groups_without_skip_or_state(is_complex, groups):
    u, logs, residues, _, _ = example(2, 70, 6, 2, is_complex, groups=groups)
    y, last = run(u, logs, residues, None, None)
    truth_y, truth_last = reference.modal_convolution(u, logs, residues)
    torch.testing.assert_close(y, truth_y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(last, truth_last, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(o.sum(), logs)[0] for o in (y, truth_y)), rtol=1e-11, atol=1e-11)


@KINDS
def test_rows_of_different_lengths_end_where_they_end(is_complex):
    inputs = example(4, 2 * BLOCK + 5, 18, 3, is_complex)
    lengths = torch.tensor([0, BLOCK, BLOCK + 1, 2 * BLOCK + 5])
    u, logs, residues, skip, state = inputs
    with poisoned():
        y, last = run(*inputs, lengths)
        weights = ones_like((y, last))
        got = gradients((y, last), inputs, weights)
    rows = [
        reference.modal_convolution(u[r : r + 1, :n], logs, residues, skip, state[r : r + 1])
        for r, n in enumerate(lengths)
    ]
    truth = torch.stack([torch.nn.functional.pad(o[0], (0, 0, 0, u.shape[1] - o.shape[1])) for o, _ in rows])
    ends = torch.cat([s for _, s in rows])
    torch.testing.assert_close(y, truth, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(last, ends, rtol=1e-12, atol=1e-12)
    for value, expected in zip(got, gradients((truth, ends), inputs, weights), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-11)


@each_isa
@KINDS
def test_strided_inputs_and_empty_ones(isa, is_complex):
    u, logs, residues, skip, _ = example(2, 70, 90, 2, is_complex)
    wide = torch.full((3, 70, 100), torch.nan, dtype=u.dtype)
    wide[:2, :, 5:95] = u.detach()
    with on(isa):
        whole, _ = run(u.detach(), logs, residues, skip, None)
        torch.testing.assert_close(run(wide[:2, :, 5:95], logs, residues, skip, None)[0], whole, rtol=0, atol=0)
        first_channels = u.detach().transpose(0, 2).contiguous().transpose(0, 2)
        torch.testing.assert_close(run(first_channels, logs, residues, skip, None)[0], whole, rtol=0, atol=0)
        nothing, state = run(u.detach()[:, :0], logs, residues, skip, None)
        assert nothing.shape == (2, 0, 90)
        assert not state.any()
        assert run(u.detach()[:0], logs, residues, skip, None)[0].shape == (0, 70, 90)


@KINDS
def test_bits_do_not_depend_on_run_or_threads(is_complex):
    inputs = example(3, 150, 600, 3, is_complex, dtype=torch.float32)
    results = []
    for count in (1, 2, 2, 3):
        with threads(count):
            ours = run(*inputs)
            results.append([*ours, *gradients(ours, inputs, ones_like(ours))])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_half_precision_is_summed_in_float32():
    u, logs, residues, skip, _ = (t.detach() for t in example(1, 300, 16, 4, True, dtype=torch.float32))
    y, state = run(u.bfloat16(), logs, residues, skip, None)
    truth, _ = run(u.bfloat16().float(), logs, residues, skip, None)
    assert y.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    assert torch.equal(y, truth.bfloat16())


@KINDS
def test_opcheck(is_complex):
    u, logs, residues, skip, state = example(2, 70, 5, 2, is_complex)
    rows = modal_constants(logs, residues, 5).rows.detach().requires_grad_()
    flat = torch.randn(2, rows.shape[1] * 2, 5, dtype=u.dtype, requires_grad=True)
    for arguments in ((u, rows, skip, flat, None, True), (u.detach(), rows.detach(), None, None, None, False)):
        torch.library.opcheck(torch.ops.crocuta.modal_scan.default, arguments)


def test_compiles_into_one_graph():
    u, logs, residues, skip, _ = example(2, 70, 5, 2, True)
    rows = modal_constants(logs, residues, 5).rows.detach().requires_grad_()

    def scan(u: Tensor, rows: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:  # without the checks of shapes
        y, last, _ = torch.ops.crocuta.modal_scan(2 * u, rows, skip, None, None, True)
        return y.tanh(), last

    inputs = [u, rows, skip]
    ours, truth = torch.compile(scan, backend="aot_eager", fullgraph=True)(*inputs), scan(*inputs)
    got = [*ours, *gradients(ours, inputs, ones_like(ours))]
    wanted = [*truth, *gradients(truth, inputs, ones_like(truth))]
    for value, expected in zip(got, wanted, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


def test_constants_hold_what_rounding_loses():
    _, logs, residues, _, _ = example(1, 1, 3, 2, True)
    exact: ModalConstants = modal_constants(logs, residues, 3)
    rounded = modal_constants(logs.float(), residues.float(), 3)
    whole = rounded.rows[0].double() + rounded.rows[2].double()
    wide = modal_constants(logs.float().double(), residues, 3)
    torch.testing.assert_close(whole, wide.rows[0], rtol=1e-13, atol=1e-13)
    assert not exact.rows[2].any()


@each_isa
def test_gradients_that_no_cache_holds_are_those_of_single_rows(isa):
    """Of many rows at once they are written past the caches, of one row they are not."""
    generator = torch.Generator().manual_seed(0)
    u, dy = torch.randn(2, 12, 1000, 64, generator=generator, dtype=torch.float64)
    constants = modal_constants(-torch.rand(64, 3, 2, dtype=torch.float64), torch.rand(64, 3, 2).double(), 64)
    with on(isa):
        whole, *single = (
            torch.autograd.grad(modal_scan(some, constants)[0], some, weights)[0]
            for some, weights in [(u.requires_grad_(), dy), *((u[r : r + 1], dy[r : r + 1]) for r in range(12))]
        )
    assert torch.equal(whole, torch.cat(single))
