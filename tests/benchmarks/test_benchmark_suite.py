"""The benchmark suite: every item is there, wrong answers get no speed, what goes wrong is said, ratios are ratios."""

from __future__ import annotations

import ast
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from crocuta.errors import CrocutaError

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "suite"


@pytest.fixture
def suite(module: Callable[[str], ModuleType]) -> Callable[[str], Any]:
    """A module of the suite by its name in the package."""
    return lambda name: module(f"suite.{name}")


# --- the registry ---


def test_every_item_of_the_list_has_its_cases(suite: Callable[[str], Any]) -> None:
    registry = suite("registry")
    goals = {
        (goal.item or case.item, case.name, goal.against, goal.bound) for case in registry.CASES for goal in case.goals
    }
    assert {case.item for case in registry.CASES} == {*registry.P_ITEMS, None}
    cached = "stripedhyena, filter cached, no state"
    assert {
        ("P1", "modal_prefill/2_modes", "stripedhyena", 400.0),
        ("P1", "modal_prefill/8_modes", "stripedhyena", 1000.0),
        ("P1", "modal_prefill/2_modes", cached, 20.0),
        ("P1", "modal_prefill/8_modes", cached, 20.0),
        ("P2", "modal_training/2_modes", "stripedhyena", 50.0),
        ("P2", "modal_training/8_modes", "stripedhyena", 120.0),
        ("P1", "modal_prefill/8_modes_torch_paths_alone", "stripedhyena", 10.0),
        ("P2", "modal_training/2_modes_torch_paths_alone", "stripedhyena", 6.0),
        ("P2", "modal_training/8_modes_torch_paths_alone", "stripedhyena", 6.0),
        ("P3", "modal_real/16_modes", "vortex, no state", 200.0),
        ("P6", "fir_gate/3_taps", "conv1d, eager", 12.0),
        ("P6", "fir/128_taps", "conv1d", 25.0),
        ("P7", "prefill/2_modes", "stripedhyena", 9.0),
        ("P7", "prefill/8_modes", "stripedhyena", 32.0),
        ("P14", "online_convolution/16384", "cached dot product", 300.0),
    } <= goals
    by_item: dict[str, list[float | None]] = {}
    for item, _, _, bound in sorted(goals, key=str):
        by_item.setdefault(str(item), []).append(bound)
    assert sorted(by_item["P4"]) == [4.5] * 4 + [6.0] * 4
    assert sorted(by_item["P5"]) == [4.0] * 4 + [6.0] * 4
    assert [bound for bound in by_item["P7"] if bound == 1.08] == [1.08] * 5
    assert sorted(by_item["P8"]) == [1.5, 1.85, 2.4]
    assert sorted(by_item["P9"]) == [5.2, 6.7]
    assert sorted(bound for bound in by_item["P10"] if bound) == [1.75, 3.6, 9.5]
    assert sorted(by_item["P11"]) == [0.35, 0.55, 1.0]
    assert sorted(by_item["P12"]) == [1.4, 1.7, 2.3, 3.0, 3.3, 5.0, 5.0, 6.0, 10.0]
    assert sorted(by_item["P13"]) == [300.0, 1200.0]
    unlisted = {case.name.split("/")[0] for case in registry.CASES if case.item is None}
    assert {"score", "embed", "generate", "load", "import", "growth", "train_mamba"} <= unlisted


def _functions(module: str) -> set[str]:
    tree = ast.parse((FOLDER / f"{module.replace('.', '/')}.py").read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def _tasks(case: Any) -> Iterator[str]:
    references = [side.reference for side in case.sides] + [case.gate.reference]
    yield from (side.task for side in (*case.sides, *references) if side is not None)
    yield from (name for name in (case.inputs, case.gate.truth) if name is not None)


def test_cases_are_whole(suite: Callable[[str], Any]) -> None:
    """Names are unique, tasks exist (read from the source: the peers' packages need not be there), goals name sides."""
    cases = suite("registry").CASES
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        assert case.ours.environment == "ours", case.name
        assert case.goals, case.name
        assert {goal.against for goal in case.goals} <= {side.name for side in case.sides[1:]}, case.name
        assert case.memory == (case.goals[0].kind == "times the memory"), case.name
        assert set(case.smoke) <= {*case.sizes, "longest", "prompt"}, case.name
        for task in _tasks(case):
            module, _, function = task.partition(":")
            assert function in _functions(module), task


def test_cases_are_chosen_by_glob_and_by_item(suite: Callable[[str], Any]) -> None:
    selected = suite("registry").selected
    assert [case.name for case in selected("modal_pre*_modes")] == ["modal_prefill/2_modes", "modal_prefill/8_modes"]
    assert {case.item for case in selected("P6, P14")} == {"P6", "P14"}
    assert selected("nothing*") == []
    assert len(selected(None)) == len(suite("registry").CASES)


# --- ratios and goals ---


class Scripted:
    """A process whose rounds take what the script says; ``log`` gets the order of calls."""

    def __init__(self, name: str, seconds: list[float], log: list[str]) -> None:
        self.name, self.log = name, log
        self.seconds = iter([1.0, *seconds])  # the first is the warm-up, long enough that none is repeated

    def request(self, do: str, **arguments: Any) -> dict[str, float]:
        assert (do, arguments) == ("time", {"repeats": 1})
        self.log.append(self.name)
        taken = next(self.seconds)
        return {"cpu": taken, "wall": taken, "round": taken}


def _timed(suite: Callable[[str], Any], scripts: dict[str, list[float]], **changes: Any) -> tuple[Any, list[str]]:
    measure, case = suite("measure"), suite("registry").selected("long_convolution/1024")[0]
    case = dataclasses.replace(case, **changes)
    result, log = measure.Result(case, "failed"), []
    run = measure._Run(case, None, Path(), measure.Options(), result)
    run.time({name: Scripted(name, seconds, log) for name, seconds in scripts.items()})
    return result, log


def test_rounds_alternate_and_the_figure_is_the_median_of_their_ratios(suite: Callable[[str], Any]) -> None:
    theirs = "safari, HyenaDNA"
    result, log = _timed(suite, {"ours": [1.0, 1.0, 2.0, 1.0, 4.0], theirs: [5.0, 7.0, 4.0, 9.0, 4.0]})
    assert log == ["ours", theirs, *[theirs if turn in (1, 2) else "ours" for turn in (0, 1, 2, 3)] * 2, "ours", theirs]
    figure = suite("measure")._figure(result.case.goals[0], result.case, result)
    assert (figure.median, figure.min, figure.max) == (5.0, 1.0, 9.0)  # of 5, 7, 2, 9, 1: not 5 / 1, of medians
    cost = dataclasses.replace(result.case.goals[0], kind="times the cost")
    assert suite("measure")._figure(cost, result.case, result).max == 1.0


def test_the_budget_ends_rounds_but_never_below_the_least(suite: Callable[[str], Any]) -> None:
    scripts = {"ours": [1.0] * 5, "safari, HyenaDNA": [40.0] * 5}
    assert len(_timed(suite, scripts, seconds=10.0)[0].seconds["ours"]) == 3
    assert len(_timed(suite, scripts, seconds=10.0, least_rounds=1)[0].seconds["ours"]) == 1
    assert len(_timed(suite, scripts, seconds=1000.0)[0].seconds["ours"]) == 5


def test_goals_know_their_direction_and_how_far_they_are_missed(suite: Callable[[str], Any]) -> None:
    case, measure, timing = suite("case"), suite("measure"), suite("measure").Ratio
    faster = case.Goal(against="peer", bound=6.0)
    memory = case.Goal(against="peer", bound=0.5, kind="times the memory")
    assert measure.Outcome(faster, timing(6.0, 5.0, 7.0), 3).reached is True
    missed = measure.Outcome(faster, timing(2.0, 1.0, 3.0), 3)
    assert (missed.reached, missed.missed_by) == (False, 3.0)
    missed = measure.Outcome(memory, timing(0.75, 0.75, 0.75), 1)
    assert (missed.reached, missed.missed_by) == (False, 1.5)
    assert measure.Outcome(memory, timing(0.4, 0.4, 0.4), 1).missed_by is None
    assert measure.Outcome(case.Goal(against="peer", bound=None), timing(1.0, 1.0, 1.0), 3).reached is None


# --- the gate ---


def test_the_gate_judges_every_answer(suite: Callable[[str], Any]) -> None:
    judge, truth = suite("gate").judge, {"y": torch.tensor([3.0, 4.0]), "state": torch.ones(2)}
    bounds = {"y": 1e-3, "s*": 1e-3}

    def errors(answers: dict[str, torch.Tensor], required: tuple[str, ...] = ()) -> dict[str, tuple[float, bool]]:
        return {check.answer: (check.error, check.holds) for check in judge("s", answers, truth, bounds, required)}

    assert errors({"y": torch.tensor([3.0, 4.05])}) == {"y": (pytest.approx(0.01, rel=1e-4), False)}
    assert errors({"y": truth["y"]}, ("y", "state"))["state"] == (math.inf, False)  # missing
    assert errors({"y": truth["y"][:1]})["y"] == (math.inf, False)  # another shape
    assert errors({"y": torch.tensor([math.nan, 4.0])})["y"] == (math.inf, False)
    assert errors({"other": torch.ones(1)})["other"] == (math.inf, False)  # the truth has none
    assert errors({"state": torch.ones(2)})["state"] == (0.0, True)  # by the pattern
    assert not all(check.holds for check in judge("s", {}, truth, bounds))  # no answer at all
    (unbounded,) = judge("s", {"y": truth["y"] * (1 + 1e-6)}, truth, {})
    assert not unbounded.holds


def test_truths_are_the_formulas(suite: Callable[[str], Any]) -> None:
    inputs, truth = suite("inputs"), suite("truth")
    sizes = {"channels": 3, "modes": 2, "length": 9, "gradients": False}
    given = inputs.modal(sizes)
    poles, residues = (torch.view_as_complex(given[name].double()) for name in ("poles", "residues"))
    state, outputs = torch.zeros(3, 2, dtype=torch.complex128), []
    for u in given["u"][0].double():
        state = poles * state + u[:, None]
        outputs.append((residues * state).sum(-1).real + given["skip"].double() * u)
    found = truth.modal(given, sizes)
    torch.testing.assert_close(found["y"][0], torch.stack(outputs), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found["state"][0], torch.view_as_real(state), rtol=1e-12, atol=1e-12)
    whole = truth.modal(given, {**sizes, "gradients": True})
    torch.testing.assert_close(whole["y"], found["y"], rtol=1e-12, atol=1e-12)
    assert set(whole) == {"y", "du", "dpoles", "dresidues", "dskip"}
    given = inputs.fir_gate({"channels": 2, "length": 6, "taps": 3})
    z, taps = given["z"][0].double(), given["taps"].double()
    filtered = torch.stack(
        [sum(taps[:, j] * z[t - j] for j in range(3) if t >= j) + given["bias"].double() for t in range(6)]
    )
    x2, x1, v = filtered.chunk(3, 1)
    found = truth.fir_gate(given, {})
    torch.testing.assert_close(found["x2"][0], x2, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found["u"][0], x1 * v, rtol=1e-12, atol=1e-12)


def test_hyenadna_as_published_is_ours(suite: Callable[[str], Any]) -> None:
    """Loss and every gradient in float64, through the adapters of both sides."""
    sizes = {"family": "hyenadna", "hidden": 16, "layers": 2, "vocabulary": 8, "length": 21}
    inputs = {
        name: t.double() if t.is_floating_point() else t for name, t in suite("inputs").language_model(sizes).items()
    }
    ours = suite("ours.models").training_step(inputs, {**sizes, "dtype": "float64"}).answers()
    peer = suite("peers.hyenadna")
    model = peer.model_of(
        {name: t.float() if t.is_floating_point() else t for name, t in inputs.items()}, sizes
    ).double()
    for filter_ in (
        block.mixer.filter for block in model.blocks
    ):  # made in float32, as published: here as wide as ours
        wide = peer.Filter(16, 21, torch.float64)
        filter_.features, filter_.window = wide.features, wide.window
    loss = torch.nn.functional.cross_entropy(model(inputs["ids"]).flatten(0, 1), inputs["targets"].flatten())
    loss.backward()
    torch.testing.assert_close(loss[None], ours["loss"], rtol=1e-9, atol=0, check_dtype=False)
    for name, parameter in model.named_parameters():
        given = peer.our_layout(name, parameter.grad)
        torch.testing.assert_close(given, ours[f"d{peer.our_name(name)}"], rtol=1e-7, atol=1e-9, msg=name)


# --- processes ---


def _process(suite: Callable[[str], Any], folder: Path, script: str) -> Any:
    return suite("process").Process([sys.executable, "-c", f"import sys\nsys.stdin.readline()\n{script}"], folder, {})


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("print('no JSON')", "no JSON"),
        ("print('[1]')", "no object"),
        ("sys.exit('out of luck')", "exit status 1: out of luck"),
        (
            'print(\'{"error": "ValueError: bad", "trace": "  File \\\\"a.py\\\\", line 3"}\')',
            'ValueError: bad; File "a.py", line 3',
        ),
    ],
)
def test_what_a_worker_does_wrong_is_said(suite: Callable[[str], Any], tmp_path: Path, script: str, told: str) -> None:
    process = _process(suite, tmp_path, script)
    with pytest.raises(CrocutaError) as caught:
        process.request("answer", path="x")
    process.close()
    assert told in str(caught.value)


def test_a_worker_answers_errors_and_goes_on(suite: Callable[[str], Any]) -> None:
    worker, replies = suite("worker"), []
    requests = [{"do": "time", "repeats": 1}, {"do": "dance"}, {"do": "quit"}, {"do": "never read"}]

    class Pipe:
        write = staticmethod(replies.append)
        flush = staticmethod(lambda: None)

    worker.serve(iter(json.dumps(request) for request in requests), Pipe)
    assert [json.loads(reply)["error"] for reply in replies] == [
        "ValueError: no task is loaded",
        "ValueError: unknown request 'dance'",
    ]


# --- whole runs, with adapters of the peers that need none of their packages ---


@pytest.fixture
def peers_here(suite: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The peers' environment is this one: ``peers.convolution`` wants torch alone."""
    for name in ("process", "measure"):
        monkeypatch.setattr(suite(name), "python_of", lambda _: sys.executable)


@pytest.mark.usefixtures("peers_here")
def test_a_run_from_end_to_end(
    suite: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    case_module, command = suite("case"), suite("command")
    good = suite("registry").selected("long_convolution/1024")[0]
    wrong = case_module.Side(name="wrong", task="peers.convolution:medium_fir")  # it leaves out D
    absent = case_module.Side(name="absent", task="tests_of_nothing:nowhere")
    cases = [
        good,
        dataclasses.replace(
            good, name="red", sides=(good.ours, wrong), goals=(case_module.Goal(against="wrong", bound=2.0),)
        ),
        dataclasses.replace(
            good, name="broken", sides=(good.ours, absent), goals=(case_module.Goal(against="absent", bound=2.0),)
        ),
    ]
    monkeypatch.setattr(command, "selected", lambda _: cases)
    assert command.main(["--smoke", "--output", str(tmp_path)]) == 1
    (path,) = tmp_path.glob("suite-smoke-*.json")
    found = {case["name"]: case for case in json.loads(path.read_text())["cases"]}
    measured, red, broken = found[good.name], found["red"], found["broken"]
    assert measured["status"] == "measured"
    assert {check["side"] for check in measured["checks"]} == {"ours", "safari, HyenaDNA"}
    assert all(check["error"] <= 1e-5 for check in measured["checks"])
    assert len(measured["cpu_seconds"]["ours"]) == 2
    assert measured["goals"][0]["figure"]["median"] > 0
    assert red["status"] == "red"
    assert "y of wrong" in red["reason"]
    assert (red["cpu_seconds"], red["goals"][0]["figure"]) == ({}, None)
    assert broken["status"] == "failed"
    assert "tests_of_nothing" in broken["reason"]
    printed = capsys.readouterr().out
    assert "1 thread, process-CPU time" in printed
    assert "no speed: wrong answers" in printed


@pytest.mark.usefixtures("peers_here")
def test_memory_is_measured_in_fresh_processes(suite: Callable[[str], Any], tmp_path: Path) -> None:
    case_module, process = suite("case"), suite("process")
    sides = suite("registry").selected("long_convolution/1024")[0].sides
    case = dataclasses.replace(
        suite("registry").selected("long_convolution/1024")[0],
        sizes={"channels": 64, "length": 32_768, "gradients": False},
        goals=(case_module.Goal(against=sides[1].name, bound=10.0, kind="times the memory"),),
        memory=True,
    )
    result = suite("measure").Result(case, "measured", sizes=dict(case.sizes))
    workers = process.Workers(tmp_path, 1, keep=False)
    suite("measure")._Run(case, workers, tmp_path, suite("measure").Options(), result).memory([s.name for s in sides])
    signal = 64 * 32_768 * 4
    assert 4 * signal < result.peak_bytes["safari, HyenaDNA"] < 20 * signal  # u, dy, taps, y and the transforms
    share = result.peak_bytes["ours"] / result.peak_bytes["safari, HyenaDNA"]
    assert suite("measure")._figure(case.goals[0], case, result).median == share


def test_without_the_peers_a_case_says_that_it_was_not_run(
    suite: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command, process = suite("command"), suite("process")
    monkeypatch.setattr(process, "ROOT", tmp_path)  # no .venv-peers there
    assert command.main(["--cases", "P1,P6", "--smoke", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "8 goals: 0 reached, 0 missed, 8 not measured" in printed
    assert printed.count("not run: the peers are not installed at their pins") == 8
    stamp = tmp_path / ".venv-peers" / ".installed"
    stamp.parent.mkdir()
    stamp.write_text(suite("peers.install").key() + "other")
    assert command.main(["--cases", "P14", "--smoke", "--output", str(tmp_path)]) == 0
    assert "not run: the peers" in capsys.readouterr().out
    stamp.write_text(suite("peers.install").key())
    assert process.python_of("peers") == str(tmp_path / ".venv-peers" / "bin" / "python")


@pytest.mark.parametrize("wrong", [["--rounds", "0"], ["--threads", "0"], ["--cases", "x*"], ["--smoke", "--document"]])
def test_wrong_options_end_with_one_line(
    suite: Callable[[str], Any], capsys: pytest.CaptureFixture[str], wrong: list[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        suite("command").main(wrong)
    assert stop.value.code == 2
    assert wrong[0] in capsys.readouterr().err or wrong[-1] in capsys.readouterr().err


# --- the page ---


def _plain(name: str, item: str | None, figure: float | None, **goal: Any) -> dict[str, Any]:
    found = {"median": figure, "min": figure, "max": figure} if figure is not None else None
    each = {"item": None, "against": "peer", "bound": 2.0, "kind": "times faster", "figure": found, "rounds": 3}
    each |= {"reached": None if figure is None else figure >= 2.0, "missed_by": 4.0, **goal}
    return {
        "name": name, "item": item, "what": f"what {name} is", "status": "measured" if figure else "red",
        "reason": "wrong answers: y", "goals": [each], "absent": {}, "checks": [], "peak_bytes": {}, "gate_sizes": {},
        "cpu_seconds": {"ours": [0.5, 0.25, 1.0]}, "sizes": {"length": int(name.split("/")[1])},
    }  # fmt: skip


def test_the_page_has_every_case_between_its_marks(suite: Callable[[str], Any], tmp_path: Path) -> None:
    page = suite("page")
    file = tmp_path / "benchmarks.md"
    file.write_text(f"# Title\n\n{page.BEGIN}\nold\n{page.END}\n\nwords\n")
    cases = [
        _plain("a/1", "P1", 0.5),
        _plain("b/2", "P2", None),
        _plain("growth/1024", None, 3.0, bound=None, reached=None),
        _plain("growth/2048", None, 3.0, bound=None, reached=None),
    ]
    about = dict.fromkeys(("cpu", "cores", "torch", "threads", "commit"), "x")
    result = {"cases": cases, "manifest": {**about, "date": "2026-01-02T03", "uncommitted_changes": False}}
    written = page.document(result, file)
    text = file.read_text()
    assert text.startswith("# Title\n")
    assert text.endswith("words\n")
    assert "old" not in text
    assert "missed by a factor of 4.00" in text
    assert "no speed: wrong answers: y" in text
    assert "2 goals: 0 reached, 1 missed, 1 not measured" in text
    assert "Not run: P3, P4" in text
    assert "| ours             | 500 ms | 500 ms |" in text
    assert [path.name for path in written] == ["benchmarks.md", "benchmarks-growth.png", "benchmarks-goals.png"]
    assert all(path.stat().st_size > 5000 for path in written[1:])
    file.write_text("no marks")
    with pytest.raises(ValueError, match="must have one line"):
        page.document(result, file)


def test_the_crossover_lies_where_the_ratio_is_one(suite: Callable[[str], Any]) -> None:
    crossover = suite("report").crossover

    def told(*figures: tuple[int, float]) -> str:
        return crossover([_plain(f"train_transformer/{length}", "P10", figure) for length, figure in figures])

    assert "at about 1,024 tokens" in told((512, 0.5), (2048, 2.0))
    assert "from the shortest length measured on, 512" in told((512, 1.5), (2048, 2.0))
    assert "Up to 2,048 tokens" in told((512, 0.2), (2048, 0.9))
    assert "not measured" in told((512, 0.2))
