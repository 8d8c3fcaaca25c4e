"""Archives and pickles of ``torch.save``, written by hand: sound ones, and ones with any claim in them changed."""

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Entry:
    """A record, with each claim about it that a forger could change; None: the truth."""

    name: str
    data: bytes
    method: int = 0
    flags: int = 0x0800
    crc: int | None = None
    size: int | None = None
    header: int | None = None
    local_name: str | None = None
    local_size: int | None = None
    local_flags: int | None = None
    local_name_length: int | None = None
    local_extra: bytes = b""


@dataclass(frozen=True)
class End:
    """What the end of an archive claims, each with None for the truth; ``wide`` writes the 64-bit end as torch does."""

    count: int | None = None
    begin: int | None = None
    comment: bytes = b""
    comment_length: int | None = None
    wide: bool = True
    narrow_count: int | None = None
    locator: int | None = None
    disks: int = 1


def archive(entries: Sequence[Entry], end: End = End()) -> bytes:
    """A zip archive of stored records."""
    body, directory = bytearray(), bytearray()
    for entry in entries:
        header = len(body) if entry.header is None else entry.header
        crc = zlib.crc32(entry.data) if entry.crc is None else entry.crc
        size = len(entry.data) if entry.size is None else entry.size
        local_size = size if entry.local_size is None else entry.local_size
        local_flags = entry.flags if entry.local_flags is None else entry.local_flags
        local_name = (entry.name if entry.local_name is None else entry.local_name).encode()
        name = entry.name.encode()
        length = len(local_name) if entry.local_name_length is None else entry.local_name_length
        local = (0, local_flags, entry.method, 0, 0, crc, local_size, local_size, length, len(entry.local_extra))
        body += struct.pack("<4sHHHHHIIIHH", b"PK\3\4", *local) + local_name + entry.local_extra + entry.data
        central = (0, 0, entry.flags, entry.method, 0, 0, crc, size, size, len(name), 0, 0, 0, 0, 0, header)
        directory += struct.pack("<4sHHHHHHIIIHHHHHII", b"PK\1\2", *central) + name
    count = len(entries) if end.count is None else end.count
    begin = len(body) if end.begin is None else end.begin
    at = len(body) + len(directory)
    if end.wide:
        directory += struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 0, 0, 0, 0, count, count, len(directory), begin)
        directory += struct.pack("<4sIQI", b"PK\6\7", 0, at if end.locator is None else end.locator, end.disks)
    comment_length = len(end.comment) if end.comment_length is None else end.comment_length
    narrow = min(count, 0xFFFF) if end.narrow_count is None else end.narrow_count
    sizes = (0, 0, narrow, narrow, at - len(body), min(begin, 0xFFFFFFFF), comment_length)
    return bytes(body + directory + struct.pack("<4sHHHHIIH", b"PK\5\6", *sizes) + end.comment)


def wide_sizes(*sizes: int) -> bytes:
    """The extra field of a record whose sizes do not fit 32 bits."""
    return struct.pack(f"<HH{len(sizes)}Q", 1, 8 * len(sizes), *sizes)


def entries(data_pickle: bytes, storages: Sequence[bytes] = (), *, order: bytes = b"little") -> list[Entry]:
    """The records that torch.save writes."""
    names = {"data.pkl": data_pickle, "byteorder": order}
    names |= {f"data/{key}": data for key, data in enumerate(storages)} | {"version": b"3\n"}
    return [Entry(f"archive/{name}", data) for name, data in names.items()]


def saved(data_pickle: bytes, storages: Sequence[bytes] = (), **options: Any) -> bytes:
    return archive(entries(data_pickle, storages, **options))


# --- pickles by hand ---


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def shape(*sizes: int) -> bytes:
    return b"(" + b"".join(map(number, sizes)) + b"t"


def named(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def tensor(
    *, key: str = "0", count: int = 4, offset: int = 0, size: tuple[int, ...] = (4,), stride: tuple[int, ...] = (1,),
    storage: str = "torch.FloatStorage",
) -> bytes:  # fmt: skip
    """What torch.save writes for one float32 tensor."""
    identity = b"(" + text("storage") + named(storage) + text(key) + text("cpu") + number(count) + b"tQ"
    hooks = named("collections.OrderedDict") + b")R"
    rest = number(offset) + shape(*size) + shape(*stride) + b"\x89" + hooks
    return named("torch._utils._rebuild_tensor_v2") + b"(" + identity + rest + b"tR"


def state_dict(*values: bytes, protocol: int = 2) -> bytes:
    items = b"".join(text(f"w{index}") + value for index, value in enumerate(values))
    return b"\x80" + bytes([protocol]) + b"}(" + items + b"u."


FLOATS = bytes(16)
