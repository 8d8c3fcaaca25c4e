"""Compressed input: everything whole is read, everything cut, corrupt, padded or inflated is refused."""

import gzip
import lzma
import zlib

import pytest
from bgzf_writer import BGZF_EOF, bgzf
from hypothesis import given
from hypothesis import strategies as st

from crocuta.data import files
from crocuta.data.files import read_blocks, read_lines, replace_file
from crocuta.errors import InputError, SequenceFormatError

DATA = b"".join(b"line %d\n" % i for i in range(300))


def read(path, data, **options):
    path.write_bytes(data)
    return b"".join(read_blocks(path, **options))


def test_bgzf_of_the_tests_is_valid_gzip():
    assert gzip.decompress(bgzf(DATA)) == DATA


@pytest.mark.parametrize(
    ("name", "packed"),
    [
        ("plain.txt", DATA),
        ("one.gz", gzip.compress(DATA)),
        ("members.gz", gzip.compress(DATA[:100]) + gzip.compress(b"") + gzip.compress(DATA[100:])),
        ("blocks.bgz", bgzf(DATA)),
        ("blocks.gz", bgzf(DATA)),
        ("one.xz", lzma.compress(DATA)),
        ("streams.xz", lzma.compress(DATA[:100]) + lzma.compress(DATA[100:])),
        ("suffix-says-nothing", gzip.compress(DATA)),
    ],
)
@pytest.mark.parametrize("block", [1, 7, 1 << 17])
def test_whole_files_are_read_whatever_the_block_size(tmp_path, monkeypatch, name, packed, block):
    if block == 1 and name != "one.gz":
        block = 32  # the header of the first member must lie in the first block
    monkeypatch.setattr(files, "_BLOCK", max(block, 32))
    monkeypatch.setattr(files, "_OUTPUT_BLOCK", 3 * block)
    assert read(tmp_path / name, packed) == DATA


CUT = gzip.compress(DATA)
BAD_CRC = CUT[:-8] + bytes([CUT[-8] ^ 1]) + CUT[-7:]
BAD_SIZE = CUT[:-1] + bytes([CUT[-1] ^ 1])
BROKEN = {
    "cut.gz": (CUT[:-20], "ends early"),
    "cut-in-trailer.gz": (CUT[:-1], "ends early"),
    "cut-header.gz": (CUT[:5], "ends early"),
    "crc.gz": (BAD_CRC, "corrupt"),
    "size.gz": (BAD_SIZE, "corrupt"),
    "tail.gz": (CUT + b"more", "bytes after the end"),
    "zeros.gz": (CUT + bytes(512), "bytes after the end"),
    "half-member.gz": (CUT + CUT[:1], "ends early"),
    "no-gzip.gz": (DATA, "no gzip data"),
    "empty.gz": (b"", "no gzip data"),
    "no-eof.bgz": (bgzf(DATA).removesuffix(BGZF_EOF), "end-of-file block is missing"),
    "no-eof.gz": (bgzf(DATA).removesuffix(BGZF_EOF), "end-of-file block is missing"),
    "cut-block.bgz": (bgzf(DATA)[:-40], "ends early"),
    "plain-gzip.bgz": (CUT, "not in BGZF blocks"),
    "cut.xz": (lzma.compress(DATA)[:-9], "ends early"),
    "tail.xz": (lzma.compress(DATA) + b"more", "bytes after the end"),
    "no-xz.xz": (DATA, "no xz data"),
    "corrupt.xz": (lzma.compress(DATA)[:40] + b"\0\0\0\0" + lzma.compress(DATA)[44:], "corrupt"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_name_file_line_and_reason(tmp_path, name):
    packed, reason = BROKEN[name]
    with pytest.raises(SequenceFormatError, match=rf"{name}:\d+: .*{reason}"):
        read(tmp_path / name, packed)


def test_the_line_reached_is_named(tmp_path):
    with pytest.raises(SequenceFormatError, match=r"no-eof\.bgz:301: "):
        read(tmp_path / "no-eof.bgz", bgzf(DATA).removesuffix(BGZF_EOF))


@given(st.data())
def test_a_cut_anywhere_is_seen(tmp_path_factory, data):
    packed = data.draw(st.sampled_from([gzip.compress(DATA), bgzf(DATA), lzma.compress(DATA)]))
    cut = data.draw(st.integers(1, len(packed) - 1))
    path = tmp_path_factory.mktemp("cut") / "file"
    path.write_bytes(packed[:cut])
    magic = b"\x1f\x8b" if packed[0] == 0x1F else b"\xfd7zXZ\x00"
    if cut < len(magic):
        assert b"".join(read_blocks(path)) == packed[:cut]  # too short to be known as compressed
        return
    with pytest.raises(SequenceFormatError):
        list(read_blocks(path))


@pytest.mark.parametrize("compress", [gzip.compress, lzma.compress, bgzf])
def test_bombs_are_refused_before_they_unfold(tmp_path, monkeypatch, compress):
    monkeypatch.setattr(files, "RATIO_SLACK", 1 << 20)
    bomb = compress(bytes(16 << 20)) if compress is not bgzf else bgzf(bytes(16 << 20), 60_000)
    path = tmp_path / "bomb.gz" if compress is not lzma.compress else tmp_path / "bomb.xz"
    path.write_bytes(bomb)
    seen = 0
    with pytest.raises(SequenceFormatError, match="expands more than 100 to 1"):  # noqa: PT012
        for block in read_blocks(path):
            seen += len(block)
    assert seen < 8 << 20
    assert sum(map(len, read_blocks(path, max_ratio=1e9))) == 16 << 20


def test_a_long_run_of_n_at_the_start_of_a_chromosome_is_no_bomb(tmp_path):
    data = b"N" * (20 << 20)
    assert len(read(tmp_path / "chr22.fa.gz", zlib.compress(data, 1, 31))) == 20 << 20


def test_only_one_layer_is_unpacked(tmp_path):
    assert read(tmp_path / "nested.gz", gzip.compress(CUT)) == CUT


@pytest.mark.parametrize("name", ["absent.txt", "", "nul\0.txt"])
def test_files_that_cannot_be_read(tmp_path, name):
    with pytest.raises(InputError, match="cannot read"):
        list(read_blocks(f"{tmp_path}/{name}"))


@given(st.lists(st.binary().filter(lambda b: not set(b) & set(b"\r\n")), min_size=1), st.booleans(), st.integers(1, 9))
def test_lines_are_those_of_the_file(tmp_path_factory, lines, crlf, block):
    end = b"\r\n" if crlf else b"\n"
    data = b"\xef\xbb\xbf" + end.join(lines)
    path = tmp_path_factory.mktemp("lines") / "file"
    path.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_BLOCK", block + 3)
        expected = lines if lines[-1] else lines[:-1]
        assert list(read_lines(path)) == expected


def test_only_the_first_byte_order_mark_is_one(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_BLOCK", 4)
    (tmp_path / "x").write_bytes(b"\xef\xbb\xbfa\xef\xbb\xbfb\n")  # the second starts a block
    assert list(read_lines(tmp_path / "x")) == [b"a\xef\xbb\xbfb"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "out"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="boom"), replace_file(path) as stream:  # noqa: PT012
        stream.write(b"new")
        raise RuntimeError("boom")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with replace_file(path) as stream:
        stream.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


def test_a_folder_that_does_not_exist_cannot_be_written(tmp_path):
    with pytest.raises(InputError, match=r"cannot write .*absent"), replace_file(tmp_path / "absent" / "out"):
        pass
