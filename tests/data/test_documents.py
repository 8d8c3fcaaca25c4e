import gzip
import json
import lzma

import pytest
from bgzf_writer import bgzf
from hypothesis import given
from hypothesis import strategies as st

from crocuta.data.text import Document, read_documents, read_jsonl, read_text
from crocuta.errors import InputError, SequenceFormatError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@given(TEXT.filter(lambda text: not text.startswith("\ufeff")))
def test_a_text_file_is_one_document_as_it_stands(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("text") / "x.txt"
    path.write_bytes(text.encode())
    assert list(read_text(path)) == [Document(str(path), text)]


@given(st.lists(TEXT, min_size=1), st.booleans())
def test_jsonl_gives_every_object_back(tmp_path_factory, texts, escape):
    path = tmp_path_factory.mktemp("text") / "x.jsonl"
    path.write_text("\n\n".join(json.dumps({"text": text}, ensure_ascii=escape) for text in texts), encoding="utf-8")
    documents = list(read_jsonl(path))
    assert [document.text for document in documents] == texts
    assert [document.id for document in documents] == [f"{path}:{2 * i + 1}" for i in range(len(texts))]


def test_lines_leave_out_blanks_and_line_ends(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\r\n  \n two \nthree")
    assert list(read_text(path, by="line")) == [
        Document(f"{path}:1", "one"),
        Document(f"{path}:4", " two "),
        Document(f"{path}:5", "three"),
    ]


def test_jsonl_ids_and_fields(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"id": "a", "body": "x"}\n{"id": 7, "body": "y", "other": null}\n')
    assert list(read_jsonl(tmp_path / "x.jsonl", field="body")) == [Document("a", "x"), Document("7", "y")]


FASTA, JSONL, PLAIN = b">r\nacgt\n", b'{"text": "acgt"}\n', b"acgt"


@pytest.mark.parametrize("suffix", ["fa", "fasta", "fna", "ffn", "FA", "fa.gz", "fna.bgz", "fa.xz"])
def test_fasta_suffixes(tmp_path, suffix):
    packed = {"gz": gzip.compress(FASTA), "bgz": bgzf(FASTA), "xz": lzma.compress(FASTA)}
    (tmp_path / f"x.{suffix}").write_bytes(packed.get(suffix.split(".")[-1], FASTA))
    assert list(read_documents([tmp_path / f"x.{suffix}"])) == [Document("r", "ACGT")]


def test_protein_suffix_and_explicit_alphabet(tmp_path):
    (tmp_path / "x.faa").write_bytes(b">p\nMEF*\n")
    assert next(read_documents([tmp_path / "x.faa"])).text == "MEF*"
    with pytest.raises(SequenceFormatError, match="illegal letter"):
        list(read_documents([tmp_path / "x.faa"], alphabet="iupac"))


def test_formats_by_suffix_and_by_name_in_order(tmp_path):
    for name, content in (("a.jsonl", JSONL), ("b.md", PLAIN), ("c.fa", FASTA), ("d.jsonl.gz", gzip.compress(JSONL))):
        (tmp_path / name).write_bytes(content)
    paths = [tmp_path / name for name in ("c.fa", "a.jsonl", "b.md", "d.jsonl.gz")]
    assert [document.text for document in read_documents(paths)] == ["ACGT", "acgt", "acgt", "acgt"]
    assert [document.text for document in read_documents(str(paths[0]), "lines")] == [">r", "acgt"]
    assert next(read_documents(paths[0], case="keep")).text == "acgt"


BROKEN = {
    "not-json": (b'{"text": "a"}\n{"text": \n', 2, "not JSON"),
    "not-object": (b'{"text": "a"}\n\n["a"]\n', 3, "no JSON object: got list"),
    "no-field": (b'{"txet": "a"}\n', 1, "no field 'text': got the fields 'txet'"),
    "number": (b'{"text": 5}\n', 1, "holds no text: got int"),
    "empty-text": (b'{"text": ""}\n', 1, "holds no text: got an empty string"),
    "bad-id": (b'{"text": "a", "id": [1]}\n', 1, "'id' is no id: got list"),
    "bool-id": (b'{"text": "a", "id": true}\n', 1, "'id' is no id: got bool"),
    "not-utf8": (b'{"text": "a"}\n{"text": "\xff"}\n', 2, "not UTF-8: got 0xff"),
    "deep": (b"[" * 100_000 + b"\n", 1, "not JSON"),
    "empty": (b"", 1, "no JSON object"),
    "blank": (b"\n \n", 1, "no JSON object"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_jsonl_names_file_line_and_reason(tmp_path, name):
    content, line, reason = BROKEN[name]
    path = tmp_path / f"{name}.jsonl"
    path.write_bytes(content)
    with pytest.raises(SequenceFormatError) as failure:
        list(read_jsonl(path))
    assert str(failure.value).startswith(f"{path}:{line}: ")
    assert reason in str(failure.value)


@pytest.mark.parametrize(
    ("content", "by", "line", "reason"),
    [
        (b"one\ntwo\nth\xffree\n", "file", 3, "not UTF-8: got 0xff"),
        (b"one\ntwo\nth\xffree\n", "line", 3, "not UTF-8: got 0xff"),
        (b"", "file", 1, "empty"),
        (b"\xef\xbb\xbf", "file", 1, "empty"),
        (b"\n \n", "line", 1, "no line with text"),
    ],
)
def test_broken_text_names_file_line_and_reason(tmp_path, content, by, line, reason):
    path = tmp_path / "x.txt"
    path.write_bytes(content)
    with pytest.raises(SequenceFormatError) as failure:
        list(read_text(path, by=by))
    assert str(failure.value).startswith(f"{path}:{line}: ")
    assert reason in str(failure.value)


def test_arguments_are_checked_before_anything_is_read(tmp_path):
    with pytest.raises(InputError, match="nothing to read"):
        read_documents([])
    with pytest.raises(InputError, match="standard input"):
        read_documents(["-"])
    with pytest.raises(InputError, match="unknown format"):
        read_documents([tmp_path], "csv")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="No such file"):
        list(read_documents([tmp_path / "absent.txt"]))
    with pytest.raises(InputError, match="Is a directory"):
        list(read_documents([tmp_path]))
