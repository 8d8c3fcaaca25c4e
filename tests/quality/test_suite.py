"""The quality suite: models of equal size, data without leaks, figures that mean what they say, bounds that bite."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from crocuta.data.synthetic import IGNORED, Compression, Examples, InContextRecall, SelectiveCopying
from crocuta.errors import InputError, NonFiniteError

# --- models ---


@pytest.mark.parametrize("size", ["small", "large", "smoke"])
def test_models_of_a_row_are_of_equal_size(module, size: str) -> None:
    models, recipes = module("models"), module("recipes")
    shapes = {plan.recipe.shape for plan in recipes.SIZES[size]().values()}
    for shape in shapes:
        for vocab_size, length in ((10, 258), (256, 1024)):
            configs = [models.model_config(kind, shape, vocab_size, length) for kind in models.KINDS]
            sizes = [sum(p.numel() for p in module("training").TokenModel(c, 0).parameters()) for c in configs]
            assert max(sizes) / sizes[0] < 1.05
            assert min(sizes) / sizes[0] > 0.95


def test_kinds_are_what_they_are_called(module) -> None:
    models = module("models")

    def mixers(kind: str) -> list[str]:
        return [b.mixer.type for b in models.model_config(kind, models.Shape(layers=3), 16, 128).blocks]

    assert mixers("hyena") == ["hyena"] * 3
    assert mixers("striped") == ["hyena", "hyena", "attention"]
    assert mixers("transformer") == ["attention"] * 3
    assert mixers("gated-conv") == ["gated_conv"] * 3
    assert mixers("multi-head") == ["hyena_multi_head"] * 3


def test_impossible_models(module) -> None:
    models = module("models")
    with pytest.raises(InputError, match="unknown kind of model: got 'mamba'"):
        models.model_config("mamba", models.Shape(), 16, 128)
    with pytest.raises(InputError, match="no gated-conv model is as large"):
        models.model_config("gated-conv", models.Shape(mlp=8, conv_taps=5000), 16, 128)


def test_compression_is_decoded_from_the_last_hidden_state_alone(module) -> None:
    models = module("models")
    config = models.model_config("gated-conv", models.Shape(hidden=16, heads=2, mlp=48, filter_width=8), 8, 30)
    model = models.LastTokenModel(config, seed=0).eval()
    ids = torch.randint(0, 8, (2, 30), generator=torch.Generator().manual_seed(0))
    far = ids.clone()
    far[:, 0] = (far[:, 0] + 1) % 8  # 29 places before the last token: two convolutions of 7 taps cannot see it
    torch.testing.assert_close(model(far), model(ids), rtol=0, atol=0)
    near = ids.clone()
    near[:, -1] = (near[:, -1] + 1) % 8
    assert (model(near)[:, 0] != model(ids)[:, 0]).any()
    assert (model(ids)[:, 0] != model(ids)[:, 1]).any()


# --- rows ---


def test_fresh_rows_never_repeat(module) -> None:
    row = module("rows").SyntheticRow(SelectiveCopying(length=60, copied=4), 0, test_examples=8, train_examples=None)
    batches = [row.batch(step, 4) for step in range(10)]
    assert {b.inputs.shape for b in batches} == {(4, 60)}
    assert len({tuple(x) for b in batches for x in b.inputs.tolist()}) == 40
    assert row.tests()["test"].inputs.shape == (8, 60)


def test_repeated_rows_show_every_example_once_an_epoch(module) -> None:
    row = module("rows").SyntheticRow(InContextRecall(length=16), 3, test_examples=8, train_examples=10)
    seen = [tuple(x) for step in range(10) for x in row.batch(step, 4).inputs.tolist()]
    epochs = [seen[i : i + 10] for i in range(0, 40, 10)]
    assert all(Counter(epoch) == Counter(epochs[0]) for epoch in epochs)
    assert len(set(epochs[0])) == 10
    assert epochs[0] != epochs[1]


def test_tests_and_validation_are_not_trained_on(module) -> None:
    row = module("rows").SyntheticRow(InContextRecall(), 0, test_examples=50, train_examples=None)
    drawn = [row.batch(0, 50), row.tests()["test"], row.validation()]
    assert len({tuple(x) for examples in drawn for x in examples.inputs.tolist()}) == 150


def test_classes_are_named_by_the_token_after_the_question(module) -> None:
    rows = module("rows")
    labelled = rows.Labelled(np.array([[0, 1, 2], [2, 1, 0]]), np.array([1, 0]))
    row = rows.ClassesRow("c", letters=4, classes=2, training=labelled, held_out={"x": labelled}, seed=0)
    assert (row.vocab_size, row.length) == (7, 4)
    inputs, targets = row.tests()["x"]
    assert inputs.tolist() == [[0, 1, 2, 4], [2, 1, 0, 4]]
    assert targets.tolist() == [[IGNORED] * 3 + [6], [IGNORED] * 3 + [5]]
    drawn = {(tuple(x), y[-1]) for x, y in zip(*(a.tolist() for a in row.batch(0, 40)))}
    assert drawn == {((0, 1, 2, 4), 6), ((2, 1, 0, 4), 5)}


# --- real data, made here ---


@pytest.fixture
def genomes(module, tmp_path: Path) -> Path:
    """The genomes that the suite asks for, random ones of 2,000 bases with a few unknown letters."""
    real = module("real")
    for number, name in enumerate([*real.TRAINING_GENOMES, real.HELD_OUT_STRAIN, real.HELD_OUT_SPECIES]):
        letters = np.random.default_rng(number).choice(list("ACGT"), 2000)
        letters[::97] = "N"
        path = tmp_path / f"{name}.fasta.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(f">{number}\n{''.join(letters)}\n>plasmid\nACGT\n".encode()))
    return tmp_path


def test_the_genome_row_holds_out_a_strain_and_a_species(module, genomes: Path) -> None:
    real = module("real")
    species = {name.split("/")[0] for name in real.TRAINING_GENOMES}
    assert real.HELD_OUT_STRAIN not in real.TRAINING_GENOMES
    assert real.HELD_OUT_STRAIN.split("/")[0] in species
    assert real.HELD_OUT_SPECIES.split("/")[0] not in species
    row = real.genome_row(64, 640, 0, genomes)
    tests = row.tests()
    assert list(tests) == ["held-out strain", "held-out species"]
    for examples in tests.values():
        assert examples.inputs.shape == (10, 64)
        known = examples.targets != IGNORED
        assert 0 < (~known).sum() < 20
        assert examples.targets[known].max() < 4
        assert (examples.inputs[:, 1:][known[:, :-1]] == examples.targets[:, :-1][known[:, :-1]]).all()
    trained = {tuple(x[:20]) for step in range(60) for x in row.batch(step, 8).inputs.tolist()}
    assert not trained & {tuple(x[:20]) for examples in tests.values() for x in examples.inputs.tolist()}


def test_missing_data_are_named(module, tmp_path: Path) -> None:
    real = module("real")
    with pytest.raises(real.MissingDataError, match=r"MG1655-K12.fasta.gz of the Debian package ragout-examples"):
        real.genome_row(64, 640, 0, tmp_path)


def test_letters_become_ids(module) -> None:
    assert module("real").encode("ACGTNRYacgt").tolist() == [0, 1, 2, 3, 4, 4, 4, 4, 4, 4, 4]


def test_every_piece_is_where_its_class_says(module) -> None:
    """Each base is marked by whether a gene covers it; the mark survives turning over."""
    real = module("real")
    genes = np.array([[30, 60], [50, 95], [140, 200], [220, 224], [260, 300]])
    ids = np.zeros(310, np.uint8)
    for start, end in genes:
        ids[start:end] = 1  # covered: C, turned over G; else A, turned over T
    labelled = real.pieces(ids, genes, 10)
    for number, (sequence, label) in enumerate(zip(labelled.sequences.tolist(), labelled.classes.tolist())):
        turned = number % 2 == 0
        assert sequence == [[0, 1], [3, 2]][turned][label : label + 1] * 10
    gaps = [(0, 30), (95, 140), (200, 220), (224, 260), (300, 310)]
    assert (labelled.classes == 0).sum() == sum((end - start) // 10 for start, end in gaps) == 13
    assert (labelled.classes == 1).sum() == 13  # of the 14 that genes would give


# --- training and figures ---


class Fixed(torch.nn.Module):
    """Logits that favour token 1 by log 3 over each of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor([0.0, np.log(3.0), 0.0]))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(*ids.shape, 3)


def test_scores_count_what_counts(module) -> None:
    targets = np.array([[1, IGNORED, 0], [1, 1, IGNORED]])
    score = module("training").measure(Fixed(), Examples(np.zeros((2, 3), np.int64), targets))
    assert (score.accuracy, score.counted) == (3 / 4, 4)
    assert score.bits == pytest.approx((3 * np.log2(5 / 3) + np.log2(5)) / 4)


def test_a_run_learns_and_repeats(module) -> None:
    training, models, rows = module("training"), module("models"), module("rows")
    shape = models.Shape(hidden=16, heads=2, mlp=48, filter_width=8, frequency=1.0)
    recipe = training.Recipe(shape=shape, steps=60, batch=16, learning_rates=(1e-2,), warmup=5)
    row = rows.SyntheticRow(InContextRecall(vocab_size=4, length=16), 0, test_examples=64, train_examples=None)
    first, second = (training.run(row, "hyena", recipe, seed=1) for _ in range(2))
    assert first["tests"] == second["tests"]
    assert first["tests"]["test"]["accuracy"] > 0.9
    assert first["sequences_seen"] == 960


def test_a_sweep_chooses_by_validation(module, monkeypatch: pytest.MonkeyPatch) -> None:
    training, rows = module("training"), module("rows")
    row = rows.SyntheticRow(InContextRecall(length=16), 0, test_examples=8, train_examples=None)
    validation = row.validation().inputs

    def train(row, kind, recipe, rate, decay, **_):
        return SimpleNamespace(parameters=lambda: iter([torch.zeros(3)]), rate=rate)

    def measure(model, examples):
        on_validation = np.array_equal(examples.inputs, validation)
        return training.Score(model.rate if on_validation else 1 - model.rate, 0.0, 1)

    monkeypatch.setattr(training, "train", train)
    monkeypatch.setattr(training, "measure", measure)
    recipe = training.Recipe(shape=None, steps=1, batch=1, learning_rates=(0.1, 0.3, 0.2), weight_decays=(0.0, 0.1))
    done = training.run(row, "hyena", recipe, seed=0)
    assert (done["learning_rate"], done["weight_decay"], done["runs"]) == (0.3, 0.0, 6)
    assert done["tests"]["test"]["accuracy"] == pytest.approx(0.7)


def test_a_loss_that_is_no_number_is_an_error(module) -> None:
    training, models, rows = module("training"), module("models"), module("rows")
    shape = models.Shape(hidden=16, heads=2, mlp=48, filter_width=8)
    row = rows.SyntheticRow(Compression(length=8), 0, test_examples=8, train_examples=None)
    recipe = training.Recipe(shape=shape, steps=3, batch=2, warmup=1)
    with pytest.raises(NonFiniteError, match="the loss of transformer on compression is not finite"):
        training.train(row, "transformer", recipe, float("1e38"), 0.1, seed=0)


# --- the script ---


def test_smoke_writes_every_figure(module, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--smoke", "--workers=1", "--models=hyena,striped", "--tasks=in-context-recall,text"]
    assert module("run").main([*arguments, f"--output={tmp_path}"]) == 0
    (path,) = tmp_path.glob("smoke-*.json")
    result = json.loads(path.read_text())
    assert {"date", "commit", "cpu", "torch"} <= result["manifest"].keys()
    assert [(run["row"], run["model"]) for run in result["runs"]] == [
        (row, model) for row in ("in-context-recall", "text") for model in ("hyena", "striped")
    ]
    assert [(bound["model"], bound["kept"]) for bound in result["bounds"]] == [("hyena", False), ("striped", False)]
    printed = capsys.readouterr().out
    assert "(81.7)" in printed
    assert "MISSED" in printed


def done(row: str, model: str, accuracy: float) -> dict[str, object]:
    scores = {"test": {"accuracy": accuracy, "bits": 1.0, "counted": 4}}
    return {"row": row, "model": model, "parameters": 10, "unit": "accuracy", "tests": scores}


@pytest.mark.parametrize(
    ("hyena", "striped", "status"), [(0.80, 0.99, 0), (0.79, 1.0, 1), (1.0, 0.989, 1), (None, 0.99, 1)]
)
def test_a_missed_bound_ends_with_1(module, monkeypatch, tmp_path: Path, hyena, striped, status: int) -> None:
    script = module("run")
    figures = {"hyena": hyena, "striped": striped}
    runs = [done("in-context-recall", kind, value) for kind, value in figures.items() if value is not None]
    monkeypatch.setattr(script, "train_all", lambda jobs, rows, options: runs)
    arguments = ["--tasks=in-context-recall", "--models=hyena,striped", f"--output={tmp_path}"]
    assert script.main(arguments) == status


def test_rows_without_data_are_left_out_and_say_why(module, tmp_path: Path, capsys) -> None:
    script, recipes, real = module("run"), module("recipes"), module("real")
    plan = recipes.Plan(lambda seed: real.genome_row(64, 640, seed, tmp_path), recipes.smoke()["text"].recipe)
    rows, left_out = script.make_rows({"genome": plan}, ["genome"], 0)
    assert rows == {}
    assert "ragout-examples" in left_out["genome"]
    assert "genome is left out" in capsys.readouterr().out


def test_unknown_names_are_refused(module, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        module("run").parse(["--tasks=text,poetry"])
    assert "unknown tasks poetry; known: in-context-recall" in capsys.readouterr().err


def test_the_table_goes_between_the_marks(module, tmp_path: Path) -> None:
    report = module("report")
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    genome = done("genome", "hyena", 0.3) | {
        "unit": "bits",
        "tests": {"held-out strain": {"accuracy": 0.3, "bits": 1.9, "counted": 4}},
    }
    manifest = {"date": "2026-01-02T03:04:05", "commit": "abcdef0123456789", "uncommitted_changes": False}
    result = {
        "manifest": manifest | {"cpu": "a CPU", "cores": 2},
        "size": "small",
        "seed": 0,
        "device": "cpu",
        "workers": 2,
        "seconds": 90,
        "left_out": {"coding": "no genes"},
        "runs": [done("in-context-recall", "hyena", 0.9876), done("in-context-recall", "striped", 1.0), genome],
    }
    report.document(result, page)
    text = page.read_text()
    assert text.startswith(f"before\n{report.BEGIN}\nSize `small`, seed 0, 2026-01-02, commit abcdef012345, a CPU")
    assert text.endswith(f"Left out: coding: no genes\n{report.END}\nafter\n")
    assert "old" not in text
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert cells[0] == ["task", "figure", "hyena", "striped"]
    assert cells[2] == ["in-context-recall", "% right", "98.8 (81.7)", "100.0"]
    assert cells[3] == ["genome, held-out strain", "bits a token", "1.900", ""]


def test_the_page_has_the_marks(module) -> None:
    report = module("report")
    assert report.DOCS.read_text().count(report.BEGIN) == report.DOCS.read_text().count(report.END) == 1
