"""Whole runs on hidden tokens: what they learn, report, refuse, and that they resume to the same bits."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import random
import signal
from pathlib import Path

import pytest
import torch
from tiny_models import VOCABULARY
from tiny_run import metrics_of, tiny_run, write_text

from crocuta.cli.app import app
from crocuta.config import (
    BidirectionalHyenaConfig,
    BlockConfig,
    ExplicitFilterConfig,
    GatedMLPConfig,
    HyenaConfig,
    MixerConfig,
    ModelConfig,
)
from crocuta.errors import ConfigError
from crocuta.tokenizers.dna import DNATokenizer
from crocuta.training import loop
from crocuta.training.config import DataConfig, MaskedConfig, ModelSpec, OptimizerConfig, SampleConfig, TrainConfig
from crocuta.training.evaluate import MaskedHeldOut, evaluate_masked
from crocuta.training.loop import train
from crocuta.training.masking import EVALUATION_SEED, Masking
from crocuta.training.report import read_curves

DNA = DNATokenizer()


def write_two_sided(path: Path, pairs: int = 3000) -> Path:
    """A or C at random, and between two of them G if they are equal, else T. 2 bits a base for who sees no other.

    A hidden G or T stands for 1 bit to all who see one side alone, so they need at least 0.8 / 2 = 0.4 bits a chosen
    base (four fifths of which are hidden); both sides tell everything but what is hidden beside it.
    """
    draw = random.Random(1)
    values = [draw.random() < 0.5 for _ in range(pairs + 1)]
    path.write_text(">a\n" + "".join("AC"[a] + "GT"[a != b] for a, b in zip(values, values[1:])) + "\n")
    return path


def two_sided_run(text: Path, mixer: MixerConfig, **changes: object) -> TrainConfig:
    block = BlockConfig(mixer=mixer, mlp=GatedMLPConfig(intermediate_size=32))
    config = TrainConfig(
        model=ModelSpec(config=ModelConfig(vocab_size=VOCABULARY, hidden_size=16, blocks=(block, block))),
        data=DataConfig(files=(str(text),), held_out=0.2),
        tokenizer={"type": "dna"},
        objective=MaskedConfig(),
        length=64,
        batch_size=8,
        steps=150,
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=10),
        evaluate_every=50,
        evaluate_tokens=600,
        checkpoint_every=1000,
        threads=1,
    )
    return dataclasses.replace(config, **changes)


BOTH, LEFT = (kind(filter=ExplicitFilterConfig(taps=4)) for kind in (BidirectionalHyenaConfig, HyenaConfig))


def test_a_model_that_sees_both_sides_learns_what_one_side_does_not_tell(tmp_path):
    text = write_two_sided(tmp_path / "text.fa")
    both = train(two_sided_run(text, BOTH), tmp_path / "both").held_out
    left = train(two_sided_run(text, LEFT), tmp_path / "left").held_out
    assert isinstance(both, MaskedHeldOut)
    assert isinstance(left, MaskedHeldOut)
    assert both.tokens == left.tokens > 150
    assert both.bits_per_masked_token < 0.35
    assert left.bits_per_masked_token > 0.45


def test_what_a_run_reports_has_its_own_name(tmp_path, capsys):
    text = write_two_sided(tmp_path / "text.fa", 500)
    config = two_sided_run(text, BOTH, steps=4, evaluate_every=2)
    outcome = train(config, tmp_path / "run")
    lines = metrics_of(tmp_path / "run")
    for line in lines:
        if line["event"] in ("eval", "final"):
            assert set(line) == {"event", "step", "masked_bits", "masked_tokens"}
    assert [line["event"] for line in lines] == ["train", "eval", "eval", "final"]
    assert lines[-1]["masked_bits"] == outcome.held_out.bits_per_masked_token
    assert 1 < lines[-1]["masked_bits"] < 5
    curve = read_curves(tmp_path / "run" / "metrics.jsonl").held_out
    assert curve.tolist() == [[line["step"], line["masked_bits"]] for line in lines if line["event"] == "eval"]
    shown = capsys.readouterr().err
    assert "held-out (bits/masked token)" in shown
    assert "loss (bits/masked token)" in shown
    assert "byte" not in shown
    rule = Masking(config.objective, DNA, VOCABULARY, EVALUATION_SEED)
    assert evaluate_masked(outcome.model, outcome.held_out_source, rule, config.length) == outcome.held_out


def test_masks_are_drawn_by_the_seed_for_training_and_never_for_held_out_text(tmp_path):
    text = write_two_sided(tmp_path / "text.fa", 500)
    runs = [train(two_sided_run(text, BOTH, steps=1, seed=seed), tmp_path / f"{seed}") for seed in (1, 2)]
    assert runs[0].held_out.tokens == runs[1].held_out.tokens
    with torch.no_grad():
        for p, q in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
            p.copy_(q)
    rule = Masking(MaskedConfig(), DNA, VOCABULARY, EVALUATION_SEED)
    again = evaluate_masked(runs[0].model, runs[0].held_out_source, rule, 64)
    assert again == runs[1].held_out


def test_a_stopped_run_resumes_to_the_same_bits(tmp_path, monkeypatch):
    """With accumulation, random strands and dropout, so that every source of chance takes part."""
    text = write_two_sided(tmp_path / "text.fa", 500)
    config = two_sided_run(text, BOTH, steps=10, accumulation=2, batch_size=2, evaluate_every=3, checkpoint_every=4)
    blocks = tuple(dataclasses.replace(block, dropout=0.1) for block in config.model.config.blocks)
    spec = ModelSpec(config=dataclasses.replace(config.model.config, blocks=blocks))
    data = dataclasses.replace(config.data, reverse_complement=True)
    config = dataclasses.replace(config, model=spec, data=data)
    train(config, tmp_path / "whole")
    original = loop._Trainer._batch

    def batch(self, micro):
        if self.progress.step == 5 and micro == 0:
            signal.raise_signal(signal.SIGTERM)
        return original(self, micro)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Trainer, "_batch", batch)
        assert not train(config, tmp_path / "cut").finished
    assert train(config, tmp_path / "cut", resume=True).finished
    name = "model.safetensors"
    assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert metrics_of(tmp_path / "cut") == metrics_of(tmp_path / "whole")


def test_every_batch_has_its_own_masks(tmp_path, monkeypatch):
    seen: list[int] = []
    original = Masking.batch

    def batch(self, ids, index):
        if self.seed == 3:
            seen.append(index)
        return original(self, ids, index)

    monkeypatch.setattr(Masking, "batch", batch)
    text = write_two_sided(tmp_path / "text.fa", 500)
    train(two_sided_run(text, BOTH, steps=3, accumulation=2, seed=3), tmp_path / "run")
    assert seen == [0, 1, 2, 3, 4, 5]


def test_a_text_of_bytes_needs_a_mask_and_learns_with_one(tmp_path):
    text = write_text(tmp_path / "text.txt")
    config = tiny_run(text, objective=MaskedConfig(), steps=4)
    with pytest.raises(ConfigError, match=r"no mask of its own.*choose an id that no text has, such as 256"):
        train(config, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"objective.mask_id is outside the model's vocabulary: got 256; expected at"):
        train(dataclasses.replace(config, objective=MaskedConfig(mask_id=256)), tmp_path / "run")
    assert not (tmp_path / "run").exists(), "a run that cannot start left something behind"
    config = dataclasses.replace(config, objective=MaskedConfig(mask_id=256), tokenizer={"type": "bytes"})
    assert train(config, tmp_path / "run").held_out.bits_per_masked_token < 10


def test_a_model_that_looks_ahead_does_not_learn_next_tokens(tmp_path):
    text = write_two_sided(tmp_path / "text.fa", 500)
    config = two_sided_run(text, BOTH)
    config = dataclasses.replace(config, objective=TrainConfig(model=config.model, data=config.data).objective)
    with pytest.raises(ConfigError, match=r"cannot learn to predict the next token.*set objective.type to masked"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fraction": 0.0}, "objective.fraction is impossible"),
        ({"fraction": 1.5}, "objective.fraction is impossible"),
        ({"fraction": math.nan}, "objective.fraction is impossible"),
        ({"mask_token": -0.1}, "objective.mask_token and random_token are impossible"),
        ({"mask_token": 0.8, "random_token": 0.3}, "objective.mask_token and random_token are impossible"),
        ({"mask_id": -1}, "objective.mask_id is impossible"),
    ],
)
def test_impossible_configurations(changes, message):
    with pytest.raises(ConfigError, match=message):
        MaskedConfig(**changes)


@pytest.mark.parametrize("changes", [{"baselines": "dna"}, {"sample": SampleConfig()}])
def test_what_needs_next_tokens_is_refused(changes):
    with pytest.raises(ConfigError, match=f"{next(iter(changes))} needs a model that predicts the next token"):
        two_sided_run(Path("unread.fa"), BOTH, **changes)


def test_the_command_trains_it(tmp_path, capsys):
    write_two_sided(tmp_path / "text.fa", 500)
    recipe = tmp_path / "run.yaml"
    recipe.write_text(RECIPE)
    with pytest.raises(SystemExit) as exit_:
        app(["train", str(recipe), "-o", str(tmp_path / "run"), "objective.fraction=0.2"])
    logging.getLogger("crocuta").handlers = []
    assert not exit_.value.code
    shown = capsys.readouterr()
    assert "bits per masked token" in shown.out
    assert "byte" not in shown.out
    recorded = json.loads((tmp_path / "run" / "train.json").read_text())["objective"]
    assert recorded == {"type": "masked", "fraction": 0.2, "mask_token": 0.8, "random_token": 0.1, "mask_id": None}
    assert metrics_of(tmp_path / "run")[-1]["masked_tokens"] == 37  # 6 of each of 6 windows, 1 of the 7 letters left


RECIPE = """
model:
  config:
    vocab_size: 16
    hidden_size: 8
    blocks:
      - mixer: {type: hyena_bidirectional, filter: {type: explicit, taps: 4}}
        mlp: null
data:
  files: [text.fa]
  held_out: 0.2
tokenizer: {type: dna}
objective: {type: masked}
length: 32
batch_size: 2
steps: 3
"""
