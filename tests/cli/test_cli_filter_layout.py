"""``--filter-layout``: every verb that reads a model takes what ``load`` takes."""

import json

import numpy as np
import pytest
from hyenadna_orders import LAYOUTS, checkpoint

import crocuta


@pytest.fixture
def folder(tmp_path):
    return checkpoint(tmp_path / "order-3", 3)


def test_without_it_the_error_says_why(run, folder) -> None:
    for verb in ("score", "embed", "inspect"):
        done = run(verb, folder, *(["-o", folder / "x.npz"] if verb == "embed" else []), stdin=b"ACGTACGT\n")
        assert done.code == 1
        assert "filter_layout must be chosen for order 3" in done.stderr
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_verb_reads_the_model_that_was_chosen(run, folder, tmp_path, layout) -> None:
    model, tokenizer = crocuta.load(folder, filter_layout=layout)
    other, _ = crocuta.load(folder, filter_layout=next(name for name in LAYOUTS if name != layout))
    flag = ("--filter-layout", layout)

    done = run("score", folder, *flag, stdin=b"ACGTACGT\n")
    (score,), (another,) = crocuta.score(model, tokenizer, ["ACGTACGT"]), crocuta.score(other, tokenizer, ["ACGTACGT"])
    assert float(done.out.splitlines()[1].split("\t")[2]) == score.total != another.total

    assert run("embed", folder, *flag, "-o", tmp_path / "x.npz", stdin=b"ACGTACGT\n").code == 0
    (vector,) = crocuta.embed(model, tokenizer, ["ACGTACGT"])
    assert np.array_equal(np.load(tmp_path / "x.npz")["embeddings"][0], vector)

    report = json.loads(run("inspect", folder, *flag, "--json").out)
    assert report["config"] == model.config.to_json()

    arguments = ("--prompt", "ACGT", "--greedy", "--max-tokens", "12", "--ignore-eos")
    crocuta.save(model, tokenizer, tmp_path / "ours")
    crocuta.save(other, tokenizer, tmp_path / "other")
    done = run("generate", folder, *flag, *arguments)
    assert done.code == 0
    assert done.out == run("generate", tmp_path / "ours", *arguments).out
    assert done.out != run("generate", tmp_path / "other", *arguments).out

    assert run("convert", folder, tmp_path / "converted", "--to", "native", *flag, "--verify").code == 0
    assert crocuta.load(tmp_path / "converted")[0].config == model.config
