"""The compiled online step against the torch op, whose buffers it shares, and against the whole convolution."""

import pytest
import torch
from compiled import each_isa, needs_library, on, relative_error, threads
from torch import Tensor

from crocuta.errors import StateError
from crocuta.ops import reference
from crocuta.ops.fft_conv import fft_convolution
from crocuta.ops.kernels import online_conv as kernel
from crocuta.ops.kernels.library import switched_off
from crocuta.ops.kernels.online_conv import OnlineFilter, online_step
from crocuta.ops.online_conv import BLOCK, OnlineBuffers, OnlineTaps, buffer_length, online_convolution

pytestmark = needs_library


def by_torch(*inputs: Tensor) -> Tensor:
    """The torch op, which chooses a kernel where it can."""
    with switched_off():
        return fft_convolution(*inputs)


def randn(*shape: int, seed: int = 0, dtype=torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make_buffers(
    batch: int, channels: int, taps: int, longest: int | None = None, dtype=torch.float64
) -> OnlineBuffers:
    long = torch.zeros(batch, buffer_length(taps, longest), channels, dtype=dtype).transpose(1, 2)
    return OnlineBuffers(long, torch.zeros(batch, BLOCK, channels, dtype=dtype))


def token_by_token(u: Tensor, taps: Tensor, longest: int | None = None, skip: Tensor | None = None) -> Tensor:
    made, held = OnlineFilter(taps, u.shape[2]), make_buffers(len(u), u.shape[2], taps.shape[1], longest, taps.dtype)
    return torch.cat([step(u[:, t : t + 1], made, held, [t] * len(u), skip) for t in range(u.shape[1])], dim=1)


def step(u: Tensor, made: OnlineFilter, held: OnlineBuffers, starts: list[int], skip: Tensor | None = None) -> Tensor:
    lengths = torch.tensor(starts)
    y = online_step(u, made, held, lengths, skip)
    assert lengths.tolist() == [start + 1 for start in starts]
    return y


def test_it_is_the_specification():
    u, taps, skip = randn(2, 70, 6), randn(2, 68, seed=1), randn(6, seed=2)
    expected = reference.causal_convolution(u, taps) + skip * u
    assert relative_error(token_by_token(u, taps, 70, skip), expected) < 1e-12


@each_isa
@pytest.mark.parametrize(
    ("size", "longest"),
    [
        ((1, 700, 37, 37, 700), 700),
        ((2, 300, 16, 4, 300), None),
        ((1, 520, 3, 1, 500), 520),
        ((1, 150, 40, 20, 7), None),
    ],
    ids=str,
)
def test_float64_equals_the_whole_convolution(isa, size, longest):
    b, l, d, g, k = size
    u, taps, skip = randn(b, l, d), randn(g, k, seed=1), randn(d, seed=2)
    with on(isa):
        assert relative_error(token_by_token(u, taps, longest, skip), by_torch(u, taps, skip)) < 1e-12


@each_isa
def test_a_buffer_of_few_taps_is_used_again_and_again(isa):
    """Ten turns; a wrong wrap would bring in inputs of a turn before."""
    u, taps = randn(1, 1300, 5), randn(5, 100, seed=1)
    with on(isa):
        assert relative_error(token_by_token(u, taps), by_torch(u, taps)) < 1e-12


@each_isa
@pytest.mark.parametrize("kept", [0, 1 << 22])
def test_float32_is_within_1e_6_of_float64(isa, kept, monkeypatch):
    """With spectra that are kept, and with taps transformed in every tile."""
    monkeypatch.setattr(kernel, "_KEPT", kept)
    u, taps = randn(1, 1500, 17, dtype=torch.float32), randn(17, 1500, seed=1, dtype=torch.float32)
    with on(isa):
        assert relative_error(token_by_token(u, taps, 1500), by_torch(u.double(), taps.double())) < 1e-6


@pytest.mark.parametrize("first", [0, 5, 64, 200])
def test_it_goes_on_from_what_the_torch_op_leaves_and_the_other_way(first):
    u, taps = randn(2, 400, 9), randn(3, 400, seed=1)
    compiled, plain, held = OnlineFilter(taps, 9), OnlineTaps(taps, 9), make_buffers(2, 9, 400, 400)
    outputs = [online_convolution(u[:, :first], plain, held, [0, 0])] if first else []
    outputs += [step(u[:, t : t + 1], compiled, held, [t, t]) for t in range(first, 300)]
    outputs.append(online_convolution(u[:, 300:], plain, held, [300, 300]))
    assert relative_error(torch.cat(outputs, dim=1), by_torch(u, taps)) < 1e-12


@each_isa
def test_rows_at_different_places(isa):
    u, taps, ahead = randn(2, 300, 21), randn(21, 300, seed=1), 131
    made, held, plain = OnlineFilter(taps, 21), make_buffers(2, 21, 300, 300), OnlineTaps(taps, 21)
    online_convolution(u[1:, :ahead], plain, held.row(1), [0])
    expected = by_torch(u, taps)
    with on(isa):
        for t in range(300 - ahead):
            y = step(torch.stack([u[0, t : t + 1], u[1, ahead + t : ahead + t + 1]]), made, held, [t, ahead + t])
            wanted = torch.stack([expected[0, t : t + 1], expected[1, ahead + t : ahead + t + 1]])
            torch.testing.assert_close(y, wanted, rtol=0, atol=1e-10)


@each_isa
def test_threads_and_runs_give_the_same_bits(isa):
    u, taps = randn(1, 300, 70, dtype=torch.float32), randn(70, 300, seed=1, dtype=torch.float32)
    with on(isa):
        first = token_by_token(u, taps)
        for count in (1, 2):
            with threads(count):
                assert torch.equal(token_by_token(u, taps), first)


def test_other_strides_and_dtypes_of_inputs():
    u, taps, skip = randn(3, 80, 10, dtype=torch.float32), randn(10, 80, seed=1, dtype=torch.float32), randn(10)
    expected = token_by_token(u, taps, None, skip)
    turned = u.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert torch.equal(token_by_token(turned, taps, None, skip), expected)
    half = u.bfloat16()
    assert torch.equal(token_by_token(half, taps), token_by_token(half.float(), taps).bfloat16())


def test_a_filter_follows_its_buffers():
    """Two states in turn, as in beam search: nothing of the one is left in the other."""
    u, taps = randn(2, 70, 4), randn(4, 70, seed=1)
    made, states = OnlineFilter(taps, 4), [make_buffers(1, 4, 70) for _ in range(2)]
    outputs = [[step(u[i : i + 1, t : t + 1], made, states[i], [t]) for i in range(2)] for t in range(70)]
    got = torch.cat([torch.cat(pair) for pair in outputs], dim=1)
    assert relative_error(got, by_torch(u, taps)) < 1e-12


def test_buffers_that_do_not_fit_are_refused():
    made, held, u = OnlineFilter(randn(4, 200), 4), make_buffers(1, 4, 200, 100), randn(1, 1, 4)
    with pytest.raises(StateError, match="is full: got 128 inputs read"):
        step(u, made, held, [128])
    with pytest.raises(StateError, match="channels apart"):
        step(u, made, OnlineBuffers(torch.zeros(1, 4, 128, dtype=u.dtype), held.near), [0])
    with pytest.raises(StateError, match="do not fit its filter"):
        step(u, OnlineFilter(randn(4, 200).float(), 4), held, [0])
    with pytest.raises(StateError, match="inputs do not fit"):
        step(randn(2, 1, 4), made, held, [0, 0])
