"""What the README tells people to type works.

Every ``make`` target and every ``crocuta`` verb and option in its ``bash`` blocks exists. Blocks marked ``bash run`` or
``python run`` are run, in a folder that holds what ``make demo`` leaves, with tiny models in the place of trained ones.
"""

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from crocuta.checkpoints.native import save
from crocuta.model.build import build_model
from crocuta.presets import preset
from crocuta.tokenizers.load import make_tokenizer

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^```(\w+)( run)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
Block = tuple[str, bool, str]


def blocks(text: str) -> list[Block]:
    """(language, to be run, contents) of every fenced block."""
    return [(language, bool(run), body) for language, run, body in FENCE.findall(text)]


def commands(script: str) -> Iterator[list[str]]:
    """The words of every simple command, without comments, variables set before it and redirections."""
    for line in script.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word in {"|", "||", "&&", ";", "&"}:
                while words and re.fullmatch(r"\w+=.*", words[0]):
                    words = words[1:]
                if words:
                    yield words
                words = []
            else:
                words.append(word)


README = blocks((ROOT / "README.md").read_text())
TYPED = [words for language, _, body in README if language == "bash" for words in commands(body)]
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
ENVIRONMENT = os.environ | {"COLUMNS": "200", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


@cache
def verb_help(verb: str) -> str:
    """What ``crocuta VERB --help`` prints; the test fails if there is no such verb."""
    done = subprocess.run(["crocuta", verb, "--help"], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, f"crocuta {verb} --help: {done.stderr}"
    return done.stdout


def unknown(words: list[str]) -> list[str]:
    """What a typed command names that does not exist."""
    program, *arguments = words
    match Path(program).name:
        case "make":
            return [a for a in arguments if not a.startswith("-") and "=" not in a and a not in TARGETS]
        case "crocuta" if arguments:
            options = [a.split("=")[0] for a in arguments[1:] if re.match("--?[a-z]", a)]
            return [o for o in options if not re.search(rf"(?<![\w-]){re.escape(o)}(?![\w-])", verb_help(arguments[0]))]
    return []


def test_the_readme_shows_the_two_commands_and_runs_some() -> None:
    assert ["make", "demo"] in TYPED
    assert ["make", "test"] in TYPED
    assert {"bash", "python"} <= {language for language, run, _ in README if run}


def test_every_command_and_option_of_the_readme_exists() -> None:
    assert {shlex.join(words): unknown(words) for words in TYPED if unknown(words)} == {}


def test_every_target_of_the_makefile_is_phony_and_explained() -> None:
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony
    assert set(phony[1].split()) == TARGETS
    assert set(re.findall(r"^([\w-]+):.*## \S", makefile, re.MULTILINE)) == TARGETS


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as after ``make demo`` and ``make demo DATA=dna``."""
    folder = tmp_path_factory.mktemp("readme")
    # No attention in the second: the README scores a whole genome with it, which takes the square of its length.
    for name, kind, tokenizer_type in (("text", "tiny-striped", "bytes"), ("dna", "tiny-modal", "dna")):
        tokenizer = make_tokenizer({"type": tokenizer_type})
        config = dataclasses.replace(preset(kind), vocab_size=tokenizer.vocab_size)
        save(build_model(config), tokenizer, folder / "runs" / f"demo-{name}")
    shutil.copytree(ROOT / "examples", folder / "examples")
    return folder


@pytest.mark.parametrize(("language", "body"), [(language, body) for language, run, body in README if run])
def test_a_marked_block_runs(language: str, body: str, demo_folder: Path) -> None:
    program = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}[language]
    done = subprocess.run([*program, body], cwd=demo_folder, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, f"{body}\n{done.stderr}"


def test_the_guard_sees() -> None:
    text = '```bash run\nA=1 make lint | crocuta score x --zzz "a b" # no\n```\n\n```python\nimport x\n```\n'
    assert blocks(text) == [
        ("bash", True, 'A=1 make lint | crocuta score x --zzz "a b" # no\n'),
        ("python", False, "import x\n"),
    ]
    assert list(commands(blocks(text)[0][2])) == [["make", "lint"], ["crocuta", "score", "x", "--zzz", "a b"]]
    assert unknown(["make", "lint", "nothing", "DATA=dna", "-j2"]) == ["nothing"]
    assert unknown(["crocuta", "score", "x", "--zzz", "--help"]) == ["--zzz"]
