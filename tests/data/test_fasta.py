import gzip
import io
import lzma
import sys
from types import SimpleNamespace

import pytest
from bgzf_writer import bgzf
from hypothesis import given
from hypothesis import strategies as st

from crocuta.data import files
from crocuta.data.fasta import Record, read_fasta, write_fasta
from crocuta.errors import InputError

WORD = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Zs", "Zl", "Zp"]), min_size=1, max_size=9)
RECORDS = st.lists(
    st.builds(Record, WORD, st.lists(WORD, max_size=3).map(" ".join), st.text("ACGTURYSWKMBDHVN", min_size=1)),
    min_size=1,
    max_size=5,
    unique_by=lambda record: record.id,
)


def layout(records, end, width, blanks, final_end):
    """``records`` as a file would have them, with line ends, line width and blank lines as asked."""
    lines = []
    for record in records:
        lines += [f">{record.id} {record.description}".rstrip(" ")]
        lines += [record.sequence[i : i + width] for i in range(0, len(record.sequence), width)]
        lines += [""] * blanks
    return (end.join(lines) + end * final_end).encode()


@given(
    RECORDS,
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.integers(1, 7),
    st.integers(0, 2),
    st.booleans(),
    st.booleans(),
    st.integers(1, 12),
)
def test_the_layout_of_the_file_does_not_matter(tmp_path_factory, records, end, width, blanks, final_end, bom, block):
    path = tmp_path_factory.mktemp("fasta") / "x.fa"
    path.write_bytes(b"\xef\xbb\xbf" * bom + layout(records, end, width, blanks, final_end))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_BLOCK", block + 2)  # blocks cut headers, sequences, CRLF and marks everywhere
        assert list(read_fasta(path)) == records


@given(RECORDS, st.integers(1, 70), st.sampled_from(["x.fa", "x.fa.gz", "x.fa.xz"]))
def test_read_inverts_write(tmp_path_factory, records, width, name):
    path = tmp_path_factory.mktemp("fasta") / name
    assert write_fasta(records, path, width=width) == len(records)
    assert list(read_fasta(path)) == records


def test_written_bytes_by_hand_and_repeatable(tmp_path):
    records = [Record("a", "first one", "ACGTA"), Record("b", "", "NN")]
    write_fasta(records, tmp_path / "x.fa", width=4)
    assert (tmp_path / "x.fa").read_bytes() == b">a first one\nACGT\nA\n>b\nNN\n"
    for name in ("1.gz", "2.gz"):
        write_fasta(records, tmp_path / name)
    assert (tmp_path / "1.gz").read_bytes() == (tmp_path / "2.gz").read_bytes()
    assert (tmp_path / "1.gz").read_bytes()[3:8] == bytes(5)  # neither file name nor time


TEXT = b">a one\nACgt\nNN\n>b\nTTT\n"


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bgzf, lzma.compress])
def test_all_compressions(tmp_path, pack):
    (tmp_path / "x").write_bytes(pack(TEXT))
    assert list(read_fasta(tmp_path / "x")) == [Record("a", "one", "ACGTNN"), Record("b", "", "TTT")]


def test_standard_input_and_output(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(gzip.compress(TEXT))))
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(buffer=(out := io.BytesIO())))
    assert write_fasta(read_fasta("-", case="keep"), "-") == 2
    assert out.getvalue() == b">a one\nACgtNN\n>b\nTTT\n"


def test_case_policy(tmp_path):
    (tmp_path / "x.fa").write_bytes(b">a\nACgtRy\n")
    assert next(read_fasta(tmp_path / "x.fa")).sequence == "ACGTRY"
    assert next(read_fasta(tmp_path / "x.fa", case="keep")).sequence == "ACgtRy"


@pytest.mark.parametrize(
    ("alphabet", "sequence"),
    [("acgtn", "ACGTN"), ("iupac", "ACGTURYSWKMBDHVN"), ("gapped", "AC-GT*"), ("protein", "MEFILPQXZJO*-")],
)
def test_alphabets_accept_their_letters(tmp_path, alphabet, sequence):
    (tmp_path / "x.fa").write_bytes(f">a\n{sequence}\n{sequence.lower()}\n".encode())
    assert next(read_fasta(tmp_path / "x.fa", alphabet=alphabet)).sequence == sequence * 2


def test_a_record_ends_where_the_next_begins_before_it_is_needed(tmp_path):
    (tmp_path / "x.fa").write_bytes(b">a\nACGT\n>b\n" + b"T" * (1 << 20) + b"\n!")
    assert next(read_fasta(tmp_path / "x.fa")).sequence == "ACGT"


def test_repeated_ids_can_be_allowed(tmp_path):
    (tmp_path / "x.fa").write_bytes(b">a\nA\n>a\nC\n")
    assert [r.sequence for r in read_fasta(tmp_path / "x.fa", duplicates="allow")] == ["A", "C"]


@pytest.mark.parametrize("policy", [{"alphabet": "rna"}, {"case": "lower"}, {"duplicates": "skip"}])
def test_unknown_policies_are_refused_at_once(policy):
    with pytest.raises(InputError, match="unknown " + next(iter(policy))):
        read_fasta("absent.fa", **policy)


@pytest.mark.parametrize(
    "record",
    [
        Record("", "", "A"),
        Record("a b", "", "A"),
        Record("a", "x\ny", "A"),
        Record("a\ud800", "", "A"),
        Record("a", "", ""),
        Record("a", "", "A\n>b\nC"),
        Record("a", "", "A C"),
    ],
)
def test_records_that_would_not_read_back_are_not_written(tmp_path, record):
    with pytest.raises(InputError, match="cannot write this record"):
        write_fasta([record], tmp_path / "x.fa")
    assert list(tmp_path.iterdir()) == []


def test_bgzf_is_not_written(tmp_path):
    with pytest.raises(InputError, match="BGZF"):
        write_fasta([], tmp_path / "x.bgz")
