"""``crocuta score``: numbers equal those of the library, whatever the format and the batching."""

import gzip
import json
import os
import threading

import numpy as np
import pytest

import crocuta
from crocuta.cli import records

SEQUENCES = {"one": "ACGTACGT", "two": "GATTACA", "three": "ACGTTGCAACGTTGCA"}
FASTA = "".join(f">{name} of three\n{sequence}\n" for name, sequence in SEQUENCES.items())


def table(text: str) -> list[list[str]]:
    return [line.split("\t") for line in text.splitlines()]


@pytest.fixture
def fasta(tmp_path):
    path = tmp_path / "three.fa"
    path.write_text(FASTA)
    return path


@pytest.fixture
def expected(model):
    return crocuta.score(*crocuta.load(model), list(SEQUENCES.values()))


def test_a_table_with_the_scores_of_the_library(run, model, fasta, expected) -> None:
    done = run("score", model, fasta)
    assert (done.code, done.stderr) == (0, "")
    head, *rows = table(done.out)
    assert head == ["id", "tokens", "total", "mean"]
    assert [row[0] for row in rows] == list(SEQUENCES)
    assert [int(row[1]) for row in rows] == [len(sequence) - 1 for sequence in SEQUENCES.values()]
    # Exactly: the digits of a float64 survive.
    assert [(float(row[2]), float(row[3])) for row in rows] == [(s.total, s.mean) for s in expected]


@pytest.mark.parametrize("arguments", [["-"], []], ids=["dash", "nothing"])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_standard_input(run, model, fasta, arguments, packed) -> None:
    data = FASTA.encode()
    done = run("score", model, *arguments, stdin=gzip.compress(data) if packed else data)
    assert done.out == run("score", model, fasta).out


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("x.fa.gz", gzip.compress(FASTA.encode())),
        ("x.jsonl", "".join(json.dumps({"id": i, "text": s}) + "\n" for i, s in SEQUENCES.items()).encode()),
        ("no_suffix", FASTA.encode()),
        ("x.txt", b"\n".join(s.encode() for s in SEQUENCES.values())),
    ],
)
def test_every_format_gives_the_same_scores(run, model, tmp_path, fasta, name, data) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    mine, theirs = table(run("score", model, path).out), table(run("score", model, fasta).out)
    assert [row[1:] for row in mine] == [row[1:] for row in theirs]
    if name.endswith(".txt"):
        assert [row[0] for row in mine[1:]] == [f"{path}:{line}" for line in (1, 2, 3)]
    else:
        assert mine == theirs


def test_batches_keep_order_and_change_nothing(run, model, tmp_path, monkeypatch) -> None:
    sequences = ["ACGT" * (1 + i % 5) for i in range(23)]
    path = tmp_path / "many.fa"
    path.write_text("".join(f">r{i}\n{s}\n" for i, s in enumerate(sequences)))
    whole = table(run("score", model, path).out)
    monkeypatch.setattr(records, "RECORDS", 4)
    pieces = table(run("score", model, path).out)
    assert [row[0] for row in pieces[1:]] == [f"r{i}" for i in range(23)]
    np.testing.assert_allclose([float(r[2]) for r in pieces[1:]], [float(r[2]) for r in whole[1:]], rtol=1e-5)


def test_records_are_read_in_turn(monkeypatch) -> None:
    documents = [records.Document(str(i), "A" * 10) for i in range(10)]
    monkeypatch.setattr(records, "RECORDS", 3)
    assert [len(batch) for batch in records.batched(documents)] == [3, 3, 3, 1]
    monkeypatch.setattr(records, "CHARACTERS", 15)
    assert [len(batch) for batch in records.batched(documents)] == [2, 2, 2, 2, 2]
    reader = iter(documents)
    next(records.batched(reader))
    assert next(reader).id == "2"  # not one more than the first batch was taken


def test_json_with_log_probabilities(run, model, fasta, expected) -> None:
    lines = [json.loads(line) for line in run("score", model, fasta, "--per-token").out.splitlines()]
    assert [line["id"] for line in lines] == list(SEQUENCES)
    for line, score in zip(lines, expected):
        assert set(line) == {"id", "tokens", "total", "mean", "log_probs"}
        assert np.array(line["log_probs"], np.float32).tolist() == score.log_probs.tolist()
    short = [json.loads(line) for line in run("score", model, fasta, "--format", "jsonl").out.splitlines()]
    assert [set(line) for line in short] == [{"id", "tokens", "total", "mean"}] * 3


def test_both_strands_and_bos(run, dna_model, fasta) -> None:
    loaded = crocuta.load(dna_model)
    theirs = crocuta.score(*loaded, list(SEQUENCES.values()), both_strands=True, bos=True)
    rows = table(run("score", dna_model, fasta, "--both-strands", "--bos").out)[1:]
    assert [float(row[2]) for row in rows] == [score.total for score in theirs]
    assert [int(row[1]) for row in rows] == [len(sequence) for sequence in SEQUENCES.values()]
    assert rows != table(run("score", dna_model, fasta, "--bos").out)[1:]


def test_case_is_raised_unless_kept(run, model, tmp_path, fasta) -> None:
    lower = tmp_path / "lower.fa"
    lower.write_text("".join(f">{name}\n{sequence.lower()}\n" for name, sequence in SEQUENCES.items()))
    assert run("score", model, lower).out == run("score", model, fasta).out
    assert run("score", model, lower, "--keep-case").out != run("score", model, fasta).out


def test_output_goes_to_a_file_or_nowhere(run, model, fasta, tmp_path) -> None:
    target = tmp_path / "scores.tsv"
    assert run("score", model, fasta, "-o", target).out == ""
    assert target.read_text() == run("score", model, fasta).out
    target.write_text("before")
    fasta.write_text(FASTA + ">four\nAC!T\n")
    assert run("score", model, fasta, "-o", target).code == 1
    assert target.read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scores.tsv", "three.fa"]


def test_a_device_is_written_to_and_not_replaced(run, model, fasta, tmp_path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()), daemon=True)
    reader.start()
    assert run("score", model, fasta, "-o", pipe).code == 0
    reader.join(5)
    assert got == [run("score", model, fasta).out]
    assert pipe.is_fifo()


def test_an_id_cannot_break_the_table(run, model, tmp_path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"id": "a\tb\nc", "text": "ACGT"}))
    assert table(run("score", model, path).out)[1][0] == r"a\tb\nc"


def test_a_bound_of_memory_changes_no_score(run, model, fasta) -> None:
    assert table(run("score", model, fasta, "--max-memory", "2GiB").out) == table(run("score", model, fasta).out)


def test_too_little_memory_says_what_would_do(run, model, fasta, tmp_path) -> None:
    done = run("score", model, fasta, "--max-memory", "1MB")
    assert done.code == 1
    assert "max_memory is too small even for the shortest chunks" in done.stderr
    assert "expected at least" in done.stderr
    for size in ("2 gigs", "-1", "0"):
        done = run("score", tmp_path / "no-such-model", fasta, f"--max-memory={size}")
        assert done.code == 1
        assert "an amount of memory must be a positive number of bytes" in done.stderr
