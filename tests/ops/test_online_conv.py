"""Online convolution against the direct one in float64, for every cutting; its tiles, its buffers, its rounding."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crocuta.ops import online_conv, reference
from crocuta.ops.fft_conv import fft_convolution
from crocuta.ops.online_conv import BLOCK, OnlineBuffers, OnlineTaps, buffer_length, online_convolution, period

CHANNELS = 4


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def buffers(batch: int, taps: int, longest: int | None, dtype: torch.dtype = torch.float64) -> OnlineBuffers:
    long = torch.zeros(batch, CHANNELS, buffer_length(taps, longest), dtype=dtype)
    return OnlineBuffers(long, torch.zeros(batch, BLOCK, CHANNELS, dtype=dtype))


def by_pieces(u, taps, cuts, longest=None, skip=None, dtype=torch.float64):
    made, held, starts = OnlineTaps(taps.to(dtype), CHANNELS), buffers(len(u), taps.shape[1], longest, dtype), []
    outputs = []
    for start, end in pairwise([0, *sorted(cuts), u.shape[1]]):
        starts = [start] * len(u)
        outputs.append(online_convolution(u[:, start:end].to(dtype), made, held, starts, None, skip))
    return torch.cat(outputs, dim=1)


def test_token_by_token_is_the_specification():
    u, taps, skip = randn(2, 150, CHANNELS), randn(2, 140, seed=1), randn(CHANNELS, seed=2)
    expected = reference.causal_convolution(u, taps) + skip * u
    torch.testing.assert_close(by_pieces(u, taps, range(1, 150), 150, skip), expected, rtol=0, atol=1e-11)


@settings(max_examples=120)
@given(data=st.data())
def test_every_cutting_gives_the_same(data):
    """Taps around blocks and powers of two, shorter and longer than the sequence; buffers of all lengths."""
    taps = data.draw(st.sampled_from([1, 2, 63, 64, 65, 100, 127, 128, 129, 200, 500]))
    length = data.draw(st.integers(1, 700))
    cuts = data.draw(st.sets(st.integers(1, length), max_size=8)) - {length}
    singles = data.draw(st.integers(0, length))  # so many tokens one by one from here
    cuts |= set(range(singles, min(singles + 150, length))) - {0}
    groups = data.draw(st.sampled_from([1, 2, 4]))
    longest = data.draw(st.sampled_from([None, length, length + 1, length + 100]))
    batch = data.draw(st.integers(1, 2))
    u, h, skip = randn(batch, length, CHANNELS, seed=length), randn(groups, taps, seed=taps), randn(CHANNELS, seed=3)
    expected = fft_convolution(u, h, skip)
    torch.testing.assert_close(by_pieces(u, h, cuts, longest, skip), expected, rtol=0, atol=1e-9)


@settings(max_examples=60)
@given(data=st.data())
def test_rows_at_different_places(data):
    taps = data.draw(st.sampled_from([3, 65, 130, 400]))
    totals = data.draw(st.lists(st.integers(1, 300), min_size=2, max_size=4))
    u, h = randn(len(totals), 300, CHANNELS, seed=sum(totals)), randn(2, taps, seed=taps)
    made, held, read = OnlineTaps(h, CHANNELS), buffers(len(totals), taps, 300), [0] * len(totals)
    outputs = [[u[row, :0]] for row in range(len(totals))]
    while read != totals:
        counts = [data.draw(st.integers(0, min(90, total - done))) for done, total in zip(read, totals)]
        width = max(1, max(counts))
        chunk = torch.full((len(totals), width, CHANNELS), torch.nan, dtype=torch.float64)  # padding must not be read
        for row, count in enumerate(counts):
            chunk[row, :count] = u[row, read[row] : read[row] + count]
        y = online_convolution(chunk, made, held, read, counts)
        for row, count in enumerate(counts):
            outputs[row].append(y[row, :count])
        read = [done + count for done, count in zip(read, counts)]
        if all(count == 0 for count in counts):
            break
    for row, total in enumerate(read):
        expected = fft_convolution(u[row : row + 1, :total], h)[0] if total else u[row, :0]
        torch.testing.assert_close(torch.cat(outputs[row]), expected, rtol=0, atol=1e-9)


def test_no_pair_is_done_twice_or_left_out(monkeypatch):
    """Taps of ones count the pairs: output t must be t + 1; the number of tiles of each size is that of the scheme."""
    sizes: list[int] = []
    rfft = torch.fft.rfft
    monkeypatch.setattr(torch.fft, "rfft", lambda x, n: sizes.append(n) or rfft(x, n=n))
    length = 16 * BLOCK
    made, held = OnlineTaps(torch.ones(1, length, dtype=torch.float64), CHANNELS), buffers(1, length, length)
    one = torch.ones(1, 1, CHANNELS, dtype=torch.float64)
    y = torch.cat([online_convolution(one, made, held, [t]) for t in range(length)], dim=1)
    torch.testing.assert_close(y[0, :, 0], torch.arange(1, length + 1, dtype=torch.float64), rtol=1e-12, atol=1e-9)
    tiles = {2 * size: sizes.count(2 * size) - 1 for size in (BLOCK, 2 * BLOCK, 4 * BLOCK, 8 * BLOCK)}  # 1: the taps
    assert tiles == {2 * BLOCK: 8, 4 * BLOCK: 4, 8 * BLOCK: 2, 16 * BLOCK: 1}
    assert len(sizes) == sum(tiles.values()) + len(tiles)


def test_a_filter_of_few_taps_runs_for_ever_in_its_buffer():
    """Ten times around; a wrong wrap would bring in inputs of a turn before."""
    taps = randn(4, 100, seed=1)
    assert (period(100), buffer_length(100, None), buffer_length(100, 70)) == (128, 128, 128)
    u = randn(1, 1300, CHANNELS)
    held = by_pieces(u, taps, range(1, 1300))
    torch.testing.assert_close(held, fft_convolution(u, taps), rtol=0, atol=1e-10)


def test_buffers_are_whole_blocks_and_no_longer_than_the_period():
    assert [period(k) for k in (1, 64, 65, 1000)] == [64, 64, 128, 1024]
    assert [buffer_length(1000, n) for n in (1, 64, 65, 900, 5000)] == [64, 64, 128, 960, 1024]


@pytest.mark.parametrize("kept", [0, 1 << 22])
def test_channels_done_in_turns_and_spectra_made_anew_give_the_same(monkeypatch, kept):
    u, taps = randn(2, 300, CHANNELS), randn(2, 300, seed=1)
    expected = by_pieces(u, taps, [64, 65, 200], 300)
    monkeypatch.setattr(online_conv, "_TURN", 1)
    monkeypatch.setattr(online_conv, "_KEPT", kept)
    torch.testing.assert_close(by_pieces(u, taps, [64, 65, 200], 300), expected, rtol=0, atol=1e-12)


def test_what_was_returned_stays():
    """Outputs of one token must not be views of the block that later tokens write."""
    u, taps = randn(1, 200, CHANNELS), randn(1, 200, seed=1)
    made, held = OnlineTaps(taps, CHANNELS), buffers(1, 200, 200)
    outputs, copies = [], []
    for t in range(200):
        outputs.append(online_convolution(u[:, t : t + 1], made, held, [t]))
        copies.append(outputs[-1].clone())
    assert torch.equal(torch.cat(outputs, 1), torch.cat(copies, 1))


def test_float32_rounds_no_more_than_a_transform_of_the_whole():
    """Also in bfloat16 inputs, which are summed in float32."""
    u, taps = randn(1, 3000, CHANNELS), randn(4, 3000, seed=1) * torch.exp(-torch.arange(3000) / 500.0)
    expected = fft_convolution(u, taps)
    size = expected.abs().max()
    y = by_pieces(u, taps, range(1, 3000), 3000, dtype=torch.float32)
    assert (y - expected).abs().max() <= 1e-6 * size
    narrow = u.to(torch.bfloat16)
    made, held = OnlineTaps(taps.float(), CHANNELS), buffers(1, 3000, 3000, torch.float32)
    y = torch.cat([online_convolution(narrow[:, t : t + 1], made, held, [t]) for t in range(3000)], dim=1)
    assert y.dtype == torch.bfloat16
    assert (y.double() - fft_convolution(narrow.double(), taps)).abs().max() <= 2**-8 * size


@pytest.mark.parametrize(("length", "pieces"), [(1024, [1024]), (1000, [512, 256, 128, 64]), (63, [])])
def test_a_prompt_is_done_in_the_largest_pieces(monkeypatch, length, pieces):
    sizes: list[int] = []
    monkeypatch.setattr(
        online_conv, "fft_convolution", lambda u, *a: sizes.append(u.shape[1]) or fft_convolution(u, *a)
    )
    by_pieces(randn(1, length, CHANNELS), randn(1, 1024, seed=1), [])
    assert sizes == pieces
