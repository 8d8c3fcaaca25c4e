"""What a fine-tune moves and what it leaves alone; and rows of a batch that do not see each other."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from labelled_files import SPEC, events, same, tiny_fine_tune, weights, write_examples
from tiny_models import tiny_model

import crocuta.training.finetune as finetune
from crocuta.checkpoints.adapters import load_adapter
from crocuta.checkpoints.native import save
from crocuta.config import AttentionPoolingConfig, LastPoolingConfig, MeanPoolingConfig
from crocuta.data.label_map import LabelMap
from crocuta.model.build import encoder_from
from crocuta.tokenizers.dna import DNATokenizer
from crocuta.training.config import ModelSpec, OptimizerConfig
from crocuta.training.finetune import fine_tune, task_loss
from crocuta.training.finetune_config import ClassificationTask, FrozenTuning, FullTuning, LoRATuning
from crocuta.training.models import model_of
from crocuta.training.task_data import IGNORED, Row, collate
from crocuta.training.task_evaluate import measure, predict


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    return write_examples(tmp_path_factory.mktemp("classes"), "class")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A folder with a model that stands for a pretrained one, and its weights."""
    model, tokenizer = model_of(ModelSpec(striped=SPEC), {"type": "dna"}, seed=77)
    folder = tmp_path_factory.mktemp("pretrained") / "model"
    save(model, tokenizer, folder)
    return folder, model.state_dict()


def test_it_starts_from_the_pretrained_weights_and_a_frozen_backbone_stays(pretrained, classes, tmp_path):
    folder, before = pretrained
    config = tiny_fine_tune(classes, model=ModelSpec(load=str(folder)), tuning=FrozenTuning(), dropout=0.3)
    outcome = fine_tune(config, tmp_path / "run")
    after = weights(outcome.encoder)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert after.keys() - before.keys() == {"head.weight", "head.bias"}
    assert outcome.trained_parameters == 2 * 8 + 2
    assert all(p.requires_grad for p in outcome.encoder.parameters())


def test_a_frozen_backbone_has_no_dropout(pretrained, classes, tmp_path, monkeypatch):
    """Every update runs in training mode, the head's dropout with it, but a frozen backbone never does."""
    seen = []
    forward = finetune.Encoder.forward

    def watched(self, x, lengths=None):
        seen.append((torch.is_grad_enabled(), self.training, any(block.training for block in self.blocks)))
        return forward(self, x, lengths)

    monkeypatch.setattr(finetune.Encoder, "forward", watched)
    load = ModelSpec(load=str(pretrained[0]))
    for name, tuning, blocks in (("frozen", FrozenTuning(), False), ("full", FullTuning(), True)):
        outcome = fine_tune(tiny_fine_tune(classes, model=load, tuning=tuning, epochs=2), tmp_path / name)
        assert [kind for kind in seen if kind[0]] == [(True, True, blocks)] * outcome.steps
        assert {kind for kind in seen if not kind[0]} == {(False, False, False)}
        seen.clear()


def test_full_tuning_moves_everything(pretrained, classes, tmp_path):
    folder, before = pretrained
    outcome = fine_tune(tiny_fine_tune(classes, model=ModelSpec(load=str(folder))), tmp_path / "run")
    after = weights(outcome.encoder)
    assert [name for name in before if torch.equal(before[name], after[name])] == []


def test_lora_moves_its_targets_and_is_merged(pretrained, classes, tmp_path):
    folder, before = pretrained
    tuning = LoRATuning(rank=2, alpha=4, targets=("attention", "mlp"))
    config = tiny_fine_tune(classes, model=ModelSpec(load=str(folder)), tuning=tuning)
    outcome = fine_tune(config, tmp_path / "run")
    after = weights(outcome.encoder)
    assert after.keys() == {*before, "head.weight", "head.bias"}
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    matrices = {name for name in before if before[name].ndim == 2 and not name.startswith("embedding")}
    assert moved == {name for name in matrices if ".mlp." in name or name.startswith("blocks.1.mixer.")}
    for name in moved:
        assert np.linalg.matrix_rank((after[name] - before[name]).double().numpy(), tol=1e-5) <= 2
    assert outcome.trained_parameters < outcome.parameters / 2
    model, _ = model_of(ModelSpec(load=str(folder)), {}, 0)
    fresh = encoder_from(model, head=outcome.encoder.config.head)
    load_adapter(fresh, tmp_path / "run" / "adapter.safetensors")
    row = Row(torch.arange(7, 11).repeat(5), torch.tensor(0))
    torch.testing.assert_close(predict(fresh, [row]), predict(outcome.encoder, [row]), rtol=0, atol=1e-6)


def test_the_head_has_its_own_rate_and_filters_theirs(classes, tmp_path, monkeypatch):
    rates = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self: (rates.append({g["role"]: g["lr"] for g in self.param_groups}), step(self)),
    )
    optimizer = OptimizerConfig(learning_rate=1e-2, filter_learning_rate=1e-3, warmup_steps=2)
    task = ClassificationTask(pooling=AttentionPoolingConfig())
    config = tiny_fine_tune(classes, task=task, optimizer=optimizer, head_learning_rate=1e-1)
    outcome = fine_tune(config, tmp_path / "run")
    assert len(rates) == outcome.steps
    peak = {"matrices": 1e-2, "others": 1e-2, "filters": 1e-3, "new matrices": 1e-1, "new others": 1e-1}
    for number, found in enumerate(rates):
        factor = min(1.0, (number + 1) / 2) * 0.5 * (1 + math.cos(math.pi * number / outcome.steps))
        assert found == pytest.approx({role: rate * factor for role, rate in peak.items()})


def test_gradients_are_clipped_to_the_norm_that_was_asked_for(classes, tmp_path, monkeypatch):
    norms = []
    step = torch.optim.AdamW.step

    def watched(self):
        gradients = [p.grad.flatten() for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.cat(gradients).norm()))
        step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    optimizer = OptimizerConfig(learning_rate=1e-2, clip=0.05)
    fine_tune(tiny_fine_tune(classes, optimizer=optimizer, epochs=1), tmp_path / "run")
    assert norms == pytest.approx([0.05] * len(norms), rel=1e-4)
    logged = [line["gradient_norm"] for line in events(tmp_path / "run", "train")]
    assert min(logged) > 0.05  # before clipping


def test_products_in_bfloat16_change_the_updates_and_not_the_evaluation(classes, tmp_path):
    plain = fine_tune(tiny_fine_tune(classes, epochs=1), tmp_path / "plain")
    narrow = fine_tune(tiny_fine_tune(classes, epochs=1, precision="bfloat16"), tmp_path / "narrow")
    assert all(p.dtype == torch.float32 for p in narrow.encoder.parameters())
    assert not same(weights(plain.encoder), weights(narrow.encoder))
    assert narrow.validation.loss == pytest.approx(plain.validation.loss, abs=0.05)


@pytest.mark.parametrize(
    ("pooling", "extra"),
    [(MeanPoolingConfig(), 0), (LastPoolingConfig(positions=3), 0), (AttentionPoolingConfig(), 8)],
)
def test_pooling_is_a_choice(classes, tmp_path, pooling, extra):
    outcome = fine_tune(tiny_fine_tune(classes, task=ClassificationTask(pooling=pooling), epochs=1), tmp_path / "run")
    assert outcome.encoder.config.pooling == pooling
    tuned = fine_tune(
        tiny_fine_tune(classes, task=ClassificationTask(pooling=pooling), tuning=FrozenTuning(), epochs=1),
        tmp_path / "frozen",
    )
    assert tuned.trained_parameters == 2 * 8 + 2 + extra


def test_dropout_of_the_blocks_and_of_the_head(classes, tmp_path):
    task = ClassificationTask(dropout=0.25)
    outcome = fine_tune(tiny_fine_tune(classes, task=task, dropout=0.5, epochs=1), tmp_path / "run")
    assert {block.dropout for block in outcome.encoder.config.blocks} == {0.5}
    assert outcome.encoder.config.head.dropout == 0.25
    plain = fine_tune(tiny_fine_tune(classes, task=task, epochs=1), tmp_path / "plain")
    assert {block.dropout for block in plain.encoder.config.blocks} == {0.0}
    assert not same(weights(outcome.encoder), weights(plain.encoder))


def test_shared_strands_read_both_alike(classes, tmp_path):
    outcome = fine_tune(tiny_fine_tune(classes, reverse_complement="shared", epochs=1), tmp_path / "run")
    ids = torch.tensor([7, 7, 8, 9, 10, 10, 7, 11])
    other = torch.from_numpy(DNATokenizer().complement_ids.copy())[ids.flip(0)]
    one, two = predict(outcome.encoder, [Row(ids, torch.tensor(0)), Row(other, torch.tensor(0))])
    torch.testing.assert_close(one, two, rtol=0, atol=1e-6)


def test_strands_as_they_come_augmented_and_shared_are_three_runs(classes, tmp_path):
    found = []
    for name in ("off", "augment", "shared"):
        outcome = fine_tune(tiny_fine_tune(classes, reverse_complement=name, epochs=1), tmp_path / name)
        found.append(weights(outcome.encoder)["head.weight"])
    assert not any(torch.equal(found[i], found[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


# --- ragged rows ---


@pytest.mark.parametrize("kind", ["stripe", "implicit"])
@pytest.mark.parametrize("pooling", [MeanPoolingConfig(), LastPoolingConfig(), AttentionPoolingConfig(), None])
def test_a_row_s_outputs_do_not_depend_on_its_batch(kind, pooling):
    head = finetune.ClassificationConfig(labels=3)
    encoder = encoder_from(tiny_model(kind).double(), pooling=pooling, head=head, seed=3)
    draw = torch.Generator().manual_seed(0)
    rows = [Row(torch.randint(0, 16, (l,), generator=draw), torch.tensor(0)) for l in (5, 17, 1, 9, 16)]
    together, alone = predict(encoder, rows), [predict(encoder, [row])[0] for row in rows]
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-9)
    assert [output.shape for output in together] == [(3,) if pooling else (len(row.ids), 3) for row in rows]


def test_figures_of_tokens_without_a_label_do_not_exist():
    head = finetune.ClassificationConfig(labels=2)
    encoder = encoder_from(tiny_model("stripe"), pooling=None, head=head, seed=3)
    ids = torch.randint(0, 16, (9,), generator=torch.Generator().manual_seed(0))
    predicted = predict(encoder, [Row(ids, ids)])[0].argmax(1)
    some = torch.where(torch.arange(9) % 3 == 0, IGNORED, predicted)
    some[1] = 1 - some[1]
    found = measure(encoder, [Row(ids, some)] * 2, LabelMap(("a", "b")))
    assert (found.count, found.accuracy) == (12, pytest.approx(10 / 12))


def test_the_loss_of_ragged_tokens_is_that_of_the_labelled_ones():
    head, draw = finetune.ClassificationConfig(labels=3), torch.Generator().manual_seed(0)
    encoder = encoder_from(tiny_model("stripe").double(), pooling=None, head=head, seed=3).eval()
    rows = []
    for l in (5, 17, 3):
        target = torch.randint(0, 3, (l,), generator=draw)
        target[1] = IGNORED
        rows.append(Row(torch.randint(0, 16, (l,), generator=draw), target))
    batch = collate(rows)
    loss = task_loss(encoder(batch.ids, batch.lengths), batch.targets)
    terms = [
        -torch.log_softmax(encoder(row.ids[None])[0, t], 0)[row.target[t]]
        for row in rows
        for t in range(len(row.ids))
        if t != 1
    ]
    torch.testing.assert_close(loss, torch.stack(terms).mean(), rtol=0, atol=1e-9)
    nothing = task_loss(torch.randn(2, 3, 4), torch.full((2, 3), IGNORED))
    assert float(nothing) == 0
