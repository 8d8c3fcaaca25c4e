"""forward(cat(a, b)) == cat(extend(a, s), extend(b, s)) for every way of cutting a sequence, for every kind of mixer.

200 random cuttings a kind and precision: the leaves of a random tree, whose branches go on from copies of one state.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator

import pytest
import torch
from kernel_paths import each_path
from tiny_models import KINDS, MAX_LENGTH, MODAL, random_ids, tiny_model

from crocuta.model.lm import Model
from crocuta.model.state import ModelState
from crocuta.ops.kernels.library import library, switched_off
from crocuta.ops.modal import BLOCK, SPAN

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4}
BRANCHES = (2, 2, 2, 5, 5)
"""Every cutting has at least six pieces; the product of these is the number of cuttings."""
BATCH = 2
WITH_KERNELS = (*MODAL, "implicit", "explicit", "explicit-fft")
"""Kinds of mixers that compiled kernels run, where there are some."""


def piece_sizes(draw: random.Random, position: int, room: int) -> list[int]:
    """One piece, or a few single tokens, or a piece that ends beside a block boundary; at most ``room`` tokens."""
    kind = draw.random()
    if kind < 0.3:
        return [1] * min(draw.randint(1, 4), room)
    if kind < 0.5:
        return [min(room, max(1, BLOCK - position % BLOCK + draw.randint(-1, 1)))]
    return [draw.randint(1, max(1, min(room, 25)))]


def cuttings(
    model: Model, ids: torch.Tensor, state: ModelState, done: list[torch.Tensor], draw: random.Random, depth: int = 0
) -> Iterator[torch.Tensor]:
    """Logits of whole sequences, each cut in its own way; ``done`` are those of the tokens that ``state`` has read."""
    position = sum(piece.shape[1] for piece in done)
    left = ids.shape[1] - position
    if depth == len(BRANCHES):
        yield torch.cat([*done, model.extend(ids[:, position:], state)], dim=1)
        return
    for _ in range(BRANCHES[depth]):
        room = left - (len(BRANCHES) - depth)  # at least one token for each piece to come
        branch, logits, start = state.copy(), list(done), position
        for size in piece_sizes(draw, position, max(1, room)):
            logits.append(model.extend(ids[:, start : start + size], branch))
            start += size
        yield from cuttings(model, ids, branch, logits, draw, depth + 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_cutting_gives_the_same_logits(kind, dtype):
    check_cuttings(kind, dtype)


@pytest.mark.skipif(library() is None, reason="the test before this one has done it")
@pytest.mark.parametrize("kind", WITH_KERNELS)
def test_every_cutting_gives_the_same_logits_without_compiled_kernels(kind):
    with switched_off():
        check_cuttings(kind, torch.float64)


@torch.no_grad()
def check_cuttings(kind: str, dtype: torch.dtype) -> None:
    draw = random.Random(f"{kind} {dtype}")
    model = tiny_model(kind, dtype, seed=1)
    ids = random_ids(BATCH, draw.randint(2 * BLOCK + 4, 90), seed=2)
    expected = model(ids)
    assert expected.dtype == dtype
    start = model.init_state(BATCH, ids.shape[1])
    count, worst = 0, 0.0
    for logits in cuttings(model, ids, start, [], draw):
        assert logits.shape == expected.shape
        assert logits.dtype == dtype
        worst = max(worst, float((logits - expected).abs().max()))
        count += 1
    assert count == 200
    assert worst <= TOLERANCE[dtype]
    assert start.lengths.tolist() == [0] * BATCH, "reading moved a state that was copied"


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_single_tokens_give_the_same_logits(kind):
    model = tiny_model(kind, torch.float64, seed=3)
    ids = random_ids(BATCH, BLOCK + 9, seed=4)
    state = model.init_state(BATCH, ids.shape[1])
    logits = torch.cat([model.extend(token, state) for token in ids.split(1, dim=1)], dim=1)
    torch.testing.assert_close(logits, model(ids), rtol=0, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("kind", MODAL)
@each_path
def test_cuttings_beyond_a_span_of_blocks(kind, dtype, path):
    """The scan of a modal filter takes a second kind of step every BLOCK · SPAN tokens."""
    with path():
        check_long_cuttings(kind, dtype)


def check_long_cuttings(kind: str, dtype: torch.dtype) -> None:
    draw = random.Random(kind)
    model = tiny_model(kind, dtype, seed=5)
    ids = random_ids(BATCH, 2 * BLOCK * SPAN + 77, seed=6)
    expected = model(ids)
    for _ in range(4):
        cuts = sorted(draw.sample(range(1, ids.shape[1]), 3))
        state = model.init_state(BATCH)
        pieces = torch.tensor_split(ids, torch.tensor(cuts), dim=1)
        logits = torch.cat([model.extend(piece, state) for piece in pieces], dim=1)
        torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE[dtype])


# --- what makes the law worth anything: parts that are loud, and states that matter ---


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_the_mixers_are_heard(kind):
    model = tiny_model(kind, torch.float64, seed=1)
    silent = copy.deepcopy(model)
    for block in silent.blocks:
        block.mixer.output.weight.zero_()
        if block.mixer.output.bias is not None:
            block.mixer.output.bias.zero_()
    ids = random_ids(BATCH, 80, seed=2)
    expected = model(ids)
    assert (silent(ids) - expected).abs().mean() > 0.15 * expected.std()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_forgetting_the_state_breaks_the_law(kind):
    """The control: a second piece that starts from nothing, and one that starts from the other row's state."""
    model = tiny_model(kind, torch.float64, seed=1)
    ids = random_ids(BATCH, 70, seed=2)
    expected = model(ids)[:, 40:]
    state = model.init_state(BATCH, MAX_LENGTH)
    model.extend(ids[:, :40], state)
    for wrong in (model.init_state(BATCH, MAX_LENGTH), state.select([1, 0])):
        assert (model.extend(ids[:, 40:], wrong) - expected).abs().max() > 0.05
