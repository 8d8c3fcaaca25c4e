"""What people do wrong: each gives one clear line on standard error, and an exit code."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from crocuta.checkpoints.native import save
from crocuta.model.build import build_model
from crocuta.presets import preset
from crocuta.tokenizers.bytes import ByteTokenizer

# Written into the folder that the commands run in, where M is a model.
FILES = {
    "good.fa": ">a\nACGT\n",
    "letters.fa": ">a\nACGT\nAC!T\n",
    "empty_record.fa": ">a\n>b\nACGT\n",
    "no_header.fa": "ACGT\n",
    "empty.txt": "",
    "one_letter.fa": ">solo\nA\n",
    "broken.jsonl": '{"text": "hi"}\n{"text": \n',
    "no_field.jsonl": '{"txt": "hi"}\n',
    "cut.fa.gz": "not gzip",
    "run.json": json.dumps({"model": {"preset": "tiny-modal"}, "data": {"files": ["missing.txt"]}}),
    "typed.json": json.dumps({"model": {"preset": "tiny-modal"}, "data": {"files": ["good.fa"]}}),
    "typo.json": json.dumps({"model": {"preset": "tiny-modal"}, "data": {"files": ["a.txt"]}, "lenght": 3}),
    "broken.yaml": "model: [",
    "no_model.json": "{}",
    "other.json": '{"architectures": ["GPT2"]}',
    "newer.json": '{"format": "crocuta", "version": 99}',
}

TABLE = {
    "missing model": (["score", "absent", "good.fa"], 1, ["absent", "no such file or folder"]),
    "folder without a model": (["score", "nothing", "good.fa"], 1, ["nothing", "config.json"]),
    "missing file": (["score", "M", "absent.fa"], 1, ["absent.fa"]),
    "folder as a file": (["score", "M", "nothing"], 1, ["nothing"]),
    "illegal letter": (["score", "M", "letters.fa"], 1, ["letters.fa:3", "'!'"]),
    "record without sequence": (["embed", "M", "empty_record.fa", "-o", "x"], 1, ["empty_record.fa:1", "'a'"]),
    "no header": (["score", "M", "no_header.fa"], 1, ["no_header.fa:1"]),
    "empty file": (["score", "M", "empty.txt"], 1, ["empty.txt:1"]),
    "empty standard input": (["score", "M"], 1, ["<stdin>:1"]),
    "nothing to score": (["score", "M", "one_letter.fa"], 1, ["record 'solo'", "at least 2"]),
    "broken JSON": (["score", "M", "broken.jsonl"], 1, ["broken.jsonl:2"]),
    "missing field": (["embed", "M", "no_field.jsonl", "-o", "x"], 1, ["no_field.jsonl:1", "'text'"]),
    "broken gzip": (["score", "M", "cut.fa.gz"], 1, ["cut.fa.gz", "gzip"]),
    "no BOS token": (["score", "M", "good.fa", "--bos"], 1, ["BOS"]),
    "no such layer": (["embed", "M", "good.fa", "-o", "x", "--layer", "9"], 1, ["layer=9"]),
    "no such device": (["score", "M", "good.fa", "--device", "cuda:99"], 1, ["cuda:99", "cpu"]),
    "unknown device": (["score", "M", "good.fa", "--device", "tpu9"], 1, ["tpu9", "cpu"]),
    "output in no folder": (["score", "M", "good.fa", "-o", "absent/x.tsv"], 1, ["absent"]),
    "NaN weights": (["score", "NAN", "good.fa"], 1, ["NaN", "embedding.weight"]),
    "vocabulary of the tokenizer": (["score", "VOCAB", "good.fa"], 1, ["600", "512"]),
    "model without tokenizer": (["generate", "MUTE", "-p", "x"], 1, ["MUTE", "tokenizer"]),
    "changed weights": (["score", "CHANGED", "good.fa"], 1, ["CHANGED"]),
    "temperature": (["generate", "M", "-p", "x", "--temperature", "-1"], 1, ["temperature", "-1"]),
    "top-p": (["generate", "M", "-p", "x", "--top-p", "2"], 1, ["top_p", "2"]),
    "no tokens": (["generate", "M", "-p", "x", "--max-tokens", "0"], 1, ["max_tokens"]),
    "past the filters": (["generate", "SHORT", "-p", "x", "-n", "999"], 1, ["1000 tokens", "at most 256"]),
    "typo in the file": (["train", "typo.json", "-o", "r"], 1, ["'lenght'", "did you mean 'length'"]),
    "typo in an override": (["train", "run.json", "lenght=3", "-o", "r"], 1, ["'lenght'", "did you mean 'length'"]),
    "override without =": (["train", "run.json", "steps", "-o", "r"], 1, ["'steps'", "key=value"]),
    "impossible value": (["train", "run.json", "steps=0", "-o", "r"], 1, ["steps", "0"]),
    "wrong type": (["train", "run.json", "steps=many", "-o", "r"], 1, ["steps", "'many'", "int"]),
    "missing data": (["train", "run.json", "-o", "r"], 1, ["missing.txt"]),
    "missing description": (["train", "absent.yaml", "-o", "r"], 1, ["absent.yaml"]),
    "broken YAML": (["train", "broken.yaml", "-o", "r"], 1, ["broken.yaml", "YAML"]),
    "no model": (["train", "no_model.json", "-o", "r"], 1, ["model"]),
    "nothing to resume": (["train", "typed.json", "-o", "r", "--resume"], 1, ["no run to resume"]),
    "unknown preset": (["inspect", "evo2-7b-8j"], 1, ["'evo2-7b-8j'", "did you mean 'evo2-7b-8k'"]),
    "missing configuration": (["inspect", "absent/config.json"], 1, ["absent/config.json"]),
    "another's configuration": (["inspect", "other.json"], 1, ["architectures"]),
    "newer configuration": (["inspect", "newer.json"], 1, ["newer.json", "99"]),
    "impossible length": (["inspect", "tiny-implicit", "-l", "300"], 1, ["300", "256"]),
    "unknown tokenizer": (["prepare", "good.fa", "-o", "p", "--tokenizer", "bites"], 1, ["bites"]),
    "missing input": (["prepare", "absent.txt", "-o", "p", "--tokenizer", "bytes"], 1, ["absent.txt"]),
    "not FASTA after all": (["generate", "M", "-p", "a b", "-n", "3", "--format", "fasta"], 1, ["--format jsonl"]),
    "bad --format": (["score", "M", "good.fa", "--format", "xml"], 2, ["--format", "xml", "crocuta score --help"]),
    "bad --dtype": (["embed", "M", "good.fa", "--dtype", "int8"], 2, ["--dtype", "bf16"]),
    "table of tokens": (["score", "M", "good.fa", "--per-token", "--format", "tsv"], 2, ["jsonl"]),
    "missing argument": (["score"], 2, ["MODEL"]),
    "missing option": (["prepare", "good.fa", "-o", "p"], 2, ["--tokenizer"]),
    "no folder for the run": (["train", "run.json"], 2, ["--output"]),
    "resume and overwrite": (["train", "run.json", "-o", "r", "--resume", "--overwrite"], 2, ["--overwrite"]),
    "two sources of prompts": (["generate", "M", "-p", "x", "-f", "good.fa"], 2, ["--file"]),
    "unknown option": (["score", "M", "good.fa", "--frmat", "tsv"], 2, ["--frmat"]),
    "unknown verb": (["scoer", "M"], 2, ["scoer", "crocuta --help"]),
    "not a number": (["generate", "M", "-p", "x", "--seed", "x"], 2, ["--seed"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model):
    """All of FILES, and models with something wrong."""
    folder = tmp_path_factory.mktemp("errors")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    (folder / "nothing").mkdir()
    (folder / "M").symlink_to(model)
    made = build_model(preset("tiny-modal"))
    for name in ("NAN", "VOCAB", "CHANGED"):
        save(made, ByteTokenizer(), folder / name)
    save(made, None, folder / "MUTE")
    save(build_model(preset("tiny-implicit")), ByteTokenizer(), folder / "SHORT")
    for name in ("NAN", "CHANGED"):
        weights = load_file(folder / name / "model.safetensors")
        weights["embedding.weight"][3, 3] = np.nan if name == "NAN" else 1
        save_file(weights, folder / name / "model.safetensors")
    (folder / "VOCAB" / "tokenizer_config.json").write_text('{"type": "bytes", "vocab_size": 600}')
    for name in ("NAN", "VOCAB"):
        (folder / name / "manifest.json").unlink()  # as for files put together by hand
    return folder


@pytest.mark.parametrize("case", TABLE)
def test_bad_input(run, folder, monkeypatch, case) -> None:
    arguments, code, words = TABLE[case]
    monkeypatch.chdir(folder)
    done = run(*arguments)
    assert done.code == code
    assert done.stderr.startswith("crocuta: error: ")
    assert done.stderr.count("\n") == 1
    assert done.stderr.endswith("\n")
    assert [word for word in words if word not in done.stderr] == []
    assert not (folder / "x").exists()
    assert not (folder / "r").exists()


def test_standard_input_of_a_terminal_is_not_waited_for(run, model, monkeypatch) -> None:
    done = run("score", model, terminal=True)
    assert done.code == 2
    assert "pipe something in" in done.stderr


def test_results_before_the_error_stand(run, model, folder, monkeypatch) -> None:
    from crocuta.cli import records

    monkeypatch.setattr(records, "RECORDS", 1)
    done = run("score", model, folder / "good.fa", folder / "letters.fa")
    assert done.code == 1
    assert [line.split("\t")[0] for line in done.out.splitlines()] == ["id", "a"]


def test_our_own_bugs_keep_their_traceback(run, model, folder, monkeypatch) -> None:
    from crocuta.inference import score

    def broken(*args, **kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr(score, "score", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        run("score", model, folder / "good.fa")


def test_a_reader_that_leaves_is_no_error(model, tmp_path) -> None:
    """As in ``crocuta score ... | head -1``: no message, and the exit code that a shell expects."""
    path = tmp_path / "many.fa"
    path.write_text("".join(f">{'record' * 20}{i}\nACGT\n" for i in range(2000)))
    command = [sys.executable, "-c", "from crocuta.cli import main; main()", "score", str(model), str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"id\ttokens\ttotal\tmean\n"
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 141
