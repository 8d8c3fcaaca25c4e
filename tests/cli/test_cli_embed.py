"""``crocuta embed``: arrays equal those of the library and cannot be spoilt by ids."""

import io
import json

import numpy as np
import pytest

import crocuta
from crocuta.cli import records

SEQUENCES = {"one": "ACGTACGT", "../two": "GATTACA", "ids": "ACGTTGCAACGTTGCA"}


@pytest.fixture
def fasta(tmp_path):
    path = tmp_path / "three.fa"
    path.write_text("".join(f">{name}\n{sequence}\n" for name, sequence in SEQUENCES.items()))
    return path


def theirs(model, **options):
    return crocuta.embed(*crocuta.load(model), list(SEQUENCES.values()), **options)


def test_npz_holds_ids_and_one_matrix(run, model, fasta, tmp_path) -> None:
    target = tmp_path / "x.npz"
    done = run("embed", model, fasta, "-o", target)
    assert (done.code, done.stdout, done.stderr) == (0, b"", "")
    with np.load(target, allow_pickle=False) as file:
        assert set(file.files) == {"ids", "embeddings"}
        assert file["ids"].tolist() == list(SEQUENCES)
        assert file["embeddings"].dtype == np.float32
        np.testing.assert_array_equal(file["embeddings"], np.stack(theirs(model)))


@pytest.mark.parametrize("layer", [0, 1, -1])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_layers_and_pooling(run, model, fasta, tmp_path, layer, pooling) -> None:
    run("embed", model, fasta, "-o", tmp_path / "x.npz", "--layer", layer, "--pooling", pooling)
    with np.load(tmp_path / "x.npz") as file:
        np.testing.assert_array_equal(file["embeddings"], np.stack(theirs(model, layer=layer, pooling=pooling)))


def test_without_pooling_there_is_an_array_a_record(run, model, fasta, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(records, "RECORDS", 2)  # the numbers go on from batch to batch
    run("embed", model, fasta, "-o", tmp_path / "x.npz", "--pooling", "none")
    with np.load(tmp_path / "x.npz", allow_pickle=False) as file:
        assert set(file.files) == {"ids", "embeddings_0", "embeddings_1", "embeddings_2"}
        assert file["ids"].tolist() == list(SEQUENCES)
        for index, expected in enumerate(theirs(model, pooling="none")):
            np.testing.assert_allclose(file[f"embeddings_{index}"], expected, atol=1e-5)


def test_npz_on_standard_output_is_the_same_file(run, model, fasta, tmp_path) -> None:
    run("embed", model, fasta, "-o", tmp_path / "x.npz")
    written = np.load(io.BytesIO(run("embed", model, fasta).stdout))
    with np.load(tmp_path / "x.npz") as file:
        np.testing.assert_array_equal(written["embeddings"], file["embeddings"])


@pytest.mark.parametrize("pooling", ["mean", "none"])
def test_jsonl(run, model, fasta, pooling) -> None:
    done = run("embed", model, fasta, "--format", "jsonl", "--pooling", pooling)
    lines = [json.loads(line) for line in done.out.splitlines()]
    assert [line["id"] for line in lines] == list(SEQUENCES)
    for line, expected in zip(lines, theirs(model, pooling=pooling)):
        np.testing.assert_array_equal(np.array(line["embedding"], np.float32), expected)


def test_a_terminal_gets_no_binary(run, model, fasta, monkeypatch) -> None:
    import sys

    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True)
    done = run("embed", model, fasta)
    assert (done.code, done.stdout) == (2, b"")
    assert "terminal" in done.stderr


def test_too_little_memory_says_what_would_do(run, model, fasta) -> None:
    done = run("embed", model, fasta, "--format", "jsonl", "--max-memory", "1MB")
    assert done.code == 1
    assert "max_memory is too small even for the shortest chunks" in done.stderr
    assert run("embed", model, fasta, "--format", "jsonl", "--max-memory", "1GB").out == (
        run("embed", model, fasta, "--format", "jsonl").out
    )
