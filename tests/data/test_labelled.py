"""Labelled sequences: the same examples from every format, and every fault named with its file and line."""

import gzip
import json
import lzma

import pytest
from bgzf_writer import bgzf

from crocuta.data.labelled import Example, LabelledFormat, read_labelled
from crocuta.errors import ConfigError, CrocutaError, InputError, SequenceFormatError

TSV = b"sequence\tlabel\nACGT\tcoding\nggcc\tother\n"
JSONL = b'{"sequence": "ACGT", "label": "coding"}\n\n{"sequence": "ggcc", "label": "other"}\n'
FASTA = b">a label=coding\nAC\nGT\n>b label=other\nGGCC\n"


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def labels(path, kind, **format):
    return [example.label for example in read_labelled(path, kind, LabelledFormat(**format))]


# --- what is read ---


def test_tsv(tmp_path):
    path = write(tmp_path, "x.tsv", b"\xef\xbb\xbf" + TSV.replace(b"\n", b"\r\n"))
    assert read_labelled(path, "class") == [
        Example(f"{path}:2", "ACGT", "coding", None, f"{path}:2"),
        Example(f"{path}:3", "ggcc", "other", None, f"{path}:3"),
    ]


def test_names_of_columns_ids_and_splits(tmp_path):
    path = write(tmp_path, "x.tsv", "part\tname\tdna\tclass\nvalidation\tq1\tACGT\t 7 \n\tq2\tAC\t-\n")
    format = LabelledFormat(sequence="dna", label="class", id="name", split="part")
    assert read_labelled(path, "class", format) == [
        Example("q1", "ACGT", "7", "validation", f"{path}:2"),
        Example("q2", "AC", "-", None, f"{path}:3"),
    ]


def test_jsonl(tmp_path):
    path = write(tmp_path, "x.jsonl", '{"id": 5, "sequence": "é", "label": 3, "split": "test"}\n' + JSONL.decode())
    assert read_labelled(path, "class") == [
        Example("5", "é", "3", "test", f"{path}:1"),
        Example(f"{path}:2", "ACGT", "coding", None, f"{path}:2"),
        Example(f"{path}:4", "ggcc", "other", None, f"{path}:4"),
    ]


def test_fasta_with_labels_in_the_header(tmp_path):
    path = write(tmp_path, "x.fa", FASTA + b">c split=test x=1 label=coding\nacgtn\n")
    assert read_labelled(path, "class") == [
        Example("a", "ACGT", "coding", None, f"{path}:1"),
        Example("b", "GGCC", "other", None, f"{path}:4"),
        Example("c", "ACGTN", "coding", "test", f"{path}:6"),
    ]
    assert read_labelled(path, "class", LabelledFormat(case="keep"))[2].sequence == "acgtn"


def test_fasta_with_a_pattern(tmp_path):
    path = write(tmp_path, "x.fa", ">chr1:5-9|enhancer part=train\nACGT\n>chr2:5-9|none\nGG\n")
    format = LabelledFormat(pattern=r"\|(\w+)", split="part")
    assert [(e.label, e.split) for e in read_labelled(path, "class", format)] == [("enhancer", "train"), ("none", None)]


def test_fasta_with_a_table(tmp_path):
    path = write(tmp_path, "x.fa", ">a label=ignored\nACGT\n>b\nGG\n")
    table = write(tmp_path, "x.tsv", "split\tlabel\tid\ntrain\tone\tb\ntest\ttwo\ta\n\tthree\tunused\n")
    assert read_labelled(path, "class", LabelledFormat(table=table)) == [
        Example("a", "ACGT", "two", "test", f"{path}:1"),
        Example("b", "GG", "one", "train", f"{path}:3"),
    ]


def test_places_in_a_file_with_old_line_ends(tmp_path):
    path = write(tmp_path, "x.fa", FASTA.replace(b"\n", b"\r"))
    assert [e.where for e in read_labelled(path, "class")] == [f"{path}:record 'a'", f"{path}:record 'b'"]


@pytest.mark.parametrize("suffix", ["", ".gz", ".bgz", ".xz"])
@pytest.mark.parametrize(("name", "content"), [("x.tsv", TSV), ("x.TAB", TSV), ("x.jsonl", JSONL), ("x.fna", FASTA)])
def test_every_format_compressed(tmp_path, name, content, suffix):
    pack = {"": bytes, ".gz": gzip.compress, ".bgz": bgzf, ".xz": lzma.compress}[suffix]
    path = write(tmp_path, name + suffix, pack(content))
    examples = read_labelled(path, "class")
    assert [(e.sequence.upper(), e.label) for e in examples] == [("ACGT", "coding"), ("GGCC", "other")]


def test_several_files_in_order_and_a_format_by_name(tmp_path):
    paths = [write(tmp_path, "b.txt", TSV), write(tmp_path, "a.txt", TSV.replace(b"ggcc", b"tt"))]
    sequences = [e.sequence for e in read_labelled(paths, "class", LabelledFormat(format="tsv"))]
    assert sequences == ["ACGT", "ggcc", "ACGT", "tt"]


def test_protein_letters(tmp_path):
    assert labels(write(tmp_path, "x.faa", ">p label=1\nMEF*\n"), "class") == ["1"]
    with pytest.raises(SequenceFormatError, match="illegal letter"):
        labels(write(tmp_path, "x.fa", ">p label=1\nMEF*\n"), "class")


# --- kinds of label ---


def test_targets(tmp_path):
    path = write(tmp_path, "x.tsv", "sequence\tlabel\nA\t1.5, -2e3\nA\t0 7\n")
    assert labels(path, "numbers") == [(1.5, -2000.0), (0.0, 7.0)]
    path = write(tmp_path, "x.jsonl", "\n".join(f'{{"sequence": "A", "label": {v}}}' for v in ("2", "[0.5]", '"-1"')))
    assert labels(path, "numbers") == [(2.0,), (0.5,), (-1.0,)]
    path = write(tmp_path, "x.fa", ">a label=1,2\nAC\n>b label=3,4\nAC\n")
    assert labels(path, "numbers") == [(1.0, 2.0), (3.0, 4.0)]


def test_labels_of_tokens(tmp_path):
    path = write(tmp_path, "x.tsv", "sequence\tlabel\nACGT\tHHEE\nAC\thelix sheet\nAC\tB-x,O \n")
    assert labels(path, "tokens") == [("H", "H", "E", "E"), ("helix", "sheet"), ("B-x", "O")]
    path = write(tmp_path, "x.jsonl", '{"sequence": "ACG", "label": ["x", null, 2]}\n{"sequence": "AC", "label": "HE"}')
    assert labels(path, "tokens") == [("x", None, "2"), ("H", "E")]


# --- faults ---

FAULTS = {
    "empty": ("x.tsv", "\n \n", "class", 1, "the file is empty"),
    "header-only": ("x.tsv", "sequence\tlabel\n", "class", 1, "no labelled sequence"),
    "no-column": ("x.tsv", "\nsequence\tclass\nA\tB\n", "class", 2, "no column 'label': got the columns 'sequence'"),
    "commas": ("x.tsv", "sequence,label\nA,B\n", "class", 1, "columns are parted by tabs"),
    "twice": ("x.tsv", "label\tsequence\tlabel\nA\tB\tC\n", "class", 1, "names a column twice"),
    "narrow": ("x.tsv", "sequence\tlabel\nA\tB\n\nA\n", "class", 4, "another width than the header: got 1 cells"),
    "wide": ("x.tsv", "sequence\tlabel\nA\tB\tC\n", "class", 2, "got 3 cells; expected 2"),
    "no-sequence": ("x.tsv", "sequence\tlabel\n\tB\n", "class", 2, "no sequence: got an empty string"),
    "no-label": ("x.tsv", "sequence\tlabel\nA\t \n", "class", 2, "the label is empty"),
    "not-utf-8": ("x.tsv", b"sequence\tlabel\nA\tB\nA\t\xff\n", "class", 3, "not UTF-8: got 0xff"),
    "word": ("x.tsv", "sequence\tlabel\nA\t1\nA\tone\n", "numbers", 3, "no target: got 'one'"),
    "nan": ("x.tsv", "sequence\tlabel\nA\tnan\n", "numbers", 2, "no target: got 'nan'; expected finite"),
    "targets": ("x.tsv", "sequence\tlabel\nA\t1 2\nA\t1\n", "numbers", 3, "number of targets than the first: got 1"),
    "no-tokens": ("x.tsv", "sequence\tlabel\nA\t , \n", "tokens", 2, "the label is empty"),
    "not-json": ("x.jsonl", '{"sequence": "A", "label": 1}\n{', "class", 2, "is not JSON"),
    "deep": ("x.jsonl", "[" * 100_000, "class", 1, "is not JSON"),
    "array": ("x.jsonl", "[1]", "class", 1, "no JSON object: got list"),
    "no-field": ("x.jsonl", '{"sequence": "A"}', "class", 1, "no field 'label': got the fields 'sequence'"),
    "sequence-5": ("x.jsonl", '{"sequence": 5, "label": 1}', "class", 1, "no sequence: got int"),
    "float-class": ("x.jsonl", '{"sequence": "A", "label": 1.5}', "class", 1, r"no class: got 1.5 \(float\)"),
    "bool-class": ("x.jsonl", '{"sequence": "A", "label": true}', "class", 1, r"no class: got true \(bool\)"),
    "null-class": ("x.jsonl", '{"sequence": "A", "label": null}', "class", 1, "no class: got null"),
    "list-class": ("x.jsonl", '{"sequence": "A", "label": ["a"]}', "class", 1, r'no class: got \["a"\]'),
    "infinite": ("x.jsonl", '{"sequence": "A", "label": [1, Infinity]}', "numbers", 1, "no target"),
    "huge": ("x.jsonl", '{"sequence": "A", "label": 1' + "0" * 400 + "}", "numbers", 1, "no target"),
    "bool-number": ("x.jsonl", '{"sequence": "A", "label": false}', "numbers", 1, "no target: got False"),
    "nested": ("x.jsonl", '{"sequence": "A", "label": [[1]]}', "numbers", 1, "no target"),
    "no-numbers": ("x.jsonl", '{"sequence": "A", "label": []}', "numbers", 1, "no target"),
    "token-number": ("x.jsonl", '{"sequence": "A", "label": 4}', "tokens", 1, "no label for each token: got int"),
    "token-float": ("x.jsonl", '{"sequence": "A", "label": [0.5]}', "tokens", 1, "no class: got 0.5"),
    "bad-id": ("x.jsonl", '{"sequence": "A", "label": 1, "id": [2]}', "class", 1, "'id' is no id: got list"),
    "bad-split": ("x.jsonl", '{"sequence": "A", "label": 1, "split": 2}', "class", 1, "split must be a name: got int"),
    "no-word": ("x.fa", ">a label=1\nA\n\n>b xlabel=2\nA\n", "class", 4, "no label: got 'b xlabel=2'"),
    "two-words": ("x.fa", ">a label=1 label=2\nA\n", "class", 1, "label= twice"),
    "empty-word": ("x.fa", ">a label=\nA\n", "class", 1, "the label is empty"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_faults_name_file_line_and_reason(tmp_path, case):
    name, content, kind, line, reason = FAULTS[case]
    path = write(tmp_path, name, content)
    with pytest.raises(SequenceFormatError, match=reason) as caught:
        read_labelled(path, kind)
    assert str(caught.value).startswith(f"{path}:{line}: ")


def test_faults_of_tables_and_patterns(tmp_path):
    path = write(tmp_path, "x.fa", ">a\nAC\n>b\nGG\n")
    table = write(tmp_path, "x.tsv", "id\tlabel\na\tone\n")
    with pytest.raises(SequenceFormatError, match=f"^{path}:3: {table} has no label for 'b'"):
        read_labelled(path, "class", LabelledFormat(table=table))
    with pytest.raises(SequenceFormatError, match=f"^{path}:1: the pattern finds no label: got 'a'"):
        read_labelled(path, "class", LabelledFormat(pattern="(z)"))
    with pytest.raises(SequenceFormatError, match="finds no label"):
        read_labelled(path, "class", LabelledFormat(pattern="a|(z)"))
    table = write(tmp_path, "y.tsv", "id\tlabel\na\tone\nb\ttwo\na\tone\n")
    with pytest.raises(SequenceFormatError, match=f"^{table}:4: the id occurred before: got 'a'"):
        read_labelled(path, "class", LabelledFormat(table=table))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pattern": "("}, "no regular expression"),
        ({"pattern": "abc"}, "one group, the label: got 'abc' with 0"),
        ({"pattern": "(a)(b)"}, "with 2"),
        ({"pattern": "(a)", "table": "x.tsv"}, "from one place"),
        ({"label": "sequence"}, "have one name"),
    ],
)
def test_impossible_formats(changes, reason):
    with pytest.raises(ConfigError, match=reason):
        LabelledFormat(**changes)


def test_impossible_paths(tmp_path):
    for paths, reason in (([], "no path"), ("-", "standard input"), (write(tmp_path, "x.csv", TSV), "not known")):
        with pytest.raises(InputError, match=reason):
            read_labelled(paths, "class")
    with pytest.raises(InputError, match="cannot read"):
        read_labelled(str(tmp_path / "none.tsv"), "class")


def test_any_json_value_is_a_label_or_one_error(tmp_path):
    values = [None, True, 0, 1.5, "", "a", [], {}, [None], ["a", 1], [1.5], [[1]], {"a": 1}, 10**400, "1 2", "\ud800"]
    for kind in ("class", "tokens", "numbers"):
        for value in values:
            path = write(tmp_path, "x.jsonl", json.dumps({"sequence": "AC", "label": value}))
            try:
                assert len(read_labelled(path, kind)) == 1
            except CrocutaError as error:
                assert "\n" not in str(error) and f"{path}:1" in str(error)  # noqa: PT018, PT017
