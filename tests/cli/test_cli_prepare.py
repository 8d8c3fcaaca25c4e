"""``crocuta prepare``: token files, as the library writes them."""

import json

import pytest

from crocuta.data.windows import TokenSource
from crocuta.tokenizers.bytes import ByteTokenizer


def tokens(prefix) -> list[int]:
    source = TokenSource.open(prefix)
    return source.read(0, len(source)).tolist()


def test_a_text_file_is_one_document(run, tmp_path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    done = run("prepare", tmp_path / "a.txt", "-o", tmp_path / "out", "--tokenizer", "bytes")
    assert (done.code, done.out) == (0, "")
    assert "1 documents, 9 tokens, 9 bytes" in done.stderr
    assert tokens(tmp_path / "out") == [*b"one\ntwo\n", 0]
    assert TokenSource.open(tmp_path / "out", ByteTokenizer()).num_documents == 1


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b">a\nacgt\n>b\nGG\n", [*b"ACGT", 0, *b"GG", 0]),
        (b'{"text": "hi"}\n{"text": "yo"}\n', [*b"hi", 0, *b"yo", 0]),
        (b"one\ntwo\n", [*b"one\ntwo\n", 0]),
    ],
    ids=["fasta", "jsonl", "text"],
)
def test_standard_input_is_told_by_its_first_character(run, tmp_path, data, expected) -> None:
    done = run("prepare", "-o", tmp_path / "out", "--tokenizer", "bytes", stdin=data)
    assert done.code == 0, done.stderr
    assert tokens(tmp_path / "out") == expected


def test_options_reach_the_library(run, tmp_path) -> None:
    def prepare(name: str, *options: str) -> list[int]:
        done = run("prepare", tmp_path / name, "-o", tmp_path / "out", *options, "--overwrite")
        assert done.code == 0, done.stderr
        return tokens(tmp_path / "out")

    (tmp_path / "x.fa").write_text(">a\nacGT\n")
    (tmp_path / "x.txt").write_text("one\ntwo\n")
    (tmp_path / "x.jsonl").write_text(json.dumps({"body": "hi"}))
    assert prepare("x.fa", "--tokenizer", "bytes", "--keep-case", "--no-eos") == [*b"acGT"]
    assert prepare("x.fa", "--tokenizer", "dna") == [7, 8, 9, 10, 1]
    assert prepare("x.txt", "--tokenizer", "bytes", "--format", "lines") == [*b"one", 0, *b"two", 0]
    assert prepare("x.jsonl", "--tokenizer", "bytes", "--field", "body") == [*b"hi", 0]


def test_earlier_files_stay_unless_told(run, tmp_path) -> None:
    (tmp_path / "a.txt").write_text("one")
    arguments = ("prepare", tmp_path / "a.txt", "-o", tmp_path / "out", "--tokenizer", "bytes")
    assert run(*arguments).code == 0
    (tmp_path / "a.txt").write_text("two")
    assert run(*arguments).code == 1
    assert tokens(tmp_path / "out") == [*b"one", 0]
    assert run(*arguments, "--overwrite").code == 0
    assert tokens(tmp_path / "out") == [*b"two", 0]
