"""MLPs against their formula in float64: values, gradients, turns, precision; with and without the compiled kernel."""

from __future__ import annotations

import pytest
import torch
from kernel_paths import each_path

from crocuta.ops import mlp as mlp_module
from crocuta.ops.mlp import Affine, activate, mlp

ACTIVATIONS = ["silu", "gelu", "gelu_tanh", "identity"]
KINDS = pytest.mark.parametrize(("gated", "biased"), [(True, False), (True, True), (False, False), (False, True)])


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def affine(i: int, d: int, seed: int, biased: bool) -> Affine:
    return Affine(randn(i, d, seed=seed), randn(i, seed=seed + 10) if biased else None)


def layers(gated: bool, biased: bool, d: int = 4, i: int = 6) -> tuple[Affine | None, Affine, Affine]:
    gate = affine(i, d, 1, biased) if gated else None
    return gate, affine(i, d, 2, biased), affine(d, i, 3, biased)


def formula(x, gate, up, down, activation):
    def product(x: torch.Tensor, layer: Affine) -> torch.Tensor:
        return x @ layer.weight.t() + (0 if layer.bias is None else layer.bias)

    h = (
        activate(product(x, up), activation)
        if gate is None
        else activate(product(x, gate), activation) * product(x, up)
    )
    return product(h, down)


def leaves(x, *layers):
    return [x, *(t for layer in layers if layer is not None for t in layer if t is not None)]


@KINDS
@each_path
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("turn", [1, 2, 512])
def test_values(path, activation, turn, gated, biased, monkeypatch):
    monkeypatch.setattr(mlp_module, "_ROWS", turn)
    x, each = randn(2, 5, 4), layers(gated, biased)
    with path():
        y = mlp(x, *each, activation)
    torch.testing.assert_close(y, formula(x, *each, activation), rtol=1e-12, atol=1e-12)


@KINDS
@each_path
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients(path, activation, gated, biased, monkeypatch):
    monkeypatch.setattr(mlp_module, "_ROWS", 2)
    found = []
    for function in (mlp, formula):
        x, each = randn(1, 5, 4), layers(gated, biased)
        inputs = [tensor.requires_grad_() for tensor in leaves(x, *each)]
        with path():
            y = function(x, *each, activation)
            assert y.requires_grad
            found.append(torch.autograd.grad((y * randn(1, 5, 4, seed=9)).sum(), inputs))
    for mine, true in zip(*found, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-9, atol=1e-9)


@each_path
def test_frozen_weights_get_no_gradient_and_the_input_does(path):
    x, each = randn(3, 4).requires_grad_(), layers(gated=True, biased=False)
    with path():
        mlp(x, *each, "silu").sum().backward()
    y = randn(3, 4).requires_grad_()
    formula(y, *each, "silu").sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-9, atol=1e-9)
    assert all(layer.weight.grad is None for layer in each)


@each_path
@pytest.mark.parametrize(("gated", "kept"), [(False, 1), (True, 2)])
def test_little_is_kept(path, gated, kept):
    """One tensor as wide as the middle, or two with a gate."""
    sizes = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tuple(tensor.shape))
        return tensor

    with path(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        mlp(randn(3, 4).requires_grad_(), *layers(gated, biased=True), "gelu")
    assert sizes.count((3, 6)) == kept


def test_gelu_is_the_exact_one_unless_asked():
    x = torch.tensor([1.0], dtype=torch.float64)
    exact = 0.5 * (1 + torch.special.erf(x / 2**0.5))
    torch.testing.assert_close(activate(x, "gelu"), exact, rtol=1e-12, atol=0)
    assert (activate(x, "gelu_tanh") - exact).abs() > 1e-5


@KINDS
def test_autocast_makes_the_products_bfloat16_and_gives_gradients_in_float32(gated, biased):
    x, each = (
        randn(3, 4).float(),
        [layer and Affine(*(t if t is None else t.float() for t in layer)) for layer in layers(gated, biased)],
    )
    inputs = [tensor.requires_grad_() for tensor in leaves(x, *each)]
    with torch.autocast("cpu", torch.bfloat16):
        y = mlp(x, *each, "silu")
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in inputs)


def test_bfloat16_is_done_in_one_turn(monkeypatch):
    """Weight gradients summed over turns in bfloat16 would lose digits."""
    monkeypatch.setattr(mlp_module, "_ROWS", 1)
    x = torch.ones(600, 4, dtype=torch.bfloat16)
    narrow = [Affine(layer.weight.bfloat16().requires_grad_()) for layer in layers(True, False)]
    mlp(x, *narrow, "identity").sum().backward()
    exact = [Affine(layer.weight.detach().double().requires_grad_()) for layer in narrow]
    formula(x.double(), *exact, "identity").sum().backward()
    for mine, true in zip(narrow, exact):
        torch.testing.assert_close(mine.weight.grad.double(), true.weight.grad, rtol=2e-2, atol=2e-1)


def test_the_op_passes_the_checks_of_torch():
    x, (gate, up, down) = randn(3, 4).requires_grad_(), layers(True, True)
    inputs = x, *gate, *up, *down, "gelu", True
    torch.library.opcheck(torch.ops.crocuta.mlp.default, inputs)
    plain = x.detach(), None, None, up.weight, None, down.weight, None, "silu", False
    torch.library.opcheck(torch.ops.crocuta.mlp.default, plain, test_utils=("test_schema", "test_faketensor"))


@each_path
def test_a_bias_of_another_dtype_is_an_error_and_no_number(path):
    """The kernel sees addresses alone."""
    gate, up, down = layers(True, True)
    odd = Affine(gate.weight, gate.bias.float())
    with path(), pytest.raises(RuntimeError):
        mlp(randn(3, 4).float(), Affine(odd.weight.float(), gate.bias), up, down, "silu")
    with path():  # torch widens it
        torch.testing.assert_close(mlp(randn(3, 4), odd, up, down, "silu"), formula(randn(3, 4), odd, up, down, "silu"))
