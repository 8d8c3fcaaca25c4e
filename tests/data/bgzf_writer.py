"""Writers of odd but real files, for the tests of the readers."""

import struct
import zlib

BGZF_EOF = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")


def bgzf_block(data: bytes) -> bytes:
    """One BGZF block (SAM specification, section 4.1)."""
    deflate = zlib.compressobj(6, zlib.DEFLATED, -15)
    body = deflate.compress(data) + deflate.flush()
    size = len(body) + 25
    header = struct.pack("<4BI2BH2B2H", 31, 139, 8, 4, 0, 0, 255, 6, 66, 67, 2, size)
    return header + body + struct.pack("<II", zlib.crc32(data), len(data))


def bgzf(data: bytes, block: int = 100) -> bytes:
    return b"".join(bgzf_block(data[i : i + block]) for i in range(0, len(data), block)) + BGZF_EOF
