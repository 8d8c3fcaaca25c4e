"""One file and a few overrides describe a run; whatever is wrong with them is one line that says so."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from crocuta.config import ComplexModalFilterConfig
from crocuta.errors import ConfigError, InputError
from crocuta.schema import encode
from crocuta.training.config import TrainConfig
from crocuta.training.recipes import read_train_config

YAML = """
# comments are welcome
model:
  striped:
    hidden_size: 64
    num_layers: 3
    num_heads: 4
    attention_layers: [2]
    filter: {type: modal_complex, modes: 8, timescales: [1, 512.0]}
data: {files: [a.txt, sub/b.txt], held_out: 0.1}
tokenizer: {type: bytes, vocab_size: 256}
steps: 70
optimizer:
  learning_rate: 3e-3
  betas: [0.9, 0.95]
sample: {prompt: "yes", tokens: 5}
"""


def write(folder: Path, text: str | bytes, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_yaml(tmp_path):
    config = read_train_config(write(tmp_path, YAML))
    striped = config.model.striped
    assert (striped.hidden_size, striped.attention_layers) == (64, (2,))
    assert striped.filter == ComplexModalFilterConfig(modes=8, timescales=(1.0, 512.0))
    assert config.data.files == (str(tmp_path / "a.txt"), str(tmp_path / "sub" / "b.txt"))
    assert config.optimizer.learning_rate == 0.003
    assert config.optimizer.betas == (0.9, 0.95)
    assert config.sample.prompt == "yes"
    assert (config.steps, config.seed, config.batch_size) == (70, 0, 8)


def test_json_is_the_same_and_goes_round(tmp_path):
    config = read_train_config(write(tmp_path, YAML))
    again = read_train_config(write(tmp_path, json.dumps(encode(config)), "train.json"))
    assert again == config


@pytest.mark.parametrize(
    ("text", "value"),
    [("3e-3", 0.003), ("1E2", 100.0), ("1.e-2", 0.01), (".5e-1", 0.05), ("1", 1.0), ("0.1", 0.1), ("+2e0", 2.0)],
)
def test_every_way_to_write_a_number_in_yaml(tmp_path, text, value):
    path = write(
        tmp_path, f"model: {{preset: tiny-modal}}\ndata: {{files: [a]}}\noptimizer: {{learning_rate: {text}}}\n"
    )
    assert read_train_config(path).optimizer.learning_rate == value


def test_overrides_win_and_are_read_as_json_or_text(tmp_path):
    overrides = [
        "steps=9",
        "optimizer.learning_rate=1e-4",
        'data.files=["x.fa", "y.fa"]',
        "data.reverse_complement=true",
        "model.striped.filter.modes=4",
        "device=cuda",
        "sample=null",
        "time_limit=12",
        "tokenizer.type=dna",
        "tokenizer.vocab_size=16",
    ]
    config = read_train_config(write(tmp_path, YAML), overrides)
    assert (config.steps, config.optimizer.learning_rate, config.time_limit) == (9, 1e-4, 12.0)
    assert config.data.files == ("x.fa", "y.fa"), "paths of overrides belong to the working folder"
    assert config.data.reverse_complement
    assert config.model.striped.filter.modes == 4
    assert config.device == "cuda"
    assert config.sample is None
    assert config.tokenizer == {"type": "dna", "vocab_size": 16}
    unchanged = dataclasses.replace(read_train_config(write(tmp_path, YAML)), steps=9)
    assert unchanged == read_train_config(write(tmp_path, YAML), ["steps=9"])


def test_the_last_override_wins_and_a_value_may_hold_an_equals_sign(tmp_path):
    config = read_train_config(write(tmp_path, YAML), ["steps=9", "steps=11", "sample.prompt=a=b"])
    assert (config.steps, config.sample.prompt) == (11, "a=b")


def test_overrides_alone_are_enough():
    config = read_train_config(None, ["model.preset=tiny-modal", 'data.files=["a.txt"]', "data.held_out=0.2"])
    assert (config.model.preset, config.data.held_out) == ("tiny-modal", 0.2)


def test_paths_of_the_file_are_relative_to_it(tmp_path):
    text = (
        "model: {load: ../model}\ntokenizer: {type: pieces, file: t/tokenizer.json}\n"
        'data: {files: ["-", /abs/a.txt, b.txt]}\n'
    )
    (tmp_path / "sub").mkdir()
    config = read_train_config(write(tmp_path / "sub", text))
    folder = tmp_path / "sub"
    assert config.model.load == str(folder / "../model")
    assert config.tokenizer["file"] == str(folder / "t/tokenizer.json")
    assert config.data.files == ("-", "/abs/a.txt", str(folder / "b.txt"))


def test_a_run_is_frozen_data():
    config = read_train_config(None, ["model.preset=tiny-modal", 'data.files=["a.txt"]'])
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.steps = 1  # type: ignore[misc]
    assert isinstance(config, TrainConfig)


BASE = "model: {preset: tiny-modal}\ndata: {files: [a.txt]}\n"
WRONG = {
    "typo": (BASE + "stesp: 3", ConfigError, "unknown field 'stesp': expected TrainConfig; did you mean 'steps'?"),
    "deep-typo": (
        BASE + "optimizer: {learning_rat: 0.1}",
        ConfigError,
        "unknown field 'optimizer.learning_rat': expected OptimizerConfig; did you mean 'learning_rate'?",
    ),
    "filter-typo": (
        YAML.replace("modal_complex", "modal_komplex"),
        ConfigError,
        "model.striped.filter.type names no known kind",
    ),
    "missing": ("model: {preset: tiny-modal}", ConfigError, "missing field 'data': expected data of TrainConfig"),
    "type": (BASE + "steps: many", ConfigError, "steps has the wrong type: got 'many' (str); expected int"),
    "yes": (BASE + "steps: yes", ConfigError, "steps has the wrong type: got True (bool); expected int"),
    "fraction": (BASE + "steps: 1.5", ConfigError, "steps has the wrong type: got 1.5 (float); expected int"),
    "range": (BASE + "steps: 0", ConfigError, "steps must be positive: got 0; expected >= 1"),
    "choice": (BASE + "precision: fp16", ConfigError, "precision has an unknown value: got 'fp16' (str); expected"),
    "no-model": (
        "model: {}\ndata: {files: [a]}",
        ConfigError,
        "model needs exactly one description: got none; expected",
    ),
    "two-models": (
        "model: {preset: tiny-modal, load: x}\ndata: {files: [a]}",
        ConfigError,
        "model needs exactly one description: got ['preset', 'load']",
    ),
    "one-file": (
        "model: {preset: a}\ndata: {files: a.txt}",
        ConfigError,
        "data.files must be a list: got 'a.txt' (str)",
    ),
    "no-files": ("model: {preset: a}\ndata: {files: []}", ConfigError, "data.files is empty"),
    "empty": ("", ConfigError, "run.yaml does not describe a run: got NoneType; expected a mapping"),
    "list": ("- 1", ConfigError, "run.yaml does not describe a run: got list; expected a mapping"),
    "twice": (BASE + "steps: 3\nsteps: 5", ConfigError, "run.yaml is not YAML: got duplicate key 'steps'"),
    "twice-deep": (BASE + "optimizer: {eps: 1e-8, clip: 1, eps: 1e-6}", ConfigError, "duplicate key 'eps'"),
    "broken": ("a: [1,\n b: {", ConfigError, "run.yaml is not YAML: got while parsing a flow"),
    "tab": ("model:\n\tpreset: x", ConfigError, "run.yaml is not YAML: got while scanning"),
    "python": ("model: !!python/object/apply:os.system ['true']", ConfigError, "could not determine a constructor"),
    "deep": ("[" * 5000, ConfigError, "run.yaml is not YAML"),
    "bytes": (b"\xff\xfe\0", InputError, "run.yaml: got 'utf-8' codec can't decode"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files_are_named(name, tmp_path):
    text, kind, message = WRONG[name]
    with pytest.raises(kind) as failure:
        read_train_config(write(tmp_path, text))
    assert message in str(failure.value)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model": ', "run.json is not JSON: got Expecting value: line 1 column 11"),
        ('{"steps": 3, "steps": 4}', "run.json is not JSON: got duplicate key 'steps'"),
        ('{"steps": NaN}', "run.json is not JSON: got NaN is not JSON"),
        ("[" * 100_000, "run.json is not JSON: got nested too deeply"),
        ("[1]", "run.json does not describe a run: got list; expected a mapping"),
    ],
)
def test_wrong_json_is_named(text, message, tmp_path):
    with pytest.raises(ConfigError) as failure:
        read_train_config(write(tmp_path, text, "run.json"))
    assert message in str(failure.value)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*none\.yaml: got .*No such file.*; check the path"):
        read_train_config(tmp_path / "none.yaml")
    with pytest.raises(InputError, match=r"cannot read .*: got .*directory"):
        read_train_config(tmp_path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "an override must look like key=value: got 'steps'"),
        ("=3", "an override must look like key=value: got '=3'"),
        ("stepz=1", "unknown field 'stepz': expected TrainConfig; did you mean 'steps'?"),
        ("optimizer.clp=1", "unknown field 'optimizer.clp': expected OptimizerConfig; did you mean 'clip'?"),
        ("data.files.0=x", "cannot set 'data.files.0': 'files' is not a mapping"),
        ("steps=few", "steps has the wrong type: got 'few' (str); expected int"),
        ("seed=1.5", "seed has the wrong type: got 1.5 (float); expected int"),
    ],
)
def test_wrong_overrides_are_named(override, message, tmp_path):
    with pytest.raises(ConfigError) as failure:
        read_train_config(write(tmp_path, BASE), [override])
    assert message in str(failure.value)
