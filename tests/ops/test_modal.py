"""Modal filters against the recurrence written out in the reference, in float64: values, states and gradients."""

from __future__ import annotations

import pytest
import torch

from crocuta.ops import modal, reference
from crocuta.ops.fft_conv import fft_convolution

LENGTHS = [1, 2, 7, 8, 9, 16, 23]


def make_filter(*, is_complex: bool, groups: int = 2, modes: int = 3, seed: int = 0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    decay = -torch.rand(groups, modes, generator=generator, dtype=dtype) - 0.01
    if not is_complex:
        return decay, torch.randn(groups, modes, generator=generator, dtype=dtype)
    angle = torch.rand(groups, modes, generator=generator, dtype=dtype) * 3
    return torch.stack([decay, angle], -1), torch.randn(groups, modes, 2, generator=generator, dtype=dtype)


def make_case(*, is_complex: bool, length: int, channels: int = 4, batch: int = 2, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    poles, residues = make_filter(is_complex=is_complex)
    u = torch.randn(batch, length, channels, generator=generator, dtype=torch.float64)
    skip = torch.randn(channels, generator=generator, dtype=torch.float64)
    shape = (batch, channels, 3, 2) if is_complex else (batch, channels, 3)
    return u, poles, residues, skip, torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("is_complex", [True, False])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 200])
def test_taps_match_the_formula(is_complex, length):
    poles, residues = make_filter(is_complex=is_complex)
    expected = reference.modal_taps(poles, residues, length)
    torch.testing.assert_close(modal.modal_taps(poles, residues, length), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("is_complex", [True, False])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("with_state", [True, False])
def test_chunked_matches_the_recurrence(is_complex, length, with_state):
    u, poles, residues, skip, state = make_case(is_complex=is_complex, length=length)
    start = state if with_state else None
    expected, expected_state = reference.modal_convolution(u, poles, residues, skip, start)
    y, last = modal.chunked(u, modal.modal_tables(poles, residues, block=8), skip, start)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(last, expected_state, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("is_complex", [True, False])
@pytest.mark.parametrize("groups_equal_channels", [True, False])
def test_the_recurrent_form_matches_too(is_complex, groups_equal_channels):
    channels = 2 if groups_equal_channels else 4
    u, poles, residues, skip, state = make_case(is_complex=is_complex, length=5, channels=channels)
    expected = reference.modal_convolution(u, poles, residues, skip, state)
    constants = modal.modal_step_constants(poles, residues, channels)
    y, last = modal.recurrent(u, *constants, skip, state)
    torch.testing.assert_close((y, last), expected, rtol=1e-11, atol=1e-11)
    chunked = modal.chunked(u, modal.modal_tables(poles, residues, block=4), skip, state)
    torch.testing.assert_close(chunked, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("is_complex", [True, False])
@pytest.mark.parametrize("length", [1, 4, 7, 8, 13])
def test_gradients_of_outputs_and_state(is_complex, length):
    u, poles, residues, skip, state = make_case(is_complex=is_complex, length=length)
    inputs = tuple(t.clone().requires_grad_() for t in (u, poles, residues, skip, state))

    def run(u, poles, residues, skip, state):
        return modal.chunked(u, modal.modal_tables(poles, residues, block=4), skip, state)

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("is_complex", [True, False])
def test_gradients_of_taps(is_complex):
    poles, residues = (t.requires_grad_() for t in make_filter(is_complex=is_complex))
    assert torch.autograd.gradcheck(lambda p, r: modal.modal_taps(p, r, 11), (poles, residues))


@pytest.mark.parametrize("is_complex", [True, False])
def test_rows_of_different_lengths_end_in_their_own_state(is_complex):
    u, poles, residues, _, state = make_case(is_complex=is_complex, length=21, batch=4)
    lengths = torch.tensor([0, 1, 13, 21])
    tables = modal.modal_tables(poles, residues, block=8)
    last = modal.modal_final_state(u, tables, poles, state, lengths)
    for row, length in enumerate(lengths.tolist()):
        _, alone = reference.modal_convolution(u[row : row + 1, :length], poles, residues, None, state[row : row + 1])
        torch.testing.assert_close(last[row : row + 1], alone, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("is_complex", [True, False])
def test_fft_with_the_taps_is_the_same_filter(is_complex):
    u, poles, residues, skip, _ = make_case(is_complex=is_complex, length=101)
    expected, _ = modal.chunked(u, modal.modal_tables(poles, residues), skip)
    taps = modal.modal_taps(poles, residues, 101)
    torch.testing.assert_close(fft_convolution(u, taps, skip), expected, rtol=1e-10, atol=1e-10)


def test_float32_keeps_its_digits_over_a_hundred_thousand_tokens():
    """Powers in float32 would lose the phase: a 3 rad pole is wrong by 2e-2 after 10^5 steps."""
    log_poles = torch.tensor([[[-1e-5, 3.0]]])
    residues = torch.tensor([[[1.0, 0.5]]])
    u = torch.zeros(1, 100_001, 1)
    u[0, 0, 0] = 1.0
    y, _ = modal.chunked(u, modal.modal_tables(log_poles, residues))
    exact = modal.modal_taps(log_poles.double(), residues.double(), 100_001)[0]
    assert (y[0, :, 0] - exact).abs().max() < 2e-5
    assert (modal.modal_taps(log_poles, residues, 100_001)[0] - exact).abs().max() < 2e-6


def test_bf16_inputs_keep_a_float32_state():
    u, poles, residues, skip, _ = make_case(is_complex=True, length=9)
    y, last = modal.chunked(u.bfloat16(), modal.modal_tables(poles.float(), residues.float()), skip.float())
    assert (y.dtype, last.dtype) == (torch.bfloat16, torch.float32)
