"""The Hyena operator in Triton is its parts in torch one after the other, forward and backward."""

import pytest
import torch
from compiled import poisoned, relative_error
from torch import Tensor
from triton_paths import DEVICE, in_triton, needs_triton  # noqa: F401

from crocuta.ops import reference
from crocuta.ops.kernels.hyena import hyena_modal
from crocuta.ops.kernels.modal import modal_constants

pytestmark = needs_triton

NAMES = ["y", "state", "dz", "dtaps", "dbias", "dlogs", "dR", "dD", "dtail", "dstate"]


def example(b: int, l: int, d: int, n: int, k: int, dtype=torch.float64) -> list[Tensor]:
    """z, taps, bias, log-poles, residues, D, tail and state, all to be differentiated."""
    generator = torch.Generator().manual_seed(b + l + d + n + k)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    decay = -1e-3 - 0.2 * torch.rand(d, n, generator=generator, dtype=torch.float64)
    logs = torch.stack([decay, 3 * torch.rand(d, n, generator=generator, dtype=torch.float64)], -1)
    tensors = (
        *(normal(b, l, 3 * d), normal(3 * d, k) / k, normal(3 * d), logs),
        *(normal(d, n, 2) / n, normal(d), normal(b, k - 1, 3 * d), normal(b, d, n, 2)),
    )
    return [t.to(DEVICE, dtype).requires_grad_() for t in tensors]


def run(z, taps, bias, logs, residues, skip, tail, state, lengths=None):
    return hyena_modal(z, taps, bias, modal_constants(logs, residues, z.shape[2] // 3), skip, tail, state, lengths)


def truth(z, taps, bias, logs, residues, skip, tail, state):
    filtered = reference.causal_convolution(z, taps, tail)
    x2, x1, v = (filtered if bias is None else filtered + bias).chunk(3, dim=-1)
    y, last = reference.modal_convolution(x1 * v, logs, residues, skip, state)
    return x2 * y, last


def with_gradients(function, inputs: list[Tensor | None]) -> list[Tensor]:
    outputs = function(*inputs)
    weights = [torch.linspace(-1, 2, o.numel(), dtype=o.dtype, device=o.device).view(o.shape) for o in outputs]
    return [*outputs, *torch.autograd.grad(outputs, [i for i in inputs if i is not None], weights)]


@pytest.mark.parametrize("missing", [(), (2, 5, 6, 7)], ids=["all", "without what may be missing"])
def test_float64_equals_the_parts_with_all_gradients(missing):
    inputs = [None if i in missing else t for i, t in enumerate(example(2, 70, 2, 2, 3))]
    with poisoned():
        got = with_gradients(run, inputs)
    for value, expected in zip(got, with_gradients(truth, inputs), strict=True):
        assert relative_error(value, expected) < 1e-12


def test_rows_of_different_lengths_end_where_they_end():
    inputs, ends = example(3, 70, 1, 2, 3), [0, 64, 70]
    z, *parameters, tail, state = inputs
    with torch.no_grad():
        for row, end in enumerate(ends):
            z[row, end:] = torch.nan  # what is padding is never read
    got = with_gradients(lambda *given: run(*given, torch.tensor(ends)), inputs)

    def row_by_row(*_):
        rows = [truth(z[r : r + 1, :n], *parameters, tail[r : r + 1], state[r : r + 1]) for r, n in enumerate(ends)]
        padded = [torch.nn.functional.pad(o[0], (0, 0, 0, 70 - o.shape[1])) for o, _ in rows]
        return torch.stack(padded), torch.cat([s for _, s in rows])

    for name, value, expected in zip(NAMES, got, with_gradients(row_by_row, inputs), strict=True):
        assert relative_error(value, expected) < 1e-11, name


def test_nothing_in_leaves_the_state():
    z, *rest = example(2, 5, 1, 2, 3)
    y, last, *gradients = with_gradients(run, [z[:, :0], *rest])
    assert y.shape == (2, 0, 1)
    assert torch.equal(last, rest[-1])
    assert not any(gradient.any() for gradient in gradients[:-1])


def test_half_precision_keeps_its_dtype_and_float32_states():
    z, *rest = (t.detach() for t in example(1, 40, 1, 2, 3, torch.float32))
    y, last = run(z.bfloat16(), *rest)
    expected, state = run(z.bfloat16().float(), *rest)
    assert (y.dtype, last.dtype) == (torch.bfloat16, torch.float32)
    assert relative_error(y, expected) < 2e-2  # x2, u and the filter's output are rounded
    assert relative_error(last, state) < 2e-2


def test_opcheck():
    z, taps, bias, logs, residues, skip, tail, _ = example(1, 5, 1, 1, 2)
    rows = modal_constants(logs, residues, 1).rows.detach().requires_grad_()
    operands = (z, taps, bias, tail, rows, skip, None, None, True)
    torch.library.opcheck(torch.ops.crocuta.hyena_modal.default, operands)
