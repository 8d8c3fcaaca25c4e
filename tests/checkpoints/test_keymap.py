"""Layouts against the literal words of the published code, and their inverses."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crocuta.checkpoints.families.evo2_layout import Layout2
from crocuta.checkpoints.families.stripedhyena import Layout1
from crocuta.checkpoints.files import TensorInfo
from crocuta.checkpoints.keymap import Entry, Flip, KeyMap, Layout, Padded, Regroup, Squeeze, SwapGates
from crocuta.errors import WeightsFormatError

CHANNELS, HEADS = 12, 3


def through(layouts: tuple[Layout, ...], tensor: torch.Tensor) -> torch.Tensor:
    return Entry("ours", "theirs", layouts).load(tensor)


def published_split(
    z: torch.Tensor, *, interleave: bool, column_split: bool, flip: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x2, x1, v of z [b 3d l], in the steps of ``engine.py``."""
    if interleave:
        z = torch.cat([z[:, 0::3], z[:, 1::3], z[:, 2::3]], dim=1)
    if column_split:
        size = CHANNELS // HEADS
        heads = z.reshape(z.shape[0], HEADS, 3 * size, z.shape[2])
        x2, x1, v = heads[:, :, :size], heads[:, :, size : 2 * size], heads[:, :, 2 * size :]
        x2, x1, v = (x.reshape(z.shape[0], -1, z.shape[2]) for x in (x2, x1, v))
    else:
        x2, x1, v = z.split([CHANNELS] * 3, dim=1)
    return (x1, x2, v) if flip else (x2, x1, v)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("column_split", [False, True])
@pytest.mark.parametrize("interleave", [False, True])
def test_rows_of_projections(interleave, column_split, flip):
    weight, x = torch.randn(3 * CHANNELS, 5), torch.randn(2, 5, 7)
    expected = torch.cat(published_split(weight @ x, interleave=interleave, column_split=column_split, flip=flip), 1)
    heads = HEADS if column_split else None
    layouts = Layout2(interleaved=interleave, heads=heads, flipped=flip).rows(CHANNELS)
    assert torch.equal(through(layouts, weight) @ x, expected)
    if not interleave and not flip:
        assert torch.equal(through(Layout1(heads=heads).rows(), weight) @ x, expected)


def test_rows_of_wqkv_per_head():
    weight = torch.randn(3 * CHANNELS, 5)
    size = CHANNELS // HEADS
    heads = weight.view(HEADS, 3, size, 5)
    expected = torch.cat([heads[:, part].reshape(-1, 5) for part in range(3)])
    assert torch.equal(through((Regroup(HEADS, 3),), weight), expected)


def test_padding_is_taken_off_and_put_back():
    weight = torch.cat([torch.randn(6, 4), torch.zeros(3, 4)])
    entry = Entry("ours", "theirs", (Padded(0, 6, 9),))
    assert entry.load(weight).shape == (6, 4)
    assert torch.equal(entry.store(entry.load(weight)), weight)


LAYOUTS = st.lists(
    st.sampled_from([Regroup(3, 3), Regroup(2, 9), Regroup(18, 1), SwapGates(), Flip(), Padded(0, 9, 18)]), max_size=4
)


@given(LAYOUTS, st.integers(0, 2**31))
def test_every_chain_is_undone_by_its_inverse(chain, seed):
    padding = [layout for layout in chain if isinstance(layout, Padded)]
    chain = [layout for layout in chain if not isinstance(layout, Padded)] + padding[:1]
    tensor = torch.randn(18, 1, 4, generator=torch.Generator().manual_seed(seed))
    if padding:
        entry = Entry("ours", "theirs", (*chain[:-1],))
        tensor = entry.store(torch.cat([entry.load(tensor)[:9], torch.zeros(9, 1, 4)]))
    entry = Entry("ours", "theirs", (Squeeze(1), *chain))
    assert torch.equal(entry.store(entry.load(tensor)), tensor)
    assert entry.store(torch.empty(entry.load(tensor).shape, device="meta")).shape == tensor.shape


# --- what is checked before anything is read ---

WANTED = {"a": TensorInfo(torch.bfloat16, (6, 2)), "b": TensorInfo(torch.float32, (4,))}
KEYS = KeyMap(
    entries=(Entry("a", "x.a", (Regroup(2, 3),)), Entry("b", "x.b", (), wide=True)),
    copies={"x.again": "x.a"},
    junk=(r".*\.junk",),
    explained_by={r"x\.a.*": "field_a", r"x\.b": "field_b"},
)
FOUND = {"x.a": TensorInfo(torch.float32, (6, 2)), "x.b": TensorInfo(torch.bfloat16, (4,))}


def refusal(found: dict[str, TensorInfo]) -> str:
    with pytest.raises(WeightsFormatError) as caught:
        KEYS.check("here", found, WANTED)
    return str(caught.value)


def test_what_may_be_absent_or_present():
    KEYS.check("here", FOUND, WANTED)
    KEYS.check("here", {**FOUND, "x.again": FOUND["x.a"], "any.junk": TensorInfo(torch.uint8, (1,))}, WANTED)


def test_problems_are_named_with_the_fields_that_explain_them():
    text = refusal({"x.b": FOUND["x.b"], "x.axe": FOUND["x.a"]})
    assert "1 missing: x.a." in text
    assert "1 unexpected: x.axe" in text
    assert "field_a" in text
    assert "field_b" not in text
    text = refusal({**FOUND, "x.b": TensorInfo(torch.bfloat16, (5,))})
    assert "1 misshapen: x.b has shape [5], expected [4]" in text
    assert "field_b" in text
    assert "1 misshapen: x.again" in refusal({**FOUND, "x.again": TensorInfo(torch.float32, (2, 6))})
    assert "x.b is torch.float8_e4m3fn" in refusal({**FOUND, "x.b": TensorInfo(torch.float8_e4m3fn, (4,))})
    assert "x.b is torch.int32" in refusal({**FOUND, "x.b": TensorInfo(torch.int32, (4,))})


def test_shapes_are_found_without_torchs_compiler():
    """On meta tensors some operations import it, which takes a second of every load."""
    code = (
        "import sys, torch\n"
        "from crocuta.checkpoints.keymap import Entry, Flip, Padded, Regroup, Squeeze, SwapGates\n"
        "layouts = (Squeeze(1), Flip(), Regroup(2, 3), SwapGates(), Padded(0, 4, 6))\n"
        "assert Entry('a', 'b', layouts).store(torch.empty(4, 2, device='meta')).shape == (6, 1, 2)\n"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
