"""Files of ``torch.save`` (.pt, .bin, .ckpt; whole or in parts), read tensor by tensor, with nothing in them run.

The archive is checked by ``archive.py``, the pickle in it is read as data by ``unpickle.py``, and every tensor is
checked against the record that its values lie in, before anything is allocated for it. Values are read into memory of
their own. The checksum of the pickle is always compared, that of a tensor's record where the whole of it is read, which
costs less than reading it; torch itself compares none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from crocuta.checkpoints.torch_save.archive import Archive
from crocuta.checkpoints.torch_save.joined import ByteSource, JoinedFile, Memory
from crocuta.checkpoints.torch_save.names import Opaque, Storage, TensorRef, Toolbox, storage_of
from crocuta.checkpoints.torch_save.unpickle import MAX_PICKLE_BYTES, parse_pickle, parse_pickle_at
from crocuta.errors import InputError, WeightsFormatError

__all__ = ["Opaque", "Storage", "TensorRef", "TorchFile", "open_torch", "parse_torch_bytes"]

MAX_BLOB_BYTES: Final = 4 << 20
_MAX_BLOB_OPERATIONS, _MAX_BLOB_STORAGES = 20_000, 1_000
_SHARED_SLACK = 16 << 20
_CHUNK_BYTES = 8 << 20
_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_LEGACY_VERSION = 1001
_SAVE_AGAIN = "load it with torch.load(..., weights_only=True) and torch.save it again"


class TorchFile:
    """An open ``torch.save`` archive whose every claim has been checked; close it, or use ``with``.

    ``tree`` is the object that was saved, with a ``TensorRef`` for each tensor (see ``parse_pickle_at`` for the other
    types). Tensors that share memory in the file count wherever they are met, and may together be about twice as large
    as the file, so that reading all of them is safe.

    Raises:
        WeightsFormatError: not such an archive, or not sound; the message names the file and the reason.
    """

    def __init__(self, source: ByteSource):
        self._source = source
        _refuse_others(source)
        self._archive = Archive(source)
        self._check_records()
        pickle = self._archive.read("data.pkl", MAX_PICKLE_BYTES)
        self._archive.check("data.pkl", pickle)
        self.tree = parse_pickle(pickle, self._storage, where=f"{source.name}: data.pkl")
        self._check_total()

    def read(self, ref: TensorRef, rows: slice | None = None) -> Tensor:
        """The values of a tensor of this file, contiguous on the CPU; with ``rows`` only those along the first axis.

        Raises:
            InputError: ``rows`` of a tensor without axes, or with a step.
            WeightsFormatError: the file has changed, or the values are not what was written.
        """
        shape, offset = ref.shape, ref.offset
        if rows is not None:
            if not shape or rows.step not in (None, 1):
                raise InputError("rows of a tensor", given=f"{rows} of shape {list(shape)}", expected="a slice, step 1")
            begin, end, _ = rows.indices(shape[0])
            shape, offset = (max(0, end - begin), *shape[1:]), ref.offset + begin * ref.stride[0]
        record = f"data/{ref.key}"
        place = self._archive.locate(record) + offset * ref.dtype.itemsize
        values = torch.empty(math.prod(shape) * ref.dtype.itemsize, dtype=torch.uint8)
        if not _contiguous(shape, ref.stride):
            self._read_strided(values.view(ref.dtype).view(shape), ref.stride, place, record)
        elif len(values):
            self._source.fill(values.numpy().data, place, f"tensor {ref.key}")
            if len(values) == self._archive.records[record].size:
                self._archive.check(record, values.numpy().data)
        if ref.dtype is torch.bool and bool((values > 1).any()):
            raise self._archive.error(f"record {record!r} is of booleans and holds bytes other than 0 and 1")
        return values.view(ref.dtype).view(shape)

    def record(self, key: str) -> bytes:
        """The bytes of a whole storage. Raises WeightsFormatError."""
        name = f"data/{key}"
        data = self._archive.read(name, self._source.size)
        self._archive.check(name, data)
        return data

    def close(self) -> None:
        self._source.close()

    def __enter__(self) -> TorchFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_records(self) -> None:
        archive = self._archive
        if any(name == "constants.pkl" or name.startswith("code/") for name in archive.records):
            fix = "save model.state_dict() with torch.save"
            raise archive.error("a TorchScript program, not a file of weights", fix=fix)
        if "byteorder" in archive.records and (order := archive.read("byteorder", 16)) != b"little":
            raise archive.error("byte order", given=ascii(order)[1:], expected="'little'", fix=_SAVE_AGAIN)
        version = archive.read("version", 16).strip()
        if not version.isdigit() or not 1 <= int(version) <= 10:
            raise archive.error("version of the archive", given=ascii(version)[1:], expected="'1' to '10'")

    def _storage(self, identity: Any) -> Storage:
        storage = storage_of(identity)
        record = self._archive.records.get(f"data/{storage.key}")
        if record is None or record.size != storage.size:
            found = "none" if record is None else f"a record of {record.size}"
            raise ValueError(f"storage {ascii(storage.key)[:80]} of {storage.size} bytes has {found}")
        return storage

    def _check_total(self) -> None:
        stored = {key: 0 for key in self._archive.records}
        total = 0
        for ref in tensor_refs(self.tree):
            total += math.prod(ref.shape) * ref.dtype.itemsize
            stored[f"data/{ref.key}"] = ref.count * ref.dtype.itemsize
        if total > 2 * sum(stored.values()) + _SHARED_SLACK:
            given = f"{total} bytes of tensors in {sum(stored.values())} bytes"
            raise self._archive.error("many tensors share the same memory", given=given)

    def _read_strided(self, values: Tensor, stride: tuple[int, ...], place: int, record: str) -> None:
        """Fill ``values`` from a view with other strides, a part of its longest stride at a time."""
        size = values.element_size()
        axis = max((i for i, n in enumerate(values.shape) if n > 1), key=lambda i: stride[i])
        inner = 1 + sum((n - 1) * stride[i] for i, n in enumerate(values.shape) if i != axis)
        at_once = max(1, _CHUNK_BYTES // (stride[axis] * size))
        for begin in range(0, values.shape[axis], at_once):
            part = values.narrow(axis, begin, min(at_once, values.shape[axis] - begin))
            span = torch.empty(((part.shape[axis] - 1) * stride[axis] + inner) * size, dtype=torch.uint8)
            self._source.fill(span.numpy().data, place + begin * stride[axis] * size, f"record {record}")
            part.copy_(span.view(values.dtype).as_strided(part.shape, stride))


def open_torch(paths: Path | Sequence[Path]) -> TorchFile:
    """Open a ``torch.save`` file, or its parts in their order. Raises WeightsFormatError."""
    source = JoinedFile([paths] if isinstance(paths, Path) else paths)
    try:
        return TorchFile(source)
    except BaseException:
        source.close()
        raise


def tensor_refs(tree: Any) -> Iterator[TensorRef]:
    """Every tensor of a tree, as often as it is met."""
    waiting = [tree]
    while waiting:
        value = waiting.pop()
        if isinstance(value, TensorRef):
            yield value
        elif isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, list | tuple):
            waiting.extend(value)


def parse_torch_bytes(data: bytes, *, where: str = "the bytes") -> Any:
    """The value of at most 4 MiB that ``torch.save`` (of any version) or ``pickle.dumps`` wrote, with real tensors.

    Such bytes lie inside checkpoints of Transformer Engine, as its ``_extra_state``. Tensors that share memory there
    share it here.

    Raises:
        WeightsFormatError: broken, too large, or naming something that no weights file needs.
    """
    if len(data) > MAX_BLOB_BYTES:
        raise WeightsFormatError(f"{where} are too many", given=len(data), expected=f"at most {MAX_BLOB_BYTES}")
    if data.startswith(b"PK\x03\x04"):
        with TorchFile(Memory(data, where)) as file:
            stored = {ref.key: file.record(ref.key) for ref in tensor_refs(file.tree)}
            return _with_tensors(file.tree, stored, where)
    blob = _Blob()
    if data.startswith(_MAGIC):
        tree: Any = blob.parse_legacy(data, "", where)
    else:
        tree = parse_pickle(data, where=where, tools=Toolbox(len(data), blob.load, _MAX_BLOB_OPERATIONS))
    return _with_tensors(tree, blob.stored, where)


class _Blob:
    """Reader of the stream that ``torch.save`` wrote before it wrote archives, and still writes for one storage."""

    def __init__(self) -> None:
        self.stored: dict[str, bytes] = {}

    def load(self, data: bytes) -> Storage:
        """The storage that was saved as ``data``, known by a key of its own."""
        if len(self.stored) >= _MAX_BLOB_STORAGES:
            raise ValueError(f"more than {_MAX_BLOB_STORAGES} storages")
        storage = self.parse_legacy(data, f"{len(self.stored)}:", "a storage") if data.startswith(_MAGIC) else None
        if not isinstance(storage, Storage):
            raise ValueError("a storage is saved as something else")
        return storage

    def parse_legacy(self, data: bytes, prefix: str, where: str) -> Any:
        """The value of a stream: magic number, version, system, value, keys, then each storage with its length."""
        storages: dict[str, Storage] = {}

        def storage(identity: Any) -> Storage:
            found = storage_of(identity)
            found = Storage(found.dtype, prefix + found.key, found.size)
            if storages.setdefault(found.key, found) != found:
                raise ValueError(f"storage {ascii(found.key)[:80]} has two types or sizes")
            return found

        def parse(place: int, persistent: Callable[[Any], Storage] | None = None) -> tuple[Any, int]:
            tools = Toolbox(len(data), operations=_MAX_BLOB_OPERATIONS)
            return parse_pickle_at(data, place, persistent, where=where, tools=tools)

        version, place = parse(len(_MAGIC))
        system, place = parse(place)
        if version != _LEGACY_VERSION or not isinstance(system, dict) or system.get("little_endian") is not True:
            raise WeightsFormatError(f"{where}: not the stream of a little-endian machine", fix=_SAVE_AGAIN)
        value, place = parse(place, storage)
        keys, place = parse(place)
        order = [prefix + key for key in keys if type(key) is str] if isinstance(keys, list) else []
        if len(order) != len(storages) or set(order) != storages.keys():
            raise WeightsFormatError(f"{where}: the storages are not those of the tensors")
        for key in order:
            known = storages[key]
            item = 1 if known.dtype is None else known.dtype.itemsize
            end = place + 8 + known.size
            if end > len(data) or int.from_bytes(data[place : place + 8], "little") * item != known.size:
                raise WeightsFormatError(f"{where}: a storage is cut off, or has two sizes")
            self.stored[key] = data[place + 8 : end]
            place = end
        if place != len(data):
            raise WeightsFormatError(f"{where}: {len(data) - place} bytes after the end")
        return value


def _with_tensors(tree: Any, stored: dict[str, bytes], where: str) -> Any:
    """The tree with tensors, of memory of their own, in the place of references."""
    buffers = {key: torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8) for key, data in stored.items()}
    made: dict[int, Any] = {}

    def replaced(value: Any) -> Any:
        if isinstance(value, TensorRef):
            size = value.count * value.dtype.itemsize
            if value.dtype is torch.bool and bool((buffers[value.key][:size] > 1).any()):
                raise WeightsFormatError(f"{where}: booleans that are neither 0 nor 1")
            return buffers[value.key][:size].view(value.dtype).as_strided(value.shape, value.stride, value.offset)
        if not isinstance(value, dict | list | tuple):
            return value
        if id(value) not in made:
            if isinstance(value, dict):
                made[id(value)] = {key: replaced(item) for key, item in value.items()}
            else:
                made[id(value)] = type(value)(map(replaced, value))
        return made[id(value)]

    return replaced(tree)


def _contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    for length, step in reversed(list(zip(shape, stride))):
        if length > 1 and step != expected:
            return not all(shape)
        expected *= length
    return True


def _refuse_others(source: ByteSource) -> None:
    """Name other kinds of files by what they are."""
    start = source.read_at(0, min(source.size, 512))
    if start.startswith(b"PK\x03\x04"):
        return
    if start.startswith(_MAGIC):
        raise WeightsFormatError(f"{source.name}: saved as torch did before version 1.6", fix=_SAVE_AGAIN)
    if start[257:262] == b"ustar":
        raise WeightsFormatError(f"{source.name}: a tar file, as torch wrote in its first versions", fix=_SAVE_AGAIN)
    fix = "is the download complete? a small text file stands for one that git-lfs should fetch"
    raise WeightsFormatError(f"{source.name}: not a file of torch.save", expected="a zip archive", fix=fix)
