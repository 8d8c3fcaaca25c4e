"""Hostile files are refused in little time and memory, and the interpreter does nothing that they ask for.

The whole corpus is opened in one process of its own, under an audit hook that notes every event by which code could
run; a control shows that the hook sees what unpickling would have done.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hostile_files import CORPUS, MARKER

MAX_SECONDS, MAX_GROWTH = 2.0, 256 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def results(folder):
    script = Path(__file__).with_name("hostile_process.py")
    process = subprocess.run([sys.executable, str(script), str(folder)], capture_output=True, text=True, timeout=100)
    assert process.returncode == 0, process.stderr[-2000:]
    return json.loads(process.stdout)


def test_the_corpus_is_large_and_a_sound_file_is_read(results):
    assert len(CORPUS) > 100
    assert results["sound"]["error"] == "accepted"


@pytest.mark.parametrize("name", CORPUS)
def test_each_is_refused_for_its_own_reason(results, name):
    error = results[name]["error"]
    assert error.startswith("WeightsFormatError: ")
    assert re.search(CORPUS[name][1], error)
    assert name in error or name == "device"


def test_pickles_inside_pickles_are_refused(results):
    errors = [result["error"] for name, result in results.items() if name.startswith("extra state")]
    assert len(errors) > 8
    assert all(error.startswith("WeightsFormatError: the bytes") for error in errors)
    assert sum("names posix.system" in error for error in errors) == len(errors) - 1


def test_nothing_is_run_imported_or_opened_elsewhere(results, folder):
    tried = {name: result["events"] for name, result in results.items() if name not in ("control", "mark")}
    assert {name: events for name, events in tried.items() if events} == {}
    assert not results["mark"]["left"]
    assert any(event.startswith("os.system") for event in results["control"]["events"])
    assert (folder / MARKER).exists()  # the control's


@pytest.mark.parametrize(("cost", "limit"), [("seconds", MAX_SECONDS), ("memory", MAX_GROWTH)])
def test_time_and_memory_are_bounded(results, cost, limit):
    costs = {name: result[cost] for name, result in results.items() if name != "mark"}
    assert len(costs) > len(CORPUS)
    assert {name: spent for name, spent in costs.items() if spent > limit} == {}
