"""Safe reading and writing of tensor files (safetensors).

The header is checked against the file before anything is allocated, nothing in a file is ever executed, and
values are read into memory of their own, never mapped to a file that others could change. Writing goes
through ``commit.py``, so a file is replaced whole or not at all.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from crocuta.checkpoints.commit import commit_file
from crocuta.checkpoints.strict import MAX_JSON_BYTES, open_regular, strict_json
from crocuta.errors import InputError, WeightsFormatError

MAX_TENSORS: Final = 100_000
MAX_DIMS: Final = 8
DTYPES: Final[dict[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_NAME = re.compile(r"[A-Za-z0-9_.]{1,256}")


@dataclass(frozen=True)
class TensorInfo:
    """What a file says about a tensor before it is read."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class TensorFile:
    """An open safetensors file whose header has been checked; close it, or use ``with``.

    ``infos`` maps names, in file order, to dtype and shape; ``metadata`` is the file's own name -> text.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file = open_regular(path, WeightsFormatError)
        self._opened = self._stamp()
        try:
            self._spans, self.infos, self.metadata = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The values of tensor ``name``, or ``rows`` of its first axis, on the CPU.

        Raises WeightsFormatError if the file has changed.
        """
        info, (begin, end) = self.infos[name], self._spans[name]
        shape = info.shape
        if rows is not None:
            first, last, _ = rows.indices(shape[0])
            row = (end - begin) // max(1, shape[0])
            begin, end, shape = begin + first * row, begin + max(first, last) * row, (max(0, last - first), *shape[1:])
        values = torch.empty(end - begin, dtype=torch.uint8)
        self._fill(values.numpy().data, begin, f"tensor {name!r}")
        if info.dtype is torch.bool and bool((values > 1).any()):
            raise self._error(f"tensor {name!r} is BOOL and holds bytes other than 0 and 1")
        return values.view(info.dtype).reshape(shape)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _error(self, reason: str, **details: Any) -> WeightsFormatError:
        return WeightsFormatError(f"{self.path}: {reason}", **details)

    def _stamp(self) -> tuple[int, int]:
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns

    def _fill(self, view: memoryview, offset: int, what: str) -> None:
        try:
            self._file.seek(offset)
            while view and (count := self._file.readinto(view)):
                view = view[count:]
        except OSError as error:
            raise self._error(f"cannot read {what}", given=error.strerror) from error
        if view or self._stamp() != self._opened:
            raise self._error(f"the file changed while {what} was read", fix="load again when nobody writes to it")

    def _read_header(self) -> tuple[dict[str, tuple[int, int]], dict[str, TensorInfo], dict[str, str]]:
        size = self._opened[0]
        if size < 8:
            raise self._error("too short for a safetensors file", given=f"{size} bytes", expected="at least 8")
        prefix = bytearray(8)
        self._fill(memoryview(prefix), 0, "the header")
        length, limit = int.from_bytes(prefix, "little"), min(MAX_JSON_BYTES, size - 8)
        if not 2 <= length <= limit:
            raise self._error("impossible header length", given=length, expected=f"2 to {limit} in {size} bytes")
        text = bytearray(length)
        self._fill(memoryview(text), 8, "the header")
        try:
            entries, metadata = _parse_header(bytes(text), size - 8 - length)
        except ValueError as error:
            raise self._error(f"bad safetensors header: {error}") from error
        start = 8 + length
        spans = {name: (start + begin, start + end) for name, (_, (begin, end)) in entries.items()}
        return spans, {name: info for name, (info, _) in entries.items()}, metadata


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; in one pass without a temporary, as NaN outlives minimum and maximum."""
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    if tensor.element_size() == 1:  # torch has no comparison of float8
        tensor = tensor.float()
    return all(math.isfinite(bound) for bound in tensor.aminmax())


def open_tensors(path: Path) -> TensorFile:
    """Open a safetensors file for reading tensor by tensor. Raises WeightsFormatError."""
    return TensorFile(path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU. Raises WeightsFormatError naming file and reason."""
    with open_tensors(path) as file:
        return {name: file.read(name) for name in file.infos}


def _parse_header(text: bytes, data_size: int) -> tuple[dict[str, tuple[TensorInfo, tuple[int, int]]], dict[str, str]]:
    """Entries in file order, and the metadata, of a header; ValueError with the reason if it is not sound."""
    # Counted before parsing, so that a small file cannot become a huge tree of objects.
    if text.count(b"[") + text.count(b"{") > 3 * MAX_TENSORS + 2 or text.count(b",") > 12 * MAX_TENSORS:
        raise ValueError(f"more than {MAX_TENSORS} tensors")
    header = strict_json(text)
    if not isinstance(header, dict):
        raise ValueError("not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ must map names to text")
    if len(header) > MAX_TENSORS:
        raise ValueError(f"more than {MAX_TENSORS} tensors")
    entries = {name: _parse_entry(name, entry) for name, entry in header.items()}
    entries = dict(sorted(entries.items(), key=lambda item: item[1][1]))
    end = 0
    for name, (_, span) in entries.items():
        if span[0] != end:
            raise ValueError(f"tensor {name!r} starts at byte {span[0]}, the one before it ends at {end}")
        end = span[1]
    if end != data_size:
        raise ValueError(f"the tensors take {end} bytes, the file holds {data_size}")
    return entries, metadata


def _parse_entry(name: str, entry: Any) -> tuple[TensorInfo, tuple[int, int]]:
    if not _NAME.fullmatch(name):
        raise ValueError(f"tensor name {ascii(name)[:80]} is not {_NAME.pattern}")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r} must have dtype, shape and data_offsets, nothing else")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        given = ascii(entry["dtype"])[:40]
        raise ValueError(f"tensor {name!r} has dtype {given}, expected one of {', '.join(DTYPES)}")
    shape, span, dtype = entry["shape"], entry["data_offsets"], DTYPES[entry["dtype"]]
    if not _natural(shape) or len(shape) > MAX_DIMS or math.prod(max(size, 1) for size in shape) >= 1 << 60:
        raise ValueError(f"tensor {name!r} has an impossible shape {ascii(shape)[:80]}")
    if not _natural(span) or len(span) != 2 or span[1] - span[0] != math.prod(shape) * dtype.itemsize:
        given = ascii(span)[:80]
        raise ValueError(f"tensor {name!r}: data_offsets {given} do not fit {entry['dtype']} {shape}")
    return TensorInfo(dtype, tuple(shape)), (span[0], span[1])


def _natural(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


# --- writing ------------------------------------------------------------------------------------------------


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all; the bytes depend on nothing but the arguments.

    Tensors are laid out by descending item size, then by name, so that each is aligned for readers that map
    the file. At most one tensor at a time is copied to the CPU. An existing file is replaced.

    Raises:
        InputError: a name, dtype or layout that the format cannot hold.
        CheckpointError: the disk refused; the message gives needed and free bytes where space ran out.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in order:
        tensor = tensors[name]
        _check_writable(path, name, tensor)
        begin, end = end, end + tensor.numel() * tensor.element_size()
        shape, dtype = list(tensor.shape), _DTYPE_NAMES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_JSON_BYTES or len(order) > MAX_TENSORS:
        given, expected = f"{len(order)} tensors, {len(text)} bytes", f"<= {MAX_TENSORS}, <= {MAX_JSON_BYTES}"
        raise InputError(f"header too large for {path}", given=given, expected=expected)
    start = len(text).to_bytes(8, "little") + text

    def chunks() -> Iterator[memoryview]:
        yield memoryview(start)
        for name in order:
            yield _bytes_of(tensors[name])

    commit_file(path, chunks(), len(start) + end)


def _check_writable(path: Path, name: str, tensor: Tensor) -> None:
    if not _NAME.fullmatch(name):
        raise InputError(f"tensor name for {path}", given=ascii(name)[:80], expected=_NAME.pattern)
    if tensor.dtype not in _DTYPE_NAMES:
        raise InputError(f"tensor {name!r} for {path}", given=tensor.dtype, expected=", ".join(DTYPES))
    if tensor.is_meta or tensor.layout is not torch.strided or tensor.ndim > MAX_DIMS:
        given = f"{tensor.ndim} dimensions, {tensor.layout}, on {tensor.device}"
        raise InputError(f"tensor {name!r} for {path}", given=given, expected=f"values, <= {MAX_DIMS} dimensions")


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
