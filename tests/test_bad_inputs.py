"""Every kind of bad input gives one error of the family: one line that names the thing and says what was due."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import random_ids, tiny_config, tiny_model

import crocuta
from crocuta import errors
from crocuta.checkpoints.files import write_tensors
from crocuta.config import BandsConfig
from crocuta.model.lm import Model
from crocuta.tokenizers.bytes import ByteTokenizer
from crocuta.tokenizers.dna import DNATokenizer
from crocuta.training.config import DataConfig, ModelSpec, OptimizerConfig
from crocuta.training.recipes import read_train_config

DNA, BYTES = DNATokenizer(), ByteTokenizer()


def broken_model() -> Model:
    model = tiny_model("stripe")
    with torch.no_grad():
        model.norm.scale[0] = math.nan
    return model


def saved(folder: Path) -> Path:
    crocuta.save(tiny_model("stripe"), DNA, folder / "model")
    return folder / "model"


def saved_with(folder: Path, name: str, tensor: torch.Tensor) -> Path:
    """A model folder whose weights someone has written anew, without the manifest."""
    path = saved(folder)
    (path / "manifest.json").unlink()
    (path / "model.safetensors").unlink()
    write_tensors(path / "model.safetensors", {**tiny_model("stripe").state_dict(), name: tensor})
    return path


def damaged(folder: Path) -> Path:
    """One flipped bit in the last weight."""
    path = saved(folder)
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "model.safetensors").write_bytes(content)
    return path


def saved_with_tokenizer(folder: Path) -> Path:
    path = saved(folder)
    (path / "manifest.json").unlink()
    (path / "tokenizer_config.json").write_text('{"type": "bytes", "vocab_size": 512}')
    return path


def edited(folder: Path, old: str, new: str) -> Path:
    path = saved(folder)
    (path / "manifest.json").unlink()
    text = (path / "config.json").read_text()
    assert old in text
    (path / "config.json").write_text(text.replace(old, new))
    return path


def train_on(folder: Path, text: str, name: str = "data.fa") -> None:
    (folder / name).write_text(text)
    spec = ModelSpec(config=tiny_config("stripe"))
    data = DataConfig(files=(str(folder / name),))
    crocuta.train(crocuta.TrainConfig(model=spec, data=data, tokenizer={"type": "dna"}, length=4), folder / "run")


def recipe(folder: Path, text: str) -> None:
    (folder / "run.yaml").write_text(text)
    read_train_config(folder / "run.yaml")


def implicit(folder: Path) -> None:
    dataclasses.replace(BandsConfig(), features=4)


Case = tuple[str, str, Callable[[Path], object]]
# name: (class of the error, what its message must hold in this order, separated by "...", what to do)
CASES: dict[str, Case] = {
    # files that are not there, or not what they should be
    "missing-model": (
        "InputError",
        "no such file or folder: got ...nowhere; expected a saved model; check the path",
        lambda folder: crocuta.load(folder / "nowhere"),
    ),
    "empty-folder": (
        "WeightsFormatError",
        'is no known checkpoint: expected crocuta: "format": "crocuta" in config.json',
        crocuta.load,
    ),
    "missing-data": (
        "InputError",
        "cannot read ...none.fa: got No such file or directory; expected a readable file",
        lambda folder: crocuta.train(
            crocuta.TrainConfig(
                model=ModelSpec(preset="tiny-modal"), data=DataConfig(files=(str(folder / "none.fa"),))
            ),
            folder / "run",
        ),
    ),
    "missing-recipe": (
        "InputError",
        "cannot read ...none.yaml: got ...No such file ...; check the path",
        lambda folder: read_train_config(folder / "none.yaml"),
    ),
    "missing-weights": (
        "WeightsFormatError",
        "model.safetensors",
        lambda folder: ((saved(folder) / "model.safetensors").unlink(), crocuta.load(folder / "model")),
    ),
    "missing-state": (
        "StateError",
        "none.safetensors is not a saved state: ... expected a file written by save",
        lambda folder: tiny_model("stripe").load_state(folder / "none.safetensors"),
    ),
    "damaged-weights": (
        "WeightsFormatError",
        "model.safetensors is damaged: got sha256 ...; expected ...; save again, or remove manifest.json if you",
        lambda folder: crocuta.load(damaged(folder)),
    ),
    # sequences
    "fasta-letter": (
        "SequenceFormatError",
        "data.fa:4: illegal letter in the sequence: got b'!'; expected letters of the alphabet 'iupac'",
        lambda folder: train_on(folder, ">a\nACGT\n>b\nAC!T\n"),
    ),
    "fasta-empty-record": (
        "SequenceFormatError",
        "data.fa:3: the record has no sequence: got 'b'",
        lambda folder: train_on(folder, ">a\nACGT\n>b\n>c\nACGT\n"),
    ),
    "fasta-no-record": (
        "SequenceFormatError",
        "data.fa:1: there is no record: expected a line that starts with '>'",
        lambda folder: train_on(folder, ""),
    ),
    "fasta-text-first": (
        "SequenceFormatError",
        "data.fa:1: text before the first '>': got b'ACGT'; expected >id",
        lambda folder: train_on(folder, "ACGT\n"),
    ),
    "jsonl-broken-line": (
        "SequenceFormatError",
        "data.jsonl:2: the line is not JSON: got ...; expected one object a line",
        lambda folder: train_on(folder, '{"text": "ACGT"}\n{"text": \n', "data.jsonl"),
    ),
    "jsonl-no-field": (
        "SequenceFormatError",
        "data.jsonl:1: the object has no field 'text': got the fields 'sequence'",
        lambda folder: train_on(folder, '{"sequence": "ACGT"}\n', "data.jsonl"),
    ),
    "empty-text": (
        "SequenceFormatError",
        "data.txt:1: the file is empty: expected text",
        lambda folder: train_on(folder, "", "data.txt"),
    ),
    "too-little-data": (
        "InputError",
        "the stream is shorter than one window: got 4 tokens; expected at least 5; train on shorter windows or",
        lambda folder: train_on(folder, ">a\nACGT\n"),
    ),
    # configurations
    "config-typo": (
        "ConfigError",
        "unknown field 'hiden_size': expected ModelConfig; did you mean 'hidden_size'?",
        lambda folder: crocuta.ModelConfig.from_json({**tiny_config("stripe").to_json(), "hiden_size": 8}),
    ),
    "saved-config-typo": (
        "ConfigError",
        "config.json: unknown field 'blocks[0].mixer.short_tap': expected HyenaConfig; did you mean 'short_taps'?",
        lambda folder: crocuta.load(edited(folder, '"short_taps"', '"short_tap"')),
    ),
    "recipe-typo": (
        "ConfigError",
        "unknown field 'optimizer.learning_rat': expected OptimizerConfig; did you mean 'learning_rate'?",
        lambda folder: recipe(folder, "optimizer: {learning_rat: 1}\nmodel: {preset: a}\ndata: {files: [a]}"),
    ),
    "recipe-value": (
        "ConfigError",
        "steps has the wrong type: got 'many' (str); expected int",
        lambda folder: recipe(folder, "steps: many\nmodel: {preset: a}\ndata: {files: [a]}"),
    ),
    "unknown-preset": (
        "ConfigError",
        "unknown preset: got 'evo2-7b'; expected a name in crocuta.presets.PRESETS; did you mean 'evo2-7b-8k'?",
        lambda folder: crocuta.preset("evo2-7b"),
    ),
    "impossible-config": ("ConfigError", "features is impossible: got 4; expected an odd number >= 3", implicit),
    "impossible-rate": (
        "ConfigError",
        "optimizer.learning_rate must be positive: got 0; expected > 0",
        lambda folder: OptimizerConfig(learning_rate=0),
    ),
    "impossible-sampling": (
        "InputError",
        "SamplingConfig.top_p is out of range: got 2; expected a number in (0, 1]",
        lambda folder: crocuta.SamplingConfig(top_p=2),
    ),
    # shapes, lengths and ids
    "wrong-shape": (
        "InputError",
        "ids must be a tensor [batch, length] of int64: got (5,) torch.int64; use torch.tensor(",
        lambda folder: tiny_model("stripe")(torch.zeros(5, dtype=torch.int64)),
    ),
    "wrong-dtype": (
        "InputError",
        "ids must be a tensor [batch, length] of int64: got (1, 5) torch.float32",
        lambda folder: tiny_model("stripe")(torch.zeros(1, 5)),
    ),
    "wrong-batch": (
        "StateError",
        "another number of rows than the input: got 3 rows; expected 2 rows",
        lambda folder: tiny_model("stripe").extend(random_ids(3, 4), tiny_model("stripe").init_state(2, 9)),
    ),
    "prompt-longer-than-the-state": (
        "StateError",
        "the sequence is longer than the model's state: got 60 tokens; expected at most 50; make the state with a",
        lambda folder: tiny_model("attention").extend(random_ids(1, 60), tiny_model("attention").init_state(1, 50)),
    ),
    "state-without-a-length": (
        "StateError",
        "needs to know how many tokens to make room for: got max_length=None; expected a number; pass max_length",
        lambda folder: tiny_model("attention").init_state(1),
    ),
    "prompt-longer-than-the-filters": (
        "InputError",
        "prompt and new tokens are longer than the model's filters are defined for: got 201 tokens; expected at most"
        " 160; ask for fewer tokens",
        lambda folder: crocuta.generate(tiny_model("implicit"), DNA, ["A"], max_tokens=200),
    ),
    "empty-prompt": (
        "InputError",
        "prompt 1 is empty",
        lambda folder: crocuta.generate(tiny_model("stripe"), DNA, ["A", ""], max_tokens=2),
    ),
    "empty-sequence": (
        "InputError",
        "sequence 0 is empty",
        lambda folder: crocuta.embed(tiny_model("stripe"), DNA, [""]),
    ),
    "layer": (
        "InputError",
        "no such layer: got layer=9; expected None or a number from -5 to 5",
        lambda folder: crocuta.embed(tiny_model("stripe"), DNA, ["A"], layer=9),
    ),
    # vocabularies
    "foreign-ids": (
        "InputError",
        "an id is outside the vocabulary: got ids from 3 to 99; expected 0 to 15; use the tokenizer this model was",
        lambda folder: tiny_model("stripe")(torch.tensor([[3, 99]])),
    ),
    "foreign-text": (
        "InputError",
        "sequence 0 has an id outside the vocabulary: got ids from 101 to 111; expected 0 to 15; use the tokenizer",
        lambda folder: crocuta.score(tiny_model("stripe"), BYTES, ["hello"]),
    ),
    "saving-a-foreign-tokenizer": (
        "TokenizerError",
        "the tokenizer does not fit the model of ...model: got a tokenizer with vocab_size=512; expected at most the"
        " model's vocab_size=16; use the tokenizer that the model was trained with",
        lambda folder: crocuta.save(tiny_model("stripe"), BYTES, folder / "model"),
    ),
    "loading-a-foreign-tokenizer": (
        "TokenizerError",
        "the tokenizer does not fit the model of ...model: got a tokenizer with vocab_size=512; expected at most",
        lambda folder: crocuta.load(saved_with_tokenizer(folder)),
    ),
    "text-without-a-tokenizer": (
        "TokenizerError",
        "sequence 0 is text and there is no tokenizer; pass ids, or a tokenizer",
        lambda folder: crocuta.score(tiny_model("stripe"), None, ["hello"]),
    ),
    "strands-of-words": (
        "TokenizerError",
        "both strands need a tokenizer of nucleotides",
        lambda folder: crocuta.score(tiny_model("stripe"), None, [[7, 8]], both_strands=True),
    ),
    # numbers that are none
    "nan-weights-saved": (
        "NonFiniteError",
        "norm.scale has NaN or infinite values; nothing was saved to ...model",
        lambda folder: crocuta.save(broken_model(), DNA, folder / "model"),
    ),
    "nan-weights-loaded": (
        "WeightsFormatError",
        "norm.scale of ...model has NaN or infinite values: expected finite weights",
        lambda folder: crocuta.load(saved_with(folder, "norm.scale", torch.full((8,), math.nan))),
    ),
    "misshapen-weights": (
        "WeightsFormatError",
        "norm.scale",
        lambda folder: crocuta.load(saved_with(folder, "norm.scale", torch.zeros(9))),
    ),
    "foreign-weights": (
        "WeightsFormatError",
        "norm.weight",
        lambda folder: crocuta.load(saved_with(folder, "norm.weight", torch.zeros(8))),
    ),
    "nan-generated": (
        "NonFiniteError",
        "logits to sample from are no distribution: got a largest logit of nan in row 0; ...; its state is finite",
        lambda folder: crocuta.generate(broken_model(), DNA, ["ACG"], max_tokens=3),
    ),
    "nan-scored": (
        "NonFiniteError",
        "the model's logits are not a number for sequence 0; check its weights",
        lambda folder: crocuta.score(broken_model(), DNA, ["ACG"]),
    ),
    "nan-embedded": (
        "NonFiniteError",
        "the hidden states of sequence 0 are not finite; check the model's weights",
        lambda folder: crocuta.embed(broken_model(), DNA, ["ACG"]),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_one_clear_error(name, tmp_path):
    kind, message, call = CASES[name]
    with pytest.raises(crocuta.CrocutaError) as failure:
        call(tmp_path)
    assert type(failure.value) is getattr(errors, kind)
    text, position = str(failure.value), 0
    assert "\n" not in text
    assert len(text) < 500
    for part in message.split("..."):
        position = text.find(part.strip(), position)
        assert position >= 0, f"{part!r} is not in {text!r}"


@pytest.mark.parametrize("name", ["nan-weights-saved", "saving-a-foreign-tokenizer", "missing-data", "fasta-letter"])
def test_nothing_is_left_behind(name, tmp_path):
    _, _, call = CASES[name]
    with pytest.raises(crocuta.CrocutaError):
        call(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {"data.fa"}
