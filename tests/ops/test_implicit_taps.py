"""Taps of implicit filters against their formula, positions in one turn and in many."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import crocuta.ops.implicit as module
from crocuta.ops.implicit import implicit_taps
from crocuta.ops.mlp import Affine

GENERATOR = torch.Generator().manual_seed(3)


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64).to(dtype)


def parts(sine: str | None, dtype: torch.dtype = torch.float64) -> tuple[list[Affine], Tensor | None, Affine]:
    widths = (3, 5, 5, 5)
    layers = [Affine(randn(b, a, dtype=dtype), randn(b, dtype=dtype)) for a, b in zip(widths, widths[1:])]
    frequency = {"one a unit": randn(5, dtype=dtype), "one": torch.tensor(1.5), None: None}[sine]
    return layers, frequency, Affine(randn(4, 5, dtype=dtype), randn(4, dtype=dtype))


def formula(x: Tensor, layers: list[Affine], frequency: Tensor | None, output: Affine) -> Tensor:
    for layer in layers:
        a = x @ layer.weight.to(x.dtype).t() + layer.bias.to(x.dtype)
        x = (a.relu() if frequency is None else torch.sin(frequency * a)).to(layer.weight.dtype)
    taps = output.weight @ x.t()
    return taps if output.bias is None else taps + output.bias[:, None]


def trained(x: Tensor, layers: list[Affine], frequency: Tensor | None, output: Affine) -> list[Tensor]:
    found = [x, *(t for layer in layers for t in layer), frequency, *output]
    return [t.requires_grad_() for t in found if t is not None and t.ndim]


SINES = pytest.mark.parametrize("sine", ["one a unit", "one", None])


@pytest.mark.parametrize("positions", [1024, 4])
@pytest.mark.parametrize("biased", [True, False])
@SINES
def test_values_and_gradients_are_those_of_the_formula(monkeypatch, sine, biased, positions):
    monkeypatch.setattr(module, "_POSITIONS", positions)
    layers, frequency, output = parts(sine)
    given = randn(11, 3), layers, frequency, output if biased else Affine(output.weight)
    leaves, dy = trained(*given), randn(4, 11)
    found, expected = implicit_taps(*given), formula(*given)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for mine, true in zip(torch.autograd.grad(found, leaves, dy), torch.autograd.grad(expected, leaves, dy)):
        torch.testing.assert_close(mine, true, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("positions", [1024, 4])
def test_positions_wider_than_the_weights(monkeypatch, positions):
    """The first layer is done in their dtype, everything else in that of the weights."""
    monkeypatch.setattr(module, "_POSITIONS", positions)
    layers, frequency, output = parts("one a unit", torch.float32)
    given = 1e3 * randn(11, 3), layers, frequency, output
    leaves, dy = trained(*given), randn(4, 11, dtype=torch.float32)
    found, expected = implicit_taps(*given), formula(*given)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for mine, true in zip(torch.autograd.grad(found, leaves, dy), torch.autograd.grad(expected, leaves, dy)):
        torch.testing.assert_close(mine, true, rtol=1e-5, atol=1e-5 * float(true.abs().max()))


@SINES
def test_what_is_frozen_has_no_gradient(sine):
    layers, frequency, output = parts(sine)
    output.weight.requires_grad_()
    implicit_taps(randn(7, 3), layers, frequency, output).sum().backward()
    assert output.weight.grad is not None
    assert all(t.grad is None for layer in layers for t in layer)
    assert frequency is None or frequency.grad is None


def test_nothing_is_kept_but_the_inputs():
    layers, frequency, output = parts("one a unit")
    given = randn(4096, 3), layers, frequency, output
    leaves, kept = trained(*given), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        implicit_taps(*given)
    assert {t.data_ptr() for t in kept} <= {t.data_ptr() for t in leaves}


@SINES
def test_the_op_passes_the_checks_of_torch(sine):
    layers, frequency, output = parts(sine)
    weights, biases = (list(each) for each in zip(*layers))
    inputs = randn(6, 3).requires_grad_(), weights, biases, frequency, *output
    for t in (*weights, *biases, *output):
        t.requires_grad_()
    torch.library.opcheck(torch.ops.crocuta.implicit_taps.default, inputs)
