"""What ``torch.save`` wrote comes back bit for bit, whole or by rows, from one file or from parts of it."""

import argparse
import collections
import io
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bits import random_bits, same_bits
from forged_archives import FLOATS, End, Entry, archive, entries, saved, state_dict, tensor, wide_sizes
from hypothesis import given
from hypothesis import strategies as st

from crocuta.checkpoints.torch_save import file as torch_file
from crocuta.checkpoints.torch_save.file import Opaque, open_torch, tensor_refs
from crocuta.checkpoints.torch_save.joined import JoinedFile
from crocuta.checkpoints.torch_save.names import DTYPES
from crocuta.errors import InputError, WeightsFormatError


def save(folder: Path, value: Any) -> Path:
    path = folder / "model.pt"
    torch.save(value, path)
    return path


def read_all(path: Path) -> list[torch.Tensor]:
    with open_torch(path) as file:
        return [file.read(ref) for ref in tensor_refs(file.tree)]


def views() -> dict[str, torch.Tensor]:
    base = random_bits((6, 5, 4), torch.float32)
    return {
        "whole": base,
        "transposed": base.transpose(0, 2),
        "permuted": base.permute(1, 2, 0),
        "offset": base[2:],
        "stepped": base[:, ::2],
        "column": base[:, 3, 1],
        "row": base[4],
        "scalar": base[1, 2, 3],
        "empty": base[:, :0],
        "flat": base.view(-1),
        "channels_last": random_bits((2, 3, 4, 5), torch.bfloat16).to(memory_format=torch.channels_last),
        "one wide": base[:1].transpose(0, 1),
    }


# --- whole tensors ---


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_dtype_comes_back(tmp_path, dtype):
    tensors = [random_bits(shape, dtype) for shape in ((), (0,), (1,), (3, 0, 2), (2, 3, 4), (17,))]
    for found, expected in zip(read_all(save(tmp_path, tensors))[::-1], tensors, strict=True):
        assert same_bits(found, expected)
        assert found.is_contiguous()


@pytest.mark.parametrize("chunk", [1, 40, 10**6])
def test_every_view_comes_back_contiguous(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(torch_file, "_CHUNK_BYTES", chunk)
    tensors = views()
    with open_torch(save(tmp_path, tensors)) as file:
        assert len({ref.key for ref in tensor_refs(file.tree)}) == 2  # one storage, but for channels_last
        for name, expected in tensors.items():
            found = file.read(file.tree[name])
            assert same_bits(found, expected), name
            assert found.is_contiguous(), name


places = st.none() | st.integers(-8, 8)


@given(st.sampled_from(sorted(views())), places, places)
def test_rows_are_those_of_the_whole(tmp_path_factory, name, begin, end):
    tensors = views()
    if not tensors[name].ndim:
        return
    with open_torch(save(tmp_path_factory.mktemp("rows"), tensors)) as file:
        assert same_bits(file.read(file.tree[name], slice(begin, end)), tensors[name][begin:end])


@pytest.fixture
def filled(monkeypatch):
    """How many bytes each reading of a file took."""
    filled: list[int] = []
    fill = JoinedFile.fill

    def counted(self: JoinedFile, view: memoryview, offset: int, what: str) -> None:
        filled.append(len(view))
        fill(self, view, offset, what)

    monkeypatch.setattr(JoinedFile, "fill", counted)
    return filled


def test_rows_are_read_without_the_rest(tmp_path, filled):
    with open_torch(save(tmp_path, {"w": torch.arange(80_000.0).view(1000, 80)})) as file:
        del filled[:]
        assert torch.equal(file.read(file.tree["w"], slice(500, 502)), torch.arange(40_000.0, 40_160).view(2, 80))
    assert sum(filled) < 2 * 80 * 4 + 200


def test_other_strides_are_read_once_and_in_pieces(tmp_path, filled, monkeypatch):
    monkeypatch.setattr(torch_file, "_CHUNK_BYTES", 6400)
    base = torch.arange(80_000.0).view(1000, 80)
    tensors = {"w": base.t(), "v": base[:, 3], "empty": base[:, :0]}
    with open_torch(save(tmp_path, tensors)) as file:
        for name, expected in tensors.items():
            del filled[:]
            assert torch.equal(file.read(file.tree[name]), expected)
            assert max(filled) <= 6400
            assert sum(filled) <= (4 * 80_000 if expected.numel() else 0) + 200


@pytest.mark.parametrize(("shape", "rows"), [((), slice(0, 1)), ((4,), slice(0, 4, 2)), ((4,), slice(None, None, -1))])
def test_rows_that_there_are_not(tmp_path, shape, rows):
    with open_torch(save(tmp_path, torch.zeros(shape))) as file, pytest.raises(InputError, match="rows of a tensor"):
        file.read(file.tree, rows)


@given(st.lists(st.integers(0, 3000), max_size=6).map(sorted))
def test_parts_are_one_file(tmp_path_factory, cuts):
    folder = tmp_path_factory.mktemp("parts")
    tensors = {"a": random_bits((20, 30), torch.bfloat16), "b": random_bits((7,), torch.float64)}
    data = save(folder, tensors).read_bytes()
    paths = []
    for index, (begin, end) in enumerate(zip([0, *cuts], [*cuts, len(data)])):
        paths.append(folder / f"model.pt.part{index}")
        paths[-1].write_bytes(data[begin:end])
    with open_torch(paths) as file:
        assert all(same_bits(file.read(file.tree[name]), expected) for name, expected in tensors.items())


def test_parts_that_lack_one_or_are_in_another_order_are_refused(tmp_path):
    data = save(tmp_path, torch.arange(5000)).read_bytes()
    paths = [tmp_path / f"part{index}" for index in range(3)]
    for index, path in enumerate(paths):
        path.write_bytes(data[index * 15_000 : (index + 1) * 15_000])
    assert len(data) > 30_000
    for wrong in (paths[:2], paths[1:], [paths[1], paths[0], paths[2]], [paths[0], paths[2]], [*paths, paths[2]]):
        with pytest.raises(WeightsFormatError):
            open_torch(wrong)


# --- what lies around them ---


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Linear(3, 4)
        self.head = torch.nn.Linear(3, 4, bias=False)
        self.head.weight = self.body.weight


def test_a_module_s_state_dict_with_tied_weights(tmp_path):
    state = Net().state_dict()
    assert isinstance(state, collections.OrderedDict)
    assert hasattr(state, "_metadata")
    with open_torch(save(tmp_path, state)) as file:
        assert list(file.tree) == list(state)
        assert file.tree["body.weight"].key == file.tree["head.weight"].key
        assert all(same_bits(file.read(file.tree[name]), state[name]) for name in state)


def test_parameters_and_tensors_with_attributes_are_tensors(tmp_path):
    marked, parameter = torch.ones(2), torch.nn.Parameter(torch.zeros(3))
    marked.note = "kept by pickle, not by us"  # type: ignore[attr-defined]
    odd = torch.nn.Parameter(torch.ones(1))
    odd.sparse = True  # type: ignore[attr-defined]
    with open_torch(save(tmp_path, [marked, parameter, odd])) as file:
        assert [ref.shape for ref in file.tree] == [(2,), (3,), (1,)]


def test_a_training_checkpoint(tmp_path):
    """As Lightning writes: weights beside optimizer, loops, hyperparameters of any class."""
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters())
    net.body(torch.ones(3)).sum().backward()
    optimizer.step()
    value = {
        "epoch": 3,
        "state_dict": net.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [],
        "hyper_parameters": {"config": argparse.Namespace(lr=1e-3), "path": Path("a/b"), "betas": (0.9, 0.999)},
        "rng": {"torch": torch.get_rng_state(), "python": random.getstate()},
        "counts": collections.defaultdict(int, a=1),
        "_extra_state": io.BytesIO(b"bytes"),
    }
    with open_torch(save(tmp_path, value)) as file:
        tree = file.tree
        assert (tree["epoch"], tree["counts"], tree["_extra_state"]) == (3, {"a": 1}, b"bytes")
        assert isinstance(tree["hyper_parameters"]["config"], Opaque)
        assert tree["hyper_parameters"]["betas"] == (0.9, 0.999)
        assert tree["rng"]["python"] == random.getstate()
        assert set(tree["optimizer_states"][0]["state"]) == {0, 1}
        exponential = optimizer.state_dict()["state"][1]["exp_avg_sq"]
        assert same_bits(file.read(tree["optimizer_states"][0]["state"][1]["exp_avg_sq"]), exponential)


def test_values_do_not_follow_the_file_and_changes_are_noticed(tmp_path):
    path = save(tmp_path, {"x": torch.ones(5000), "y": torch.ones(5000)})
    with open_torch(path) as file:
        values = file.read(file.tree["x"])
        os.utime(path, ns=(0, 1))
        with pytest.raises(WeightsFormatError, match=r"model.pt: the file changed while"):
            file.read(file.tree["y"])
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(values, torch.ones(5000))


def test_files_are_closed(tmp_path):
    good, bad = save(tmp_path, torch.ones(1)), tmp_path / "bad"
    bad.write_bytes(good.read_bytes()[:-1])
    before = len(list(Path("/proc/self/fd").iterdir()))
    with open_torch(good):
        pass
    with pytest.raises(WeightsFormatError) as caught:
        open_torch(bad)
    assert caught.tb  # and with it everything that was open
    assert len(list(Path("/proc/self/fd").iterdir())) == before


# --- archives ---


def flipped(data: bytes, part: bytes) -> bytes:
    """One bit changed in the middle of ``part``."""
    place = data.index(part) + len(part) // 2
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def test_one_flipped_bit_is_noticed_where_the_whole_is_read(tmp_path):
    values = random_bits((100, 10), torch.int32)
    path = save(tmp_path, {"w": values})
    good = path.read_bytes()
    path.write_bytes(flipped(good, values.numpy().tobytes()))
    with open_torch(path) as file:
        with pytest.raises(WeightsFormatError, match="record 'data/0' does not have the checksum"):
            file.read(file.tree["w"])
        assert same_bits(file.read(file.tree["w"], slice(0, 10)), values[:10])  # the checksum is that of the whole
    path.write_bytes(flipped(good, b"_rebuild_tensor_v2"))
    with pytest.raises(WeightsFormatError, match=r"record 'data.pkl' does not have the checksum"):
        open_torch(path)


def test_archives_without_checksums_are_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        path = save(tmp_path, {"w": torch.ones(3)})
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(read_all(path)[0], torch.ones(3))


@pytest.mark.parametrize("wide", [True, False])
def test_ends_of_both_widths_are_read(tmp_path, wide):
    path = tmp_path / "x"
    path.write_bytes(archive(entries(state_dict(tensor()), [FLOATS]), End(wide=wide)))
    assert torch.equal(read_all(path)[0], torch.zeros(4))


def test_an_archive_of_the_first_versions_is_read(tmp_path):
    """Without a byte order, which was then always that of the machine, and with sizes in every header."""
    path = tmp_path / "x"
    records = [entry for entry in entries(state_dict(tensor()), [FLOATS]) if not entry.name.endswith("byteorder")]
    path.write_bytes(archive(records))
    assert torch.equal(read_all(path)[0], torch.zeros(4))


def test_sizes_in_the_extra_field_of_a_header_are_read(tmp_path):
    path = tmp_path / "x"
    records = entries(state_dict(tensor()), [FLOATS])
    wide = [
        replace(e, local_size=0xFFFFFFFF, local_extra=b"FB\2\0ab" + wide_sizes(*[len(e.data)] * 2)) for e in records
    ]
    path.write_bytes(archive(wide))
    assert torch.equal(read_all(path)[0], torch.zeros(4))


@pytest.mark.parametrize("version", [b"0\n", b"11\n", b"x", b"", b"-1\n"])
def test_other_versions_are_refused(tmp_path, version):
    path = tmp_path / "x"
    records = [entry for entry in entries(state_dict()) if not entry.name.endswith("version")]
    path.write_bytes(archive([*records, Entry("archive/version", version)]))
    with pytest.raises(WeightsFormatError, match="version of the archive"):
        open_torch(path)


def test_records_beyond_four_gigabytes_are_read(tmp_path):
    """A file with holes: 5 GiB to read, a few kilobytes on the disk."""
    with open(tmp_path / "hole", "wb") as file:
        file.truncate(5 << 30)
    big = torch.from_file(str(tmp_path / "hole"), shared=True, size=5 << 30, dtype=torch.uint8)
    with torch.serialization.skip_data():
        path = save(tmp_path, {"a": torch.ones(3), "big": big, "c": torch.ones(4)})
    with open_torch(path) as opened:
        assert opened.tree["big"].shape == (5 << 30,)
        place = opened._archive.locate("data/2")
    assert place > 5 << 30
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(torch.arange(4.0).numpy().tobytes())
    with open_torch(path) as opened:
        assert torch.equal(opened.read(opened.tree["c"]), torch.arange(4.0))
        assert torch.equal(opened.read(opened.tree["big"], slice(-3, None)), torch.zeros(3, dtype=torch.uint8))


def test_other_alignments_are_read(tmp_path):
    torch.utils.serialization.config.save.storage_alignment = 4096
    try:
        path = save(tmp_path, {"w": torch.ones(3), "v": torch.ones(2)})
    finally:
        torch.utils.serialization.config.save.storage_alignment = 64
    assert {tuple(t.shape) for t in read_all(path)} == {(3,), (2,)}


@pytest.mark.parametrize("rows", [None, slice(0, 2)])
def test_booleans_are_zero_or_one(tmp_path, rows):
    path = tmp_path / "x"
    path.write_bytes(saved(state_dict(tensor(storage="torch.BoolStorage")), [b"\0\2\1\0"]))
    with open_torch(path) as file, pytest.raises(WeightsFormatError, match="holds bytes other than 0 and 1"):
        file.read(file.tree["w0"], rows)


def test_tensors_may_share_memory_but_not_multiply_it(tmp_path):
    values = torch.zeros(3 << 20)  # 12 MiB
    tied = {"embed": values, "unembed": values, "view": values[5:]}
    assert len(read_all(save(tmp_path, tied))) == 3
    many = {f"layer{index}": values for index in range(4)}
    with pytest.raises(WeightsFormatError, match="many tensors share the same memory"):
        open_torch(save(tmp_path, many))
    small = {f"layer{index}": values[:1000] for index in range(100)}
    assert len(read_all(save(tmp_path, small))) == 100
