"""Labelled rows and their batches: what the model reads, every row once an epoch, and no fault without its place."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from labelled_files import tiny_fine_tune, write_examples

from crocuta.data.splits import FileSplits, FractionSplits
from crocuta.errors import InputError, SequenceFormatError, TokenizerError
from crocuta.tokenizers.bytes import ByteTokenizer
from crocuta.tokenizers.dna import DNATokenizer
from crocuta.training.finetune_config import LabelledDataConfig, RegressionTask, TokenClassificationTask
from crocuta.training.task_data import IGNORED, Batches, Row, collate, read_task_data

DNA = DNATokenizer()
TASKS = {"class": None, "tokens": TokenClassificationTask(), "numbers": RegressionTask()}


def read(config, tokenizer=DNA, vocab_size=16, max_length=None):
    return read_task_data(config, tokenizer, vocab_size=vocab_size, max_length=max_length)


def described(path, kind="class", **changes):
    return tiny_fine_tune(path, **({"task": TASKS[kind]} if TASKS[kind] else {}), **changes)


def files(folder, train, validation, kind="class"):
    """A description of two splits from rows of (sequence, label)."""
    for name, rows in (("train", train), ("validation", validation)):
        lines = [json.dumps({"sequence": s, "label": label}) for s, label in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    splits = FileSplits(train=(str(folder / "train.jsonl"),), validation=(str(folder / "validation.jsonl"),))
    return described("", kind, data=LabelledDataConfig(splits=splits))


def rows_of(lengths):
    return [Row(torch.full((length,), 7 + index % 4), torch.tensor(index)) for index, length in enumerate(lengths)]


# --- rows ---


def test_classes(tmp_path):
    data = read(files(tmp_path, [("ACG", "b"), ("TT", "a")], [("GGGG", "b")]))
    assert data.labels.names == ("a", "b")
    assert data.outputs == 2
    assert [row.ids.tolist() for row in data.rows["train"]] == [[7, 8, 9], [10, 10]]
    assert [int(row.target) for row in data.rows["train"] + data.rows["validation"]] == [1, 0, 1]
    assert data.rows["test"] == []


def test_tokens(tmp_path):
    data = read(files(tmp_path, [("ACG", "HEH")], [("GG", ["E", None])], "tokens"))
    assert data.rows["train"][0].target.tolist() == [1, 0, 1]
    assert data.rows["validation"][0].target.tolist() == [0, IGNORED]


def test_targets_keep_their_units_and_are_scaled_by_the_training_split_alone(tmp_path):
    data = read(files(tmp_path, [("ACG", [10, 3]), ("AC", [20, 3])], [("GG", [99, 4])], "numbers"))
    assert data.rows["validation"][0].target.tolist() == [99, 4]
    assert data.outputs == 2
    assert (data.scale.mean.tolist(), data.scale.deviation.tolist()) == ([15, 3], [5, 1])  # a constant is not divided
    assert data.scale.standardised(torch.tensor([[20.0, 4.0]], dtype=torch.float64)).tolist() == [[1, 1]]


def test_both_strands_are_one_sequence_where_they_mean_the_same(tmp_path):
    rows = [("AACG", "a"), ("GGGG", "b")], [("CGTT", "a")]
    with pytest.raises(InputError, match="stands in two splits"):
        read(files(tmp_path, *rows))
    text = ByteTokenizer()
    assert len(read(files(tmp_path, *rows), text, 512).rows["validation"]) == 1  # text has one direction
    both = files(tmp_path, *rows)
    changed = described("", data=both.data, reverse_complement="augment")
    with pytest.raises(InputError, match="stands in two splits"):
        read(changed, text, 512)
    with pytest.raises(InputError, match="stands in two splits"):
        read(files(tmp_path, rows[0], [("aacg", "b")]))  # and case is nothing to this tokenizer


@pytest.mark.parametrize(
    ("kind", "train", "validation", "error", "reason"),
    [
        ("class", [("AC", "a"), ("GG", "b")], [("TTTTTT", "b")], InputError, r"n\.jsonl:1: .* longer than .*: got 6"),
        ("class", [("AC", "a"), ("GG", "b")], [("C", "c")], InputError, r"n\.jsonl:1: .* not occur in training"),
        ("class", [("AC", "a"), ("GG", "a")], [("C", "a")], InputError, "two different names"),
        ("tokens", [("AC", "aab"), ("GG", "ab")], [("C", "a")], InputError, r"in\.jsonl:1: .* got 3 labels for 2 tok"),
        ("tokens", [("AC", "ab")], [("C", [None])], InputError, "no token of the validation split has a label"),
        ("numbers", [("AC", 1)], [("C", [1, 2])], InputError, r"validation\.jsonl:1: .* number of targets: got 2"),
        ("numbers", [("AC", "x")], [("C", 1)], SequenceFormatError, r"train\.jsonl:1: .* no target"),
    ],
)
def test_faults_name_their_place(tmp_path, kind, train, validation, error, reason):
    with pytest.raises(error, match=reason):
        read(files(tmp_path, train, validation, kind), max_length=5)


def test_a_vocabulary_that_is_too_small_and_a_letter_that_is_unknown(tmp_path):
    config = files(tmp_path, [("AC", "a"), ("GG", "b")], [("TT", "b")])
    with pytest.raises(
        InputError, match=r"n\.jsonl:1: the model cannot read this: got ids up to 10; expected ids < 10"
    ):
        read(config, vocab_size=10)
    config = files(tmp_path, [("AC", "a"), ("GZ", "b")], [("TT", "b")])
    with pytest.raises(TokenizerError, match="the letter at position 1"):
        read(config, DNATokenizer(unknown="error"))


def test_the_split_goes_by_what_the_model_reads(tmp_path):
    path = write_examples(tmp_path, "class")
    splits = FractionSplits(files=(path,), validation=0.3, test=0.3)
    data = read(described(path, data=LabelledDataConfig(splits=splits)))
    assert sum(map(len, data.rows.values())) == 120
    assert all(len(rows) > 15 for rows in data.rows.values())


# --- batches ---


def test_an_epoch_shows_every_row_once_and_the_next_in_another_order():
    lengths = np.random.default_rng(0).integers(3, 40, 203).tolist()
    batches = Batches(rows_of(lengths), 4, seed=5)
    shown = [[batch.targets.tolist() for batch in batches.epoch(number)] for number in (0, 1, 0)]
    assert [len(epoch) for epoch in shown] == [len(batches)] * 3 == [51] * 3
    for epoch in shown:
        assert sorted(index for batch in epoch for index in batch) == list(range(203))
    assert shown[0] == shown[2]
    company = [{frozenset(batch) for batch in epoch} for epoch in shown]
    assert len(company[0] & company[1]) < 5  # rows meet others, and not only the batches come in another order
    assert [b.targets.tolist() for b in Batches(rows_of(lengths), 4, seed=6).epoch(0)] != shown[0]


def test_rows_of_a_batch_are_of_similar_length_and_batches_in_random_order():
    lengths = np.random.default_rng(0).integers(3, 400, 640).tolist()
    batches = list(Batches(rows_of(lengths), 8, seed=5).epoch(0))
    padding = sum(batch.ids.numel() for batch in batches) / sum(lengths) - 1
    alone = sum(8 * max(lengths[i : i + 8]) for i in range(0, 640, 8)) / sum(lengths) - 1
    assert padding < 0.06 < alone
    longest = [int(batch.lengths.max()) for batch in batches[:16]]
    assert sum(a < b for a, b in zip(longest, longest[1:])) < 13  # not from short to long


def test_ids_are_padded_right_and_targets_fit():
    classes = collate([Row(torch.tensor([7, 8]), torch.tensor(1)), Row(torch.tensor([9, 9, 9]), torch.tensor(0))])
    assert classes.ids.tolist() == [[7, 8, 0], [9, 9, 9]]
    assert (classes.lengths.tolist(), classes.targets.tolist()) == ([2, 3], [1, 0])
    tokens = collate([Row(torch.tensor([7, 8]), torch.tensor([1, 0])), Row(torch.tensor([9]), torch.tensor([1]))])
    assert tokens.targets.tolist() == [[1, 0], [1, IGNORED]]
    numbers = collate([Row(torch.tensor([7]), torch.tensor([0.5], dtype=torch.float64))] * 2)
    assert numbers.targets.tolist() == [[0.5], [0.5]]


def test_strands_are_turned_half_of_the_time_with_the_labels_of_their_tokens():
    ids, labels = torch.tensor([7, 7, 8, 11]), torch.tensor([0, 1, 2, 3])
    other = [11, 9, 10, 10]
    batches = Batches([Row(ids, labels)] * 200, 10, seed=0, complement=DNA.complement_ids)
    seen = [(row.tolist(), t.tolist()) for batch in batches.epoch(0) for row, t in zip(batch.ids, batch.targets)]
    assert {tuple(map(tuple, pair)) for pair in seen} == {
        ((7, 7, 8, 11), (0, 1, 2, 3)),
        (tuple(other), (3, 2, 1, 0)),
    }
    turned = sum(row == other for row, _ in seen)
    assert 65 < turned < 135  # five standard deviations
    again = [row.tolist() for batch in batches.epoch(1) for row in batch.ids]
    assert again != [row for row, _ in seen]
    whole = Batches([Row(ids, torch.tensor(1))] * 20, 10, seed=0, complement=DNA.complement_ids)
    assert all(t == 1 for batch in whole.epoch(0) for t in batch.targets.tolist())
    targets = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)  # as many as tokens, and not theirs
    numbers = Batches([Row(ids, targets)] * 20, 10, seed=0, complement=DNA.complement_ids)
    assert all(t == [1, 2, 3, 4] for batch in numbers.epoch(0) for t in batch.targets.tolist())
