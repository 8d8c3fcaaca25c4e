"""``crocuta predict``: labels and numbers of an encoder's head, as ``encode`` gives them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import tiny_model

import crocuta
from crocuta.config import ClassificationConfig, HeadConfig, MeanPoolingConfig, PoolingConfig, RegressionConfig
from crocuta.data.label_map import LabelMap
from crocuta.tokenizers.dna import DNATokenizer

SEQUENCES = {"a": "ACGTACGT", "b b": "GATTACA", "c": "T"}
FASTA = "".join(f">{name}\n{text}\n" for name, text in SEQUENCES.items()).encode()
IDS = ["a", "b", "c"]
MEAN = MeanPoolingConfig()


def folder(path: Path, head: HeadConfig | None, pooling: PoolingConfig | None = MEAN) -> Path:
    encoder = crocuta.encoder_from(tiny_model("stripe", seed=1), pooling=pooling, head=head, seed=2)
    if encoder.head is not None:
        encoder.head.weight.data.mul_(3)
    crocuta.save(encoder, DNATokenizer(), path)
    return path


def outputs(path: Path) -> list[np.ndarray]:
    encoder, tokenizer = crocuta.load_encoder(path)
    return crocuta.encode(encoder, tokenizer, list(SEQUENCES.values()))


@pytest.mark.parametrize("named", [True, False])
def test_labels_and_probabilities(run, tmp_path, named) -> None:
    path = folder(tmp_path / "encoder", ClassificationConfig(labels=3))
    names = ["no gene", "forward", "reverse"]
    if named:
        LabelMap(tuple(names)).save(path)
    else:
        names = ["0", "1", "2"]
    expected = [torch.softmax(torch.from_numpy(logits).double(), 0).numpy() for logits in outputs(path)]
    done = run("predict", path, stdin=FASTA)
    assert done.code == 0
    header, *lines = done.out.splitlines()
    assert header == "id\tlabel\tprobability"
    for line, name, probabilities in zip(lines, IDS, expected, strict=True):
        identifier, label, probability = line.split("\t")
        assert (identifier, label) == (name, names[probabilities.argmax()])
        assert float(probability) == pytest.approx(probabilities.max(), rel=1e-6)
    for line, probabilities in zip(
        run("predict", path, "--format", "jsonl", stdin=FASTA).out.splitlines(), expected, strict=True
    ):
        value = json.loads(line)
        assert list(value["probabilities"]) == names
        np.testing.assert_allclose(list(value["probabilities"].values()), probabilities, rtol=1e-6)
        assert value["label"] == names[probabilities.argmax()]


def test_a_label_for_every_token(run, tmp_path) -> None:
    path = folder(tmp_path / "encoder", ClassificationConfig(labels=2), None)
    LabelMap(("H", "E")).save(path)
    _, *lines = run("predict", path, stdin=FASTA).out.splitlines()
    for line, name, logits in zip(lines, IDS, outputs(path), strict=True):
        assert line == f"{name}\t{' '.join('HE'[i] for i in logits.argmax(1))}"


def test_the_targets_of_a_regression(run, tmp_path) -> None:
    path = folder(tmp_path / "encoder", RegressionConfig(targets=2))
    header, *lines = run("predict", path, stdin=FASTA).out.splitlines()
    assert header == "id\tvalues"
    for line, name, values in zip(lines, IDS, outputs(path), strict=True):
        identifier, cells = line.split("\t")
        assert identifier == name
        np.testing.assert_allclose([float(cell) for cell in cells.split()], values, rtol=1e-6)
    first = json.loads(run("predict", path, "--format", "jsonl", stdin=FASTA).out.splitlines()[0])
    np.testing.assert_allclose(first["values"], outputs(path)[0], rtol=1e-6)


def test_what_is_refused(run, tmp_path) -> None:
    done = run("predict", folder(tmp_path / "bare", None), stdin=FASTA)
    assert done.code == 1
    assert "has no head" in done.stderr
    path = folder(tmp_path / "encoder", ClassificationConfig(labels=3))
    LabelMap(("x", "y")).save(path)
    assert "labels.json does not fit the head: got 2; expected 3" in run("predict", path, stdin=FASTA).stderr
    crocuta.save(tiny_model("stripe"), DNATokenizer(), tmp_path / "model")
    assert "is not an encoder: got a model" in run("predict", tmp_path / "model", stdin=FASTA).stderr
    (path / "labels.json").unlink()
    assert "record 'x' is longer than" in run("predict", path, stdin=b">x\n" + b"A" * 200 + b"\n").stderr
