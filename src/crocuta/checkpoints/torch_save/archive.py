"""The zip archive that ``torch.save`` writes: stored records only, every claim checked before anything is allocated.

A general zip reader guesses where archives are ambiguous; this one refuses. The directory must end exactly where the
file does, its parts must touch, records must lie apart from each other, and each record's own header must agree with
the directory.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from crocuta.checkpoints.torch_save.joined import ByteSource
from crocuta.errors import WeightsFormatError

MAX_RECORDS: Final = 100_000
MAX_DIRECTORY_BYTES: Final = 32 << 20
_MAX_NAME_BYTES = 512
_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
_END = struct.Struct("<4sHHHHIIH")
_END64 = struct.Struct("<4sQHHIIQQQQ")
_LOCATOR = struct.Struct("<4sIQI")
_WIDE, _FULL, _FULL16 = 0x0001, 0xFFFFFFFF, 0xFFFF
_SIZES_FOLLOW, _UTF8 = 0x0008, 0x0800


@dataclass(frozen=True, slots=True)
class Record:
    """One entry: ``size`` bytes somewhere after its own header at ``header``, and before ``limit``."""

    flags: int
    crc: int
    size: int
    header: int
    limit: int


class Archive:
    """The records of a ``torch.save`` archive, by their names without the one folder that all of them are in.

    Raises:
        WeightsFormatError: not such an archive, or one that is not sound in every detail.
    """

    def __init__(self, source: ByteSource):
        self._source = source
        begin, size, count = self._find_directory()
        self._top, self.records = self._read_directory(begin, size, count)

    def locate(self, name: str) -> int:
        """Where the bytes of a record begin, after its own header has been compared with the directory's."""
        record = self.records[name]
        header = _LOCAL.unpack(self._source.read_at(record.header, _LOCAL.size))
        signature, _, flags, method, _, _, crc, stored, size, name_length, extra_length = header
        if signature != b"PK\x03\x04" or flags != record.flags or method != 0:
            raise self.error(f"record {name!r} has a header that is not the directory's")
        begin = record.header + _LOCAL.size + name_length + extra_length
        if begin + record.size > record.limit or name_length > _MAX_NAME_BYTES:
            raise self.error(f"record {name!r} reaches into what comes after it")
        text = self._source.read_at(record.header + _LOCAL.size, name_length)
        if text != f"{self._top}/{name}".encode():
            raise self.error(f"record {name!r} has another name in its own header", given=ascii(text)[:80])
        # torch leaves the sizes out here, and says so in the flags; they are the directory's.
        if (crc, stored, size) == (0, 0, 0) and flags & _SIZES_FOLLOW:
            return begin
        if size == stored == _FULL:
            extra = self._source.read_at(begin - extra_length, extra_length)
            size, stored = _wide_values(extra, 2) or (size, stored)
        if (crc, stored, size) != (record.crc, record.size, record.size):
            raise self.error(f"record {name!r} has another size or checksum in its own header")
        return begin

    def read(self, name: str, limit: int) -> bytes:
        """All bytes of a record of at most ``limit`` bytes. Raises WeightsFormatError."""
        if name not in self.records:
            raise self.error(f"there is no record {name!r}", expected="a file that torch.save wrote")
        record = self.records[name]
        if record.size > limit:
            raise self.error(f"record {name!r} is too large", given=record.size, expected=f"at most {limit} bytes")
        return self._source.read_at(self.locate(name), record.size)

    def check(self, name: str, values: bytes | memoryview) -> None:
        """Compare the whole of a record with its checksum; 0 stands for none (torch can be told to write none)."""
        crc = self.records[name].crc
        if crc and crc != zlib.crc32(values):
            raise self.error(f"record {name!r} does not have the checksum it was written with", fix="get it again")

    def error(self, reason: str, **details: Any) -> WeightsFormatError:
        return WeightsFormatError(f"{self._source.name}: {reason}", **details)

    def _find_directory(self) -> tuple[int, int, int]:
        """Begin, bytes and number of entries of the central directory."""
        source = self._source
        end = source.size - _END.size
        if end < _LOCAL.size:
            raise self.error("too short for a torch.save archive", given=f"{source.size} bytes")
        signature, disk, directory_disk, here, count, size, begin, comment = _END.unpack(source.read_at(end, _END.size))
        if signature != b"PK\x05\x06" or comment:
            fix = "is the download complete? parts must be given in order"
            raise self.error("does not end as a torch.save archive does", fix=fix)
        given = [disk, directory_disk, here, count, size, begin]
        narrow_limits = [_FULL16] * 4 + [_FULL] * 2
        wide_at = end - _LOCATOR.size - _END64.size
        if wide_at >= 0 and (locator := source.read_at(end - _LOCATOR.size, _LOCATOR.size))[:4] == b"PK\x06\x07":
            _, locator_disk, wide_begin, disks = _LOCATOR.unpack(locator)
            wide = _END64.unpack(source.read_at(wide_at, _END64.size))
            if wide_begin != wide_at or (locator_disk, disks) != (0, 1):
                raise self.error("the end of the archive is not where it says")
            if wide[:2] != (b"PK\x06\x06", _END64.size - 12):
                raise self.error("the end of the archive is not one that torch.save writes")
            if any(a not in (b, min(b, limit)) for a, b, limit in zip(given, wide[4:], narrow_limits)):
                raise self.error("the two ends of the archive do not agree")
            given, end = list(wide[4:]), wide_at
        disk, directory_disk, here, count, size, begin = given
        if disk or directory_disk or here != count:
            raise self.error("an archive of several volumes")
        if not 1 <= count <= MAX_RECORDS:
            raise self.error("number of records", given=count, expected=f"1 to {MAX_RECORDS}")
        if begin + size != end or not count * _CENTRAL.size <= size <= MAX_DIRECTORY_BYTES:
            raise self.error("impossible directory", given=f"{count} entries, {size} bytes at {begin}, end at {end}")
        return begin, size, count

    def _read_directory(self, begin: int, size: int, count: int) -> tuple[str, dict[str, Record]]:
        try:
            entries = list(_entries(self._source.read_at(begin, size), count))
        except ValueError as error:
            raise self.error(f"bad directory: {error}") from error
        entries.sort(key=lambda entry: entry[1].header)
        top = entries[0][0].partition("/")[0]
        records: dict[str, Record] = {}
        limits = [*(record.header for _, record in entries[1:]), begin]
        for (name, record), limit in zip(entries, limits):
            folder, _, inner = name.partition("/")
            if folder != top or not inner or inner in records:
                raise self.error(f"record {ascii(name)[:80]} is there twice, or not in the folder of the others")
            # The record's own header is as long as its name at least; how long exactly, locate() finds out.
            if record.header + _LOCAL.size + len(name) + record.size > limit:
                raise self.error(f"record {ascii(name)[:80]} overlaps another, or lies outside the file")
            records[inner] = Record(record.flags, record.crc, record.size, record.header, limit)
        return top, records


def _entries(data: bytes, count: int) -> Iterator[tuple[str, Record]]:
    """Name and claims of every entry of a central directory. Raises ValueError with the reason."""
    place = 0
    for _ in range(count):
        if place + _CENTRAL.size > len(data):
            raise ValueError("it is cut off")
        fields = _CENTRAL.unpack_from(data, place)
        signature, _, _, flags, method, _, _, crc, stored, size, *lengths = fields[:13]
        disk, header = fields[13], fields[16]
        if signature != b"PK\x01\x02":
            raise ValueError("an entry does not begin as one")
        name_at = place + _CENTRAL.size
        extra_at = name_at + lengths[0]
        place = extra_at + lengths[1] + lengths[2]
        if place > len(data) or lengths[0] > _MAX_NAME_BYTES:
            raise ValueError("an entry is longer than the directory")
        name = _name(data[name_at:extra_at])
        if method != 0 or flags & ~(_SIZES_FOLLOW | _UTF8):
            raise ValueError(f"record {name!r} is compressed or encrypted, which torch.save never does")
        narrow = (size, stored, header)
        if _FULL in narrow:
            values = iter(_wide_values(data[extra_at : extra_at + lengths[1]], narrow.count(_FULL)))
            size, stored, header = (next(values, -1) if item == _FULL else item for item in narrow)
        if stored != size or min(size, header) < 0 or disk:
            raise ValueError(f"record {name!r} has no clear size, or lies in another volume")
        yield name, Record(flags, crc, size, header, 0)
    if place != len(data):
        raise ValueError(f"{len(data) - place} bytes too long")


def _name(text: bytes) -> str:
    name = text.decode()  # a UnicodeDecodeError is a ValueError
    if not name.isprintable() or "\\" in name or not {"", ".", ".."}.isdisjoint(name.split("/")):
        raise ValueError(f"record name {ascii(name)[:80]} is not one that torch.save writes")
    return name


def _wide_values(extra: bytes, count: int) -> list[int]:
    """The 64-bit numbers of the zip64 extra field; none if it does not hold ``count`` of them."""
    place = 0
    while place + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, place)
        if kind == _WIDE and length >= 8 * count and place + 4 + length <= len(extra):
            return list(struct.unpack_from(f"<{count}Q", extra, place + 4))
        place += 4 + length
    return []
