"""The first cases of the fuzzing of every format, and proof that it sees the faults that it looks for."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

FUZZ = Path(__file__).resolve().parents[1] / "fuzz"
sys.path.insert(0, str(FUZZ))

import fuzz_files  # noqa: E402
from mutations import mutate  # noqa: E402
from seeds import CONTROL, TARGETS  # noqa: E402

COUNT = 100
ALLOWED = 64 << 20


def run(*options: str) -> tuple[int, dict]:
    command = [sys.executable, str(FUZZ / "fuzz_files.py"), *options]
    process = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert process.stdout, process.stderr
    return process.returncode, json.loads(process.stdout)["formats"]


@pytest.fixture(scope="module")
def reports():
    return run("--count", str(COUNT))[1]


@pytest.mark.parametrize("name", TARGETS)
def test_changed_files_give_our_errors(reports, name):
    report = reports[name]
    assert report["failures"] == []
    assert report["cases"] == COUNT
    errors = sum(report["outcomes"].get(error, 0) for error in fuzz_files.EXPECTED)
    assert errors + report["outcomes"].get("accepted", 0) == COUNT
    assert errors > COUNT / 2  # the changes do reach what is checked
    assert TARGETS[name].sealed == (errors == COUNT)


def test_a_careless_reader_fails(tmp_path):
    status, reports = run("--format", "control", "--count", "50", "--keep", str(tmp_path))
    report = reports["control"]
    assert status == 1
    assert report["cases"] == 50
    assert report["outcomes"]["died with status -6"] == 1
    assert {failure["failure"] for failure in report["failures"]} >= {"error", "code", "died with status -6"}
    first = next(failure for failure in report["failures"] if failure["failure"] == "error")
    changed, _ = mutate(random.Random(f"control {first['index']}"), CONTROL.seed())
    kept = tmp_path / f"control-{first['index']}"
    assert {name: (kept / name).read_bytes() for name in changed} == changed


def spin(_: Path) -> None:
    end = time.process_time() + 0.02
    while time.process_time() < end:
        pass


def fail(_: Path) -> None:
    raise KeyError("x")


def panic(_: Path) -> None:
    raise BaseException("a panic")


@pytest.mark.parametrize(
    ("use", "failure"),
    [
        (lambda _: None, None),
        (fail, "error"),
        (panic, "error"),
        (lambda _: bytearray(b"x") * (ALLOWED + (8 << 20)), "memory"),
        (spin, "time"),
    ],
)
def test_every_kind_of_fault_is_seen(tmp_path, monkeypatch, use, failure):
    monkeypatch.setattr(fuzz_files, "MAX_SECONDS", 0.01 if use is spin else 60)
    assert fuzz_files.attempt(use, tmp_path, ALLOWED, [])["failure"] == failure


def test_code_that_is_run_is_seen(tmp_path):
    events: list[str] = []
    assert fuzz_files.attempt(lambda _: events.append("os.system"), tmp_path, ALLOWED, events)["failure"] == "code"


@pytest.mark.parametrize("name", TARGETS)
def test_a_case_is_made_from_its_number_alone(name):
    seed = TARGETS[name].seed()
    cases = [mutate(random.Random(f"{index}"), seed) for index in range(20)]
    assert cases == [mutate(random.Random(f"{index}"), seed) for index in range(20)]
    assert len({how for _, how in cases}) > 3
    assert any(changed[key] != seed[key] for changed, _ in cases for key in changed)
    assert all(changed.keys() <= seed.keys() for changed, _ in cases)
