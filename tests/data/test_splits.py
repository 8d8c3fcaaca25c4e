"""Train, validation and test stay apart: explicit, by the sequence, and with one label map."""

import hashlib
import json
import random

import pytest

from crocuta.data.label_map import LabelMap, label_map
from crocuta.data.labelled import LabelledFormat
from crocuta.data.splits import ColumnSplits, FileSplits, FractionSplits, files_of, read_splits
from crocuta.errors import ConfigError, InputError, SequenceFormatError


def write(folder, name, rows, header="sequence\tlabel"):
    path = folder / name
    path.write_text("\n".join([header, *("\t".join(row) for row in rows)]) + "\n")
    return str(path)


def three(folder, test="TTT", label="a"):
    names = ("train", "validation", "test")
    rows = {"train": [("AAA", "a"), ("CCC", "b")], "validation": [("GGG", "a")], "test": [(test, label)]}
    return FileSplits(**{name: (write(folder, f"{name}.tsv", rows[name]),) for name in names})


def sequences(splits):
    return {name: [example.sequence for example in splits[name]] for name in ("train", "validation", "test")}


# --- three ways to split ---


def test_files(tmp_path):
    config = three(tmp_path)
    assert sequences(read_splits(config, "class")) == {"train": ["AAA", "CCC"], "validation": ["GGG"], "test": ["TTT"]}
    assert [name.rpartition("/")[2] for name in files_of(config)] == ["train.tsv", "validation.tsv", "test.tsv"]


def test_without_test_files_there_is_no_test_split(tmp_path):
    config = three(tmp_path)
    splits = read_splits(FileSplits(train=config.train, validation=config.validation), "class")
    assert splits.test == ()
    assert len(splits.validation) == 1


def test_column(tmp_path):
    rows = [("AAA", "a", "train"), ("CCC", "b", "test"), ("GGG", "b", "validation"), ("TTT", "b", "train")]
    config = ColumnSplits(files=(write(tmp_path, "x.tsv", rows, "sequence\tlabel\tsplit"),))
    assert sequences(read_splits(config, "class")) == {"train": ["AAA", "TTT"], "validation": ["GGG"], "test": ["CCC"]}


def many(folder, count=400, name="x.tsv"):
    draw = random.Random(0)
    rows = [("".join(draw.choices("ACGT", k=12)), draw.choice("ab")) for _ in range(count)]
    return rows, write(folder, name, rows)


def test_fractions_depend_on_the_sequence_and_the_seed_alone(tmp_path):
    rows, path = many(tmp_path)
    config = FractionSplits(files=(path,), validation=0.2, test=0.1)
    splits = sequences(read_splits(config, "class"))
    assert sorted(s for found in splits.values() for s in found) == sorted(row[0] for row in rows)
    # 400 draws: five standard deviations are 40 and 30.
    assert abs(len(splits["validation"]) - 80) < 40
    assert abs(len(splits["test"]) - 40) < 30
    shuffled = rows + rows[:50]  # duplicates fall in the split of their first
    random.Random(1).shuffle(shuffled)
    again = sequences(read_splits(FractionSplits(files=(write(tmp_path, "y.tsv", shuffled),), validation=0.2), "class"))
    assert {name: set(found) for name, found in again.items()} == {name: set(found) for name, found in splits.items()}
    other = sequences(read_splits(FractionSplits(files=(path,), validation=0.2, seed=1), "class"))
    assert other["validation"] != splits["validation"]


def test_a_split_by_hash_is_the_same_on_every_machine(tmp_path):
    """The first 8 bytes of SHA-256 of "5:SEQUENCE", below a fifth: test; below two fifths: validation."""
    rows, path = many(tmp_path, 30)
    found = sequences(read_splits(FractionSplits(files=(path,), validation=0.2, test=0.2, seed=5), "class"))
    expected = {"train": [], "validation": [], "test": []}
    for sequence, _ in rows:
        place = int(hashlib.sha256(f"5:{sequence}".encode()).hexdigest()[:16], 16)
        expected["test" if place < 2**64 // 5 else "validation" if place < 2**64 // 5 * 2 else "train"].append(sequence)
    assert found == expected
    assert all(found.values())


def test_sequences_are_the_same_by_the_key(tmp_path):
    plain = [row[0] for row in many(tmp_path, 40)[0]]
    rows = [(s, "a") for t in plain for s in (t, t.lower(), t.title())]
    config = FractionSplits(files=(write(tmp_path, "y.tsv", rows),), validation=0.3, test=0.3)
    splits = sequences(read_splits(config, "class", key=lambda s: s.upper().encode()))
    assert all(splits.values())
    folded = [{s.upper() for s in found} for found in splits.values()]
    assert all(not (folded[i] & folded[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


# --- what must not happen ---


def test_a_sequence_in_two_splits_is_an_error_that_names_both(tmp_path):
    config = three(tmp_path, test="CCC")
    with pytest.raises(InputError, match="a sequence stands in two splits") as caught:
        read_splits(config, "class")
    assert f"{config.train[0]}:3 in train and {config.test[0]}:2 in test" in str(caught.value)
    assert sequences(read_splits(config, "class", allow_shared=True))["test"] == ["CCC"]
    with pytest.raises(InputError, match="in validation and"):
        read_splits(three(tmp_path, test="ggg"), "class", key=lambda s: s.upper().encode())


def test_the_same_file_for_validation_and_test_is_an_error(tmp_path):
    config = three(tmp_path)
    with pytest.raises(InputError, match=r"in validation and .* in test"):
        read_splits(FileSplits(train=config.train, validation=config.test, test=config.test), "class")


def test_a_split_that_a_file_names_is_never_passed_over(tmp_path):
    rows = [("AAA", "a", "train"), ("CCC", "b", "test")]
    path = write(tmp_path, "x.tsv", rows, "sequence\tlabel\tsplit")
    with pytest.raises(InputError, match=f"{path}:2 names a split"):
        read_splits(FractionSplits(files=(path,)), "class")
    with pytest.raises(InputError, match=f"{path}:3 is among the files of train and names another split: got 'test'"):
        read_splits(FileSplits(train=(path,), validation=(path,)), "class")
    format = LabelledFormat(split="elsewhere")
    assert len(read_splits(FractionSplits(files=(path,), validation=0.5, seed=2), "class", format).validation) == 1


@pytest.mark.parametrize("name", ["", "val", "Train", "valid"])
def test_a_column_with_another_word_is_an_error(tmp_path, name):
    rows = [("AAA", "a", "train"), ("CCC", "b", name)]
    path = write(tmp_path, "x.tsv", rows, "sequence\tlabel\tsplit")
    with pytest.raises(InputError, match=f"{path}:3: the field 'split' names no split"):
        read_splits(ColumnSplits(files=(path,)), "class")


def test_empty_splits(tmp_path):
    path = write(tmp_path, "x.tsv", [("AAA", "a", "train"), ("CCC", "b", "test")], "sequence\tlabel\tsplit")
    with pytest.raises(InputError, match="the validation split is empty"):
        read_splits(ColumnSplits(files=(path,)), "class")
    with pytest.raises(InputError, match=r"the (train|validation) split is empty"):
        read_splits(FractionSplits(files=(write(tmp_path, "y.tsv", [("AAA", "a")]),)), "class")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: FileSplits(train=(), validation=("x",)), "data.splits.train is empty"),
        (lambda: FileSplits(train=("x",), validation=()), "data.splits.validation is empty"),
        (lambda: ColumnSplits(files=()), "files is empty"),
        (lambda: FractionSplits(files=()), "files is empty"),
        (lambda: FractionSplits(files=("x",), validation=0.0), "shares are impossible"),
        (lambda: FractionSplits(files=("x",), validation=0.5, test=0.5), "shares are impossible"),
        (lambda: FractionSplits(files=("x",), test=-0.1), "shares are impossible"),
        (lambda: FractionSplits(files=("x",), test=float("nan")), "shares are impossible"),
    ],
)
def test_impossible_splits(make, reason):
    with pytest.raises(ConfigError, match=reason):
        make()


# --- label map ---


def test_names_are_sorted_whatever_their_order():
    assert LabelMap.of(["b", "a", "B", "b"]).names == ("B", "a", "b")
    assert LabelMap.of(["10", "9", "-1"]).names == ("-1", "9", "10")
    assert LabelMap.of(["10", "9", "x"]).names == ("10", "9", "x")
    assert LabelMap.of(["10", "9", "010"]).names == ("010", "10", "9")  # not numbers: 010 is a name of its own
    assert LabelMap.of(["b", "a"]).index("b") == 1
    with pytest.raises(InputError, match="unknown label: got 'c'; expected one of 'a', 'b'"):
        LabelMap.of(["b", "a"]).index("c")
    with pytest.raises(InputError, match="two different names"):
        LabelMap.of(["a", "a"])


def test_a_label_map_is_saved_and_read(tmp_path):
    labels = LabelMap(("z", "é", "a"))
    labels.save(tmp_path)
    assert json.loads((tmp_path / "labels.json").read_text(encoding="utf-8")) == {"labels": ["z", "é", "a"]}
    assert LabelMap.load(tmp_path) == labels


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"labels": "ab"}', b'{"labels": [1, 2]}', b"\xff", b"[" * 99999]
)
def test_a_broken_label_map(tmp_path, content):
    (tmp_path / "labels.json").write_bytes(content)
    with pytest.raises(SequenceFormatError, match=r"cannot read .*labels\.json"):
        LabelMap.load(tmp_path)


def test_a_missing_label_map(tmp_path):
    with pytest.raises(SequenceFormatError, match="cannot read"):
        LabelMap.load(tmp_path)


def test_the_map_is_of_training_and_others_must_know_no_more(tmp_path):
    assert label_map(read_splits(three(tmp_path), "class")).names == ("a", "b")
    config = three(tmp_path, label="c")
    with pytest.raises(InputError, match=r"test\.tsv:2: the label does not occur in training: got 'c' in test"):
        label_map(read_splits(config, "class"))


def test_the_map_of_tokens(tmp_path):
    rows = ['["H", null, "E"]', '["H", "C", null]']
    for name, label in zip(("train", "validation"), rows):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"sequence": name, "label": json.loads(label)}))
    config = FileSplits(train=(str(tmp_path / "train.jsonl"),), validation=(str(tmp_path / "validation.jsonl"),))
    with pytest.raises(InputError, match="got 'C' in validation; expected one of 'E', 'H'"):
        label_map(read_splits(config, "tokens"))
