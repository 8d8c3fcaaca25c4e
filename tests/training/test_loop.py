"""A whole run: what it learns, what it writes, and that it is a function of its configuration."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model
from tiny_run import PIECES, metrics_of, tiny_run, write_text

import crocuta
from crocuta.data.prepare import prepare
from crocuta.errors import ConfigError, InputError, TokenizerError
from crocuta.schema import decode
from crocuta.tokenizers.load import make_tokenizer
from crocuta.training import loop
from crocuta.training.config import DataConfig, ModelSpec, OptimizerConfig, TrainConfig
from crocuta.training.data import open_data
from crocuta.training.evaluate import evaluate
from crocuta.training.loop import train


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(outcome, folder, configuration) of one run of 60 steps."""
    folder = tmp_path_factory.mktemp("finished")
    config = tiny_run(write_text(folder / "text.txt"), steps=60)
    return train(config, folder / "run"), folder / "run", config


def test_it_learns(finished):
    outcome, run, _ = finished
    losses = [line["loss"] for line in metrics_of(run) if line["event"] == "train"]
    assert math.log(256) * 0.95 < losses[0] < math.log(256) + 1
    assert losses[-1] < 0.5 * losses[0]
    assert outcome.held_out.bits_per_byte < 4
    evaluations = [line["bits_per_byte"] for line in metrics_of(run) if line["event"] == "eval"]
    assert evaluations[-1] < evaluations[0]


def test_the_metrics_say_what_happened_when(finished):
    _, run, config = finished
    lines = metrics_of(run)
    at = {event: [line["step"] for line in lines if line["event"] == event] for event in ("train", "eval", "final")}
    assert at == {"train": [1, *range(3, 61, 3)], "eval": [10, 20, 30, 40, 50, 60], "final": [60]}
    train_lines = [line for line in lines if line["event"] == "train"]
    assert all(line["gradient_norm"] > 0 for line in train_lines)
    rates = {line["step"]: line["learning_rate"] for line in train_lines}
    assert rates[1] == pytest.approx(0.01 / 5)
    assert rates[60] == pytest.approx(0.01 * 0.5 * (1 + math.cos(math.pi * 59 / 60)))
    windows = 5400 // config.length
    assert train_lines[-1]["epoch"] == pytest.approx(60 * 2 * 2 / windows, rel=0.01)
    assert all(line["tokens"] == 200 for line in lines if line["event"] == "eval")


def test_the_outcome_is_what_is_saved(finished):
    outcome, run, config = finished
    assert (outcome.finished, outcome.step) == (True, 60)
    assert not outcome.model.training
    model, tokenizer = crocuta.load(run)
    assert tokenizer == outcome.tokenizer == make_tokenizer(config.tokenizer)
    for (name, tensor), other in zip(model.state_dict().items(), outcome.model.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name
    again = evaluate(model, outcome.held_out_source, tokenizer, config.length, context=config.length // 2)
    assert again == outcome.held_out
    final = metrics_of(run)[-1]
    assert (final["event"], final["bits_per_byte"]) == ("final", outcome.held_out.bits_per_byte)
    assert final["tokens"] == len(outcome.held_out_source) - 1


def test_the_run_records_its_configuration(finished):
    _, run, config = finished
    assert decode(TrainConfig, json.loads((run / "train.json").read_text())) == config


def test_held_out_text_is_never_trained_on(finished):
    outcome, _, config = finished
    text = list(Path(config.data.files[0]).read_bytes())
    seen = outcome.train.read(0, len(outcome.train)).tolist()
    held = outcome.held_out_source.read(0, len(outcome.held_out_source)).tolist()
    assert seen + held == [*text, 0]  # the end of the document


def test_a_run_is_a_function_of_its_configuration(finished, tmp_path):
    outcome, run, config = finished
    torch.manual_seed(99)
    twin = train(config, tmp_path / "twin")
    for (name, tensor), other in zip(outcome.model.state_dict().items(), twin.model.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name
    assert metrics_of(tmp_path / "twin") == metrics_of(run)
    other = train(dataclasses.replace(config, seed=4, steps=3), tmp_path / "other")
    third = train(dataclasses.replace(config, steps=3), tmp_path / "third")
    assert not torch.equal(other.model.embedding.weight, third.model.embedding.weight)


def test_how_often_it_looks_changes_nothing_that_is_learnt(finished, tmp_path):
    """Evaluations, checkpoints and log lines draw nothing from the generator and leave dropout on."""
    outcome, _, config = finished
    rare = dataclasses.replace(config, evaluate_every=1000, checkpoint_every=1000, log_every=1000)
    assert torch.equal(train(rare, tmp_path / "run").model.embedding.weight, outcome.model.embedding.weight)


def test_only_the_newest_checkpoints_are_kept(finished):
    _, run, _ = finished
    assert sorted(p.name for p in (run / "checkpoints").glob("step-*")) == ["step-00000056", "step-00000060"]


def test_a_time_limit_ends_the_run_and_decays_the_rate(tmp_path, monkeypatch):
    """A clock that a step moves by one second: 12 seconds are 12 steps, and the schedule knows."""
    now = [0.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    original = loop.train_step

    def step(*arguments):
        now[0] += 1
        return original(*arguments)

    monkeypatch.setattr(loop, "train_step", step)
    outcome = train(
        tiny_run(write_text(tmp_path / "text.txt"), steps=1000, time_limit=12, log_every=1), tmp_path / "run"
    )
    assert (outcome.finished, outcome.step, outcome.seconds) == (True, 12, 12.0)
    rates = [line["learning_rate"] for line in metrics_of(tmp_path / "run") if line["event"] == "train"]
    assert rates[11] == pytest.approx(0.01 * 0.5 * (1 + math.cos(math.pi * 11 / 12)))


@pytest.mark.parametrize("changes", [{"checkpoint_activations": True}, {"accumulation": 4, "batch_size": 1}])
def test_ways_to_save_memory_learn_the_same(changes, tmp_path):
    """Activations computed again, to the bit; smaller batches more often, but for rounding (and without dropout)."""
    config = tiny_run(write_text(tmp_path / "text.txt"), steps=6)
    config = dataclasses.replace(
        config, model=ModelSpec(striped=dataclasses.replace(config.model.striped, dropout=0.0))
    )
    plain = train(config, tmp_path / "plain").model
    saving = train(dataclasses.replace(config, **changes), tmp_path / "saving").model
    for (name, tensor), other in zip(plain.state_dict().items(), saving.state_dict().values(), strict=True):
        torch.testing.assert_close(tensor, other, rtol=0, atol=0 if "accumulation" not in changes else 2e-4, msg=name)


def test_training_goes_on_from_a_saved_model(finished, tmp_path):
    outcome, run, config = finished
    more = dataclasses.replace(
        config, model=ModelSpec(load=str(run)), steps=2, optimizer=OptimizerConfig(learning_rate=1e-9)
    )
    again = train(more, tmp_path / "run")
    assert again.held_out.bits_per_byte == pytest.approx(outcome.held_out.bits_per_byte, rel=1e-3)


# --- data ---


def test_prepared_tokens_are_the_text_itself(tmp_path):
    text = write_text(tmp_path / "text.txt")
    tokenizer = make_tokenizer({"type": "bytes"})
    prepare([text], tokenizer, tmp_path / "prepared")
    direct = open_data(DataConfig(files=(str(text),)), tokenizer, 512)
    mapped = open_data(DataConfig(files=(str(tmp_path / "prepared"),), format="tokens"), tokenizer, 512)
    for one, other in zip(direct, mapped, strict=True):
        assert one.read(0, len(one)).tolist() == other.read(0, len(other)).tolist()


def test_records_are_held_out_whole(tmp_path):
    path = tmp_path / "genome.fa"
    path.write_text("".join(f">r{i}\n{'ACGT' * (i + 1)}\n" for i in range(20)))
    tokenizer = make_tokenizer({"type": "dna"})
    config = DataConfig(files=(str(path),), held_out=0.3, split_by="record")
    seen, held = open_data(config, tokenizer, 16)
    lengths = [
        {int(b - a) for a, b in zip(source.document_offsets[:-1], source.document_offsets[1:])}
        for source in (seen, held)
    ]
    assert lengths[0] | lengths[1] == {4 * (i + 1) + 1 for i in range(20)}
    assert not lengths[0] & lengths[1]


# --- what cannot be trained ---


def failing(tmp_path, kind, message, **changes):
    config = tiny_run(write_text(tmp_path / "text.txt"), **changes)
    with pytest.raises(kind, match=message) as failure:
        train(config, tmp_path / "run")
    assert "\n" not in str(failure.value)
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_with_more_ids_than_the_model(tmp_path):
    small = ModelSpec(config=tiny_model("stripe").config)
    failing(
        tmp_path, ConfigError, "the tokenizer has more ids than the model: got 256; expected at most 16", model=small
    )


def test_tokens_outside_the_vocabulary(tmp_path):
    """Prepared with a tokenizer of the same kind is not enough; the ids themselves are looked at."""
    text = write_text(tmp_path / "text.txt")
    prepare([text], make_tokenizer({"type": "bytes"}), tmp_path / "prepared")
    data = DataConfig(files=(str(tmp_path / "prepared"),), format="tokens")
    failing(tmp_path, TokenizerError, "tokenizer", data=data, tokenizer={"type": "dna"})


def test_too_little_text(tmp_path):
    failing(tmp_path, InputError, "shorter than one window: got .* tokens; expected at least 100001", length=100_000)


def test_an_unknown_preset(tmp_path):
    failing(
        tmp_path,
        ConfigError,
        "unknown preset: got 'tiny-modl'.* did you mean 'tiny-modal'",
        model=ModelSpec(preset="tiny-modl"),
    )


def test_a_missing_tokenizer(tmp_path):
    tokenizer = {"type": "pieces", "file": str(tmp_path / "none.json")}
    failing(tmp_path, TokenizerError, r"cannot read .*none\.json", tokenizer=tokenizer)


def test_strands_of_what_is_no_sequence(tmp_path):
    (tmp_path / "tokenizer.json").write_text(PIECES)
    data = DataConfig(files=(str(tmp_path / "text.txt"),), reverse_complement=True)
    tokenizer = {"type": "pieces", "file": str(tmp_path / "tokenizer.json")}
    failing(tmp_path, InputError, "reverse_complement needs complement_ids", data=data, tokenizer=tokenizer)
