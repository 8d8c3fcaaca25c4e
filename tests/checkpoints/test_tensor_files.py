"""Tensor files keep every bit, read into memory of their own, and refuse whatever is not sound."""

import json
import os
import random
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from crocuta.checkpoints.files import DTYPES, MAX_TENSORS, open_tensors, read_tensors, write_tensors
from crocuta.checkpoints.strict import MAX_JSON_BYTES
from crocuta.errors import InputError, WeightsFormatError

shapes = st.lists(st.integers(0, 4), max_size=8)


def random_bits(shape: list[int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Every bit pattern: NaNs with payloads, infinities, subnormals."""
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    numbers = torch.randint(0, 256, [*shape, dtype.itemsize], dtype=torch.uint8, generator=generator)
    return numbers.view(dtype).reshape(shape)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert bits(found[name]) == bits(tensor)


@given(st.lists(st.tuples(shapes, st.sampled_from(list(DTYPES.values()))), max_size=6), st.integers(0, 1000))
def test_every_dtype_and_shape_comes_back_bit_for_bit(tmp_path_factory, kinds, seed):
    path = tmp_path_factory.mktemp("files") / "t.safetensors"
    tensors = {f"t{i}.x_{i}": random_bits(shape, dtype, seed + i) for i, (shape, dtype) in enumerate(kinds)}
    write_tensors(path, tensors)
    assert_same_bits(read_tensors(path), tensors)


def all_kinds() -> dict[str, torch.Tensor]:
    return {name: random_bits([3, 5], dtype, 7) for name, dtype in DTYPES.items()}


def test_the_safetensors_package_reads_and_writes_the_same(tmp_path):
    tensors = all_kinds()
    write_tensors(tmp_path / "ours", tensors, {"format": "pt"})
    assert_same_bits(safetensors.torch.load_file(tmp_path / "ours"), tensors)
    safetensors.torch.save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    assert_same_bits(read_tensors(tmp_path / "theirs"), tensors)
    with open_tensors(tmp_path / "theirs") as file:
        assert file.metadata == {"format": "pt"}


def test_views_are_written_as_they_look(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "t": base.t(),
        "step": base[:, ::2],
        "expanded": torch.ones(1).expand(3),
        "p": torch.nn.Parameter(base),
    }
    write_tensors(tmp_path / "t", tensors)
    assert_same_bits(read_tensors(tmp_path / "t"), {name: t.detach() for name, t in tensors.items()})


def test_bytes_depend_only_on_the_contents(tmp_path):
    tensors = all_kinds()
    write_tensors(tmp_path / "a", tensors, {"x": "1", "y": "2"})
    (tmp_path / "b").write_bytes(b"something else")
    write_tensors(tmp_path / "b", dict(reversed(tensors.items())), {"y": "2", "x": "1"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_every_tensor_is_aligned_to_its_item(tmp_path):
    path = tmp_path / "t"
    write_tensors(path, {"a": torch.zeros(3, dtype=torch.int8), "b": torch.zeros(1), "c": torch.zeros(1).double()})
    length = struct.unpack("<Q", path.read_bytes()[:8])[0]
    header = json.loads(path.read_bytes()[8 : 8 + length])
    assert length % 8 == 0
    assert {name: entry["data_offsets"][0] for name, entry in header.items()} == {"c": 0, "b": 8, "a": 12}


def test_values_do_not_follow_the_file(tmp_path):
    path = tmp_path / "t"
    write_tensors(path, {"x": torch.ones(5000)})
    values = read_tensors(path)["x"]
    with open(path, "r+b") as file:
        file.write(b"\0" * os.path.getsize(path))
    os.truncate(path, 0)
    assert torch.equal(values, torch.ones(5000))


def test_a_file_replaced_by_another_is_still_read_and_one_written_to_is_refused(tmp_path):
    path = tmp_path / "t"
    write_tensors(path, {"x": torch.ones(5), "y": torch.ones(5)})
    with open_tensors(path) as file:
        write_tensors(path, {"x": torch.zeros(5), "y": torch.zeros(5)})  # by rename: the open one lives on
        assert torch.equal(file.read("x"), torch.ones(5))
    for change in (lambda: os.truncate(path, os.path.getsize(path) - 4), lambda: os.utime(path, ns=(0, 1))):
        write_tensors(path, {"x": torch.ones(5), "y": torch.ones(5)})
        with open_tensors(path) as file:
            file.read("x")
            change()
            with pytest.raises(WeightsFormatError, match=r"/t: the file changed while tensor 'y'"):
                file.read("y")


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"a/b": torch.ones(1)}, "tensor name"),
        ({"": torch.ones(1)}, "tensor name"),
        ({"a": torch.ones(1, dtype=torch.complex64)}, "complex64"),
        ({"a": torch.ones(1, device="meta")}, "meta"),
        ({"a": torch.ones([1] * 9)}, "9 dimensions"),
        ({"a": torch.ones(2).to_sparse()}, "sparse"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_before_writing(tensors, reason, tmp_path):
    with pytest.raises(InputError, match=reason):
        write_tensors(tmp_path / "t", tensors)
    assert os.listdir(tmp_path) == []


# --- unsound files ---


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: object = "F32", shape: object = (1,), begin: object = 0, end: object = 4, **more: object) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end], **more}


FOUR = b"\0" * 4
UNSOUND = {
    "empty file": (b"", "too short"),
    "seven bytes": (b"\0" * 7, "too short"),
    "no header": (struct.pack("<Q", 0) + FOUR, "header length"),
    "header longer than the file": (raw({}, length=1 << 20), "header length"),
    "header of 2^63 bytes": (raw({}, length=1 << 63), "header length"),
    "header over the limit": (
        raw({}, b" " * (MAX_JSON_BYTES + 9), length=MAX_JSON_BYTES + 1),
        "header length",
    ),
    "not JSON": (raw(b"{x}"), "bad safetensors header"),
    "not UTF-8": (raw(b'{"\xff": 1}'), "utf-8"),
    "UTF-16": (raw('{"a": 1}'.encode("utf-16")), "utf-8"),
    "not an object": (raw([1, 2]), "not a JSON object"),
    "deep nesting": (raw(b"[" * 100_000 + b"]" * 100_000), "nested too deeply"),
    "million objects": (raw(b'{"a":[' + b"{}," * 1_000_000 + b"{}]}"), "more than"),
    "NaN": (raw(b'{"a": NaN}'), "NaN is not JSON"),
    "integer of 5000 digits": (raw(b'{"a": ' + b"9" * 5000 + b"}"), "bad safetensors header"),
    "duplicate name": (
        raw(b'{"a":' + json.dumps(entry()).encode() + b',"a":' + json.dumps(entry()).encode() + b"}", FOUR),
        "duplicate key 'a'",
    ),
    "duplicate field": (raw(b'{"a":{"dtype":"F32","dtype":"F32"}}'), "duplicate key 'dtype'"),
    "name that leaves the folder": (raw({"../a": entry()}, FOUR), "tensor name '../a'"),
    "name with a newline": (raw({"a\n": entry()}, FOUR), "tensor name"),
    "name too long": (raw({"a" * 257: entry()}, FOUR), "tensor name"),
    "name that is a lone surrogate": (raw(b'{"\\ud800": 1}', FOUR), "tensor name"),
    "unknown dtype": (raw({"a": entry("C64")}, FOUR), "dtype 'C64'"),
    "dtype of another type": (raw({"a": entry(["F32"])}, FOUR), "dtype"),
    "missing field": (raw({"a": {"dtype": "F32", "shape": [1]}}, FOUR), "nothing else"),
    "further field": (raw({"a": entry(strides=[0])}, FOUR), "nothing else"),
    "entry that is a list": (raw({"a": [1]}, FOUR), "nothing else"),
    "nine dimensions": (raw({"a": entry(shape=[1] * 9)}, FOUR), "impossible shape"),
    "negative dimension": (raw({"a": entry(shape=[-1, -1])}, FOUR), "impossible shape"),
    "dimension that is true": (raw({"a": entry(shape=[True])}, FOUR), "impossible shape"),
    "dimension that is a float": (raw({"a": entry(shape=[1.0])}, FOUR), "impossible shape"),
    "huge dimensions around zero": (
        raw({"a": entry(shape=[0, 1 << 40, 1 << 40], end=0)}),
        "impossible shape",
    ),
    "shape that is text": (raw({"a": entry(shape="1")}, FOUR), "impossible shape"),
    "offsets too small": (raw({"a": entry(shape=[2])}, FOUR), "do not fit"),
    "offsets reversed": (raw({"a": entry(begin=4, end=0)}, FOUR), "do not fit"),
    "offsets negative": (raw({"a": entry(begin=-4, end=0)}, FOUR), "do not fit"),
    "product that overflows 64 bits": (raw({"a": entry(shape=[1 << 32, 1 << 32])}, FOUR), "impossible shape"),
    "data beyond the end": (raw({"a": entry(shape=[2], end=8)}, FOUR), "take 8 bytes, the file holds 4"),
    "bytes that belong to nobody": (raw({"a": entry()}, FOUR * 2), "take 4 bytes, the file holds 8"),
    "hole": (raw({"a": entry(), "b": entry(begin=8, end=12)}, FOUR * 3), "'b' starts at byte 8"),
    "overlap": (raw({"a": entry(), "b": entry()}, FOUR), "'b' starts at byte 0"),
    "BOOL of 2": (raw({"a": entry("BOOL", end=1)}, b"\2"), "other than 0 and 1"),
    "metadata that is no object": (raw({"__metadata__": 1}), "__metadata__"),
    "metadata that is no text": (raw({"__metadata__": {"a": 1}}), "__metadata__"),
    "a pickle": (b"\x80\x04\x95" + b"\0" * 100, "header length"),
}


@pytest.mark.parametrize("name", UNSOUND)
def test_an_unsound_file_is_refused_with_its_name_and_the_reason(name, tmp_path):
    data, reason = UNSOUND[name]
    (tmp_path / "bad.safetensors").write_bytes(data)
    with pytest.raises(WeightsFormatError, match=reason) as caught:
        read_tensors(tmp_path / "bad.safetensors")
    assert str(tmp_path / "bad.safetensors") in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_sound_file_of_the_same_making_is_read(tmp_path):
    (tmp_path / "good").write_bytes(raw({"a": entry(), "b": entry(shape=[], begin=4, end=8)}, FOUR * 2))
    assert_same_bits(read_tensors(tmp_path / "good"), {"a": torch.zeros(1), "b": torch.zeros(())})


def test_too_many_tensors_are_refused(tmp_path):
    header = {str(i): entry("U8", (0,), 0, 0) for i in range(MAX_TENSORS + 1)}
    (tmp_path / "many").write_bytes(raw(json.dumps(header, separators=(",", ":")).encode()))
    with pytest.raises(WeightsFormatError, match="more than 100000 tensors"):
        open_tensors(tmp_path / "many")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: None])
def test_what_is_not_a_file_is_refused_at_once(make, tmp_path):
    make(tmp_path / "odd")
    with pytest.raises(WeightsFormatError, match="odd"):
        read_tensors(tmp_path / "odd")


def mutate(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    position = rng.randrange(len(data)) if rng.random() < 0.2 else rng.randrange(min(len(data), 500))
    match rng.randrange(5):
        case 0:
            changed[position] ^= 1 << rng.randrange(8)
        case 1:
            changed[position] = rng.choice(b'0123456789[]{},:"-.eE\0\xff')
        case 2:
            del changed[position:]
        case 3:
            changed[position:position] = rng.choice([b"9" * 19, b"[", b"]", b"-1", b'"a":', b"\0" * 8])
        case 4:
            changed[:8] = struct.pack("<Q", rng.choice([0, 1, 2**63 - 1, 2**64 - 1, rng.randrange(600)]))
    return bytes(changed)


def test_2000_mutated_files_are_refused_or_read_in_bounds(tmp_path: Path):
    path, rng = tmp_path / "t", random.Random(3)
    write_tensors(path, {name: t for name, t in all_kinds().items() if name[0] in "FB"}, {"format": "pt"})
    sound = path.read_bytes()
    reasons = []
    for _ in range(2000):
        data = mutate(sound, rng)
        path.write_bytes(data)
        try:
            total = sum(tensor.nbytes for tensor in read_tensors(path).values())
            assert total <= len(data)
        except WeightsFormatError as error:
            reasons.append(str(error))
    assert len(reasons) > 1000
    assert all(str(path) in reason for reason in reasons)
