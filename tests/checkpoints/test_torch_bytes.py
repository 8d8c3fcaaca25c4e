"""Values pickled inside checkpoints, by every way that torch has had to write them, come back with real tensors."""

import io
import pickle
from typing import Any

import pytest
import torch
from bits import random_bits, same_bits

from crocuta.checkpoints.torch_save import file as torch_file
from crocuta.checkpoints.torch_save.file import parse_torch_bytes
from crocuta.errors import WeightsFormatError


def te_state() -> dict[str, Any]:
    """What Transformer Engine keeps beside a projection."""
    scale = random_bits((3,), torch.float32)
    return {
        "scale_fwd": scale,
        "amax_history_fwd": random_bits((16, 3), torch.float32),
        "view": scale[1:],
        "weights": torch.ones(2).to(torch.float8_e4m3fn),
        "empty": torch.empty(0),
        "extra_fp8_variables": {"num_gemms": 1, "fp8_max_fwd": 448.0},
    }


def written(value: Any, way: str | int) -> bytes:
    if isinstance(way, int):
        return pickle.dumps(value, way)
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=way == "archive")
    return file.getvalue()


WAYS = ["archive", "stream", 2, 3, 4, 5]


@pytest.mark.parametrize("way", WAYS)
def test_bytes_of_every_version_give_real_tensors(way):
    state = te_state()
    found = parse_torch_bytes(written(state, way))
    assert found.keys() == state.keys()
    assert found["extra_fp8_variables"] == state["extra_fp8_variables"]
    for name, expected in state.items():
        if isinstance(expected, torch.Tensor):
            assert same_bits(found[name], expected), name
    found["scale_fwd"].zero_()  # memory of its own


@pytest.mark.parametrize("way", WAYS)
def test_nothing_saved_is_nothing(way):
    assert parse_torch_bytes(written(None, way)) is None
    assert parse_torch_bytes(written([(), [torch.tensor(3)], {"a": ()}], way)) == [(), [torch.tensor(3)], {"a": ()}]


@pytest.mark.parametrize("way", WAYS)
def test_bytes_cut_anywhere_are_refused(way):
    data = written(te_state(), way)
    cuts = {*range(0, len(data), max(1, len(data) // 100)), len(data) - 1}
    for cut in cuts:
        with pytest.raises(WeightsFormatError, match=r"^blocks\.0(:| is| ends)"):
            parse_torch_bytes(data[:cut], where="blocks.0")


@pytest.mark.parametrize("way", ["stream", 3])
def test_streams_that_do_not_agree_with_themselves_are_refused(way):
    data = written({"w": torch.ones(4), "v": torch.zeros(2)}, way)
    ones = torch.ones(4).numpy().tobytes()
    length = (4).to_bytes(8, "little")
    changes = {
        "two sizes": data.replace(length + ones, (5).to_bytes(8, "little") + ones),
        "not the stream of a little-endian": data.replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89"),
        "not the stream of a little-endian machine": data.replace(b"\x80\x02M\xe9\x03.", b"\x80\x02M\xea\x03."),
    }
    for reason, changed in changes.items():
        assert changed != data
        with pytest.raises(WeightsFormatError, match=reason):
            parse_torch_bytes(changed)


def test_a_storage_of_two_sizes_is_refused():
    base = torch.ones(4)
    data = written([base[:2], base[2:]], "stream")
    assert data.count(b"K\x04N") == 2
    with pytest.raises(WeightsFormatError, match="has two types or sizes"):
        parse_torch_bytes(data.replace(b"K\x04N", b"K\x05N", 1))


def test_bytes_behind_a_stream_are_refused():
    with pytest.raises(WeightsFormatError, match="x: 3 bytes after the end"):
        parse_torch_bytes(written({"w": torch.ones(4)}, "stream") + b"abc", where="x")


def test_many_storages_are_refused(monkeypatch):
    monkeypatch.setattr(torch_file, "_MAX_BLOB_STORAGES", 3)
    tensors = [torch.ones(1) for _ in range(4)]
    assert len(parse_torch_bytes(written(tensors[:3], 4))) == 3
    with pytest.raises(WeightsFormatError, match="more than 3 storages"):
        parse_torch_bytes(written(tensors, 4))


def test_many_bytes_are_refused_before_they_are_looked_at():
    with pytest.raises(WeightsFormatError, match="x are too many: got 4194305"):
        parse_torch_bytes(bytes((4 << 20) + 1), where="x")


def test_booleans_in_memory_are_zero_or_one():
    data = written({"w": torch.tensor([True, False, True])}, "stream").replace(b"\1\0\1", b"\1\2\1")
    with pytest.raises(WeightsFormatError, match="booleans that are neither"):
        parse_torch_bytes(data)
