"""Under autocast the operators keep float32 inside, forward and backward."""

from __future__ import annotations

import pytest
import torch

from crocuta.ops import modal
from crocuta.ops.fft_conv import fft_convolution
from crocuta.ops.fir import fir
from crocuta.ops.gate import fir_gate


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def modal_op(u: torch.Tensor) -> torch.Tensor:
    poles, residues = torch.stack([-randn(6, 2).abs(), randn(6, 2)], -1), randn(6, 2, 2)
    return modal.chunked(u, modal.modal_tables(poles, residues))[0]


OPS = {
    "fir": lambda u: fir(u, randn(6, 3)),
    "gate": lambda u: torch.cat(fir_gate(u, randn(6, 3)), dim=-1),
    "modal": modal_op,
    "fft": lambda u: fft_convolution(u, randn(6, 40)),
}


@pytest.mark.parametrize("name", OPS)
def test_autocast_changes_nothing(name):
    def run():
        u = randn(2, 70, 6).requires_grad_()
        y = OPS[name](u)
        y.square().sum().backward()
        return y.detach(), u.grad

    expected = run()
    with torch.autocast("cpu", torch.bfloat16):
        under = run()
    assert torch.equal(under[0], expected[0])
    assert torch.equal(under[1], expected[1])
