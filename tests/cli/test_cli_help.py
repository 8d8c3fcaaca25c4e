"""``--help`` and ``--version``: quick, so without what is slow to import, and there for every verb."""

import os
import subprocess
import sys

import pytest

VERBS = ("train", "generate", "score", "embed", "predict", "inspect", "convert", "distill", "download", "prepare")
SLOW = {"torch", "numpy", "rich", "yaml", "matplotlib", "safetensors", "tokenizers", "pydantic"} | {"huggingface_hub"}
SCRIPT = """
import sys
from crocuta.cli import main
try:
    main()
except SystemExit as exit_:
    print('\\0' + '\\0'.join(sys.modules), end='', file=sys.stderr)
    raise
"""


def fresh(*arguments: str) -> tuple[int, str, set[str]]:
    """Exit code, standard output and loaded modules of the command in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "100"},
    )
    return done.returncode, done.stdout, set(done.stderr.split("\0")[1:])


@pytest.mark.parametrize("arguments", [["--help"], [], *([verb, "--help"] for verb in VERBS), ["--version"]])
def test_help_loads_nothing_slow(arguments: list[str]) -> None:
    code, out, modules = fresh(*arguments)
    assert code == 0
    assert "crocuta" in out
    assert "crocuta.cli.app" in modules
    assert modules & SLOW == set()


def test_the_check_sees_what_a_verb_loads() -> None:
    assert "torch" in fresh("inspect", "tiny-modal")[2]


def test_help_names_every_verb(run) -> None:
    out = run("--help").out
    assert [line.split()[0] for line in out.split("Commands:\n")[1].splitlines()] == list(VERBS)


def test_the_version_is_that_of_the_package(run) -> None:
    import crocuta

    assert run("--version").out == f"crocuta {crocuta.__version__}\n"


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_is_explained(run, verb: str) -> None:
    options = run(verb, "--help").out.split("Options:\n")[1].splitlines()
    entries = [i for i, line in enumerate(options) if line.startswith("  -")]
    assert len(entries) >= 3
    for i in entries:
        after = options[i].lstrip().split("  ", 1)[1:] or [options[i + 1].strip()]
        assert after[0].strip(), options[i]
