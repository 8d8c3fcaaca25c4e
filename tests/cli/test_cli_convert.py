"""``crocuta convert``: what it prints, and that the folder it leaves is the model."""

from pathlib import Path

import pytest
import torch

from crocuta.checkpoints.load import load

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


def test_it_prints_the_folder_and_with_verify_the_difference(run, tmp_path) -> None:
    done = run("convert", GOLDEN / "hyenadna-tiny-ckpt", tmp_path / "hf", "--to", "hyenadna-hf", "--verify")
    assert (done.code, done.out) == (0, f"{tmp_path / 'hf'}\nlogits differ by at most 0\n")
    before, after = (load(path)[0].state_dict() for path in (GOLDEN / "hyenadna-tiny-ckpt", tmp_path / "hf"))
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_a_converted_model_scores_as_before(run, tmp_path) -> None:
    assert run("convert", GOLDEN / "evo2-8k-tiny", tmp_path / "native").code == 0
    first, second = (
        run("score", model, "--format", "jsonl", stdin=b"ACGTACGTTT\n").out
        for model in (GOLDEN / "evo2-8k-tiny", tmp_path / "native")
    )
    assert first == second
    assert '"tokens": 9' in first


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere/at/all", "new"], 1, "no such file or folder: got nowhere/at/all"),
        ([GOLDEN / "evo2-8k-tiny", "there"], 1, "there exists"),
        ([GOLDEN / "evo2-8k-tiny", "new", "--to", "evo1-hf"], 1, "this model cannot be a stripedhyena checkpoint"),
        ([GOLDEN / "evo2-8k-tiny", "new", "--to", "gguf"], 2, "gguf"),
    ],
)
def test_what_cannot_be_converted(run, tmp_path, monkeypatch, arguments, code, message) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    done = run("convert", *arguments)
    assert done.code == code
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]
