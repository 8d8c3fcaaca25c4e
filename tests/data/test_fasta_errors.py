"""Every broken FASTA gives one line that names the file, the line and the reason."""

import gzip

import pytest
from bgzf_writer import BGZF_EOF, bgzf
from hypothesis import given
from hypothesis import strategies as st

from crocuta.data import files
from crocuta.data.fasta import MAX_HEADER, read_fasta
from crocuta.errors import InputError, SequenceFormatError

GOOD = b">a\nACGT\n>b\nAC\n"
# name: (content, line, words of the reason)
BROKEN = {
    "empty": (b"", 1, "no record"),
    "blank": (b"\n\n\n", 4, "no record"),
    "text-first": (b"\nACGT\n>a\nA\n", 2, "text before the first '>'"),
    "comment-first": (b"; old comment\n>a\nA\n", 1, "text before the first '>'"),
    "utf16": (">a\nACGT\n".encode("utf-16"), 1, "text before the first '>'"),
    "space-before": (b" >a\nA\n", 1, "text before the first '>'"),
    "empty-record": (b">a\nACGT\n>b\n\n>c\nA\n", 3, "no sequence: got 'b'"),
    "empty-last-record": (b">a\nACGT\n>b\n", 3, "no sequence: got 'b'"),
    "empty-last-record-cut": (b">a\nACGT\n>b", 3, "no sequence: got 'b'"),
    "empty-id": (b">a\nA\n>\nACGT\n", 3, "empty id"),
    "spaced-id": (b">a\nA\n> b\nACGT\n", 3, "empty id"),
    "duplicate": (b">a x\nA\n>b\nC\n>a y\nG\n", 5, "occurred before: got 'a'"),
    "letter": (b">a\nACGT\nACGT\nAC!T\n", 4, "illegal letter in the sequence: got b'!'"),
    "protein": (b">a\nMEFK\n", 2, "illegal letter in the sequence: got b'E'"),
    "gap": (b">a\nAC-T\n", 2, "illegal letter in the sequence: got b'-'"),
    "space": (b">a\nACGT \n", 2, "illegal letter in the sequence: got b' '"),
    "tab": (b">a\nAC\tGT\n", 2, "illegal letter in the sequence"),
    "nul": (b">a\nAC\nA\0C\n", 3, r"illegal letter in the sequence: got b'\x00'"),
    "mark-inside": (b">a\nAC>GT\n", 2, "illegal letter in the sequence: got b'>'"),
    "not-ascii": (">a\nACé\n".encode(), 2, "illegal letter in the sequence"),
    "crlf-letter": (b">a\r\nAC\r\n>b\r\nA1\r\n", 4, "illegal letter in the sequence: got b'1'"),
    "cr-letter": (b">a\rAC\r>b\rA1\r", 4, "illegal letter in the sequence: got b'1'"),
    "control-header": (b">a\nA\n>b\x07\nA\n", 3, "control character"),
    "latin1-header": (b">a\nA\n>b caf\xe9\nA\n", 3, "not UTF-8"),
    "long-header": (b">a\nA\n>b " + b"x" * MAX_HEADER + b"\nA\n", 3, "header line is too long"),
    "endless-header": (b">a\nA\n>b " + b"x" * (MAX_HEADER * 4), 3, "header line is too long"),
    "cut.gz": (gzip.compress(GOOD)[:-12], 1, "ends early"),
    "tail.gz": (gzip.compress(GOOD) + b"x", 5, "bytes after the end"),
    "cut.bgz": (bgzf(GOOD).removesuffix(BGZF_EOF), 5, "end-of-file block is missing"),
    "wrapped.gz": (gzip.compress(gzip.compress(GOOD)), 1, "text before the first '>'"),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("block", [64, 1 << 17])
def test_broken_files_name_file_line_and_reason(tmp_path, monkeypatch, name, block):
    monkeypatch.setattr(files, "_BLOCK", block)
    content, line, reason = BROKEN[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(SequenceFormatError) as failure:
        list(read_fasta(path))
    message = str(failure.value)
    assert "\n" not in message
    assert len(message) < 400
    # What a cut gzip file still gives, and so the line it reaches, is up to zlib.
    assert message.startswith(f"{path}:{line}:" if name != "cut.gz" else f"{path}:")
    assert reason in message


@pytest.mark.parametrize("block", range(4, 12))
def test_a_mark_inside_a_line_starts_no_record_wherever_a_block_ends(tmp_path, monkeypatch, block):
    monkeypatch.setattr(files, "_BLOCK", block)
    (tmp_path / "x.fa").write_bytes(b">a\nACGT>CA\nA\n")
    with pytest.raises(SequenceFormatError, match=r"x\.fa:2: illegal letter .*'>'"):
        list(read_fasta(tmp_path / "x.fa"))


def test_the_longest_header_is_accepted(tmp_path):
    (tmp_path / "x.fa").write_bytes(b">" + b"x" * (MAX_HEADER - 1) + b"\nA\n")
    assert len(next(read_fasta(tmp_path / "x.fa")).id) == MAX_HEADER - 1


def test_records_longer_than_the_limit_are_refused_at_their_header(tmp_path):
    (tmp_path / "x.fa").write_bytes(b">a\nACGT\n>b\nACG\nTA\n")
    assert len(list(read_fasta(tmp_path / "x.fa", max_record=5))) == 2
    with pytest.raises(SequenceFormatError, match=r"x\.fa:3: the record is too long"):
        list(read_fasta(tmp_path / "x.fa", max_record=4))


def test_a_missing_file_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"absent\.fa: got No such file"):
        list(read_fasta(tmp_path / "absent.fa"))


def test_other_alphabets_name_themselves(tmp_path):
    (tmp_path / "x.fa").write_bytes(b">a\nACGR\n")
    with pytest.raises(SequenceFormatError, match=r"x\.fa:2: .*got b'R'.*'acgtn' \(ACGTN\)"):
        list(read_fasta(tmp_path / "x.fa", alphabet="acgtn"))


@given(st.binary(max_size=40) | st.lists(st.sampled_from([b">", b"a", b"\n", b"\r", b" ", b"A", b"!"])).map(b"".join))
def test_any_bytes_are_records_or_one_error(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("any") / "x.fa"
    path.write_bytes(data)
    try:
        records = list(read_fasta(path))
    except SequenceFormatError as error:
        assert str(error).startswith(f"{path}:")  # noqa: PT017
    else:
        assert all(record.id and record.sequence for record in records)
        assert len(records) == len(data.replace(b"\r", b"\n").replace(b"\n>", b"\n\0>").split(b"\n\0>"))
