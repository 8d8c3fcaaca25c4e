"""What no file of the project may hold: calls that run data as code, prints, machine paths, unfinished work."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LONGEST_FILE = 450


def project_files() -> list[Path]:
    """Every file that git holds or would take."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    return sorted(path for name in listed.split("\0") if name and (path := ROOT / name).is_file())


def is_text(path: Path) -> bool:
    return b"\0" not in path.read_bytes()[:8192]


FILES = project_files()
PYTHON = [path for path in FILES if path.suffix == ".py"]
SOURCE = [path for path in PYTHON if (ROOT / "src") in path.parents]
TEXT = [path for path in FILES if is_text(path) and path.stat().st_size < 1_000_000]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_the_guards_look_at_something() -> None:
    assert {"src/crocuta/errors.py", "tests/guards/test_source.py"} <= {name(path) for path in PYTHON}
    assert {"Makefile", "README.md", ".ci/run"} <= {name(path) for path in TEXT}


# --- calls ---

UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {"eval", "exec", "torch.load", "yaml.load", "yaml.full_load", "yaml.unsafe_load", "os.system"}


def dotted(node: ast.expr) -> str:
    """``a.b.c`` of a name or attribute, else the empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (owner := dotted(node.value)):
        return f"{owner}.{node.attr}"
    return ""


def faults(tree: ast.AST, *, prints: bool) -> Iterator[str]:
    """Each forbidden thing in a module, as ``line: what``; ``prints`` allows print."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (f"{node.lineno}: import {n.name}" for n in names if n.name in UNSAFE_MODULES)
            case ast.ImportFrom(module=module, names=names):
                if module in UNSAFE_MODULES:
                    yield f"{node.lineno}: from {module}"
                yield from (f"{node.lineno}: {module}.{n.name}" for n in names if f"{module}.{n.name}" in UNSAFE_CALLS)
            case ast.Call(func=func):
                called = dotted(func)
                shell = any(k.arg == "shell" and getattr(k.value, "value", 0) is True for k in node.keywords)
                if called in UNSAFE_CALLS or shell or (called == "print" and not prints):
                    yield f"{node.lineno}: {called}(...)"
            case ast.ExceptHandler(type=None):
                yield f"{node.lineno}: bare except"
            case ast.ExceptHandler(body=[ast.Pass()], type=ast.Name(id="Exception" | "BaseException")):
                yield f"{node.lineno}: every exception passed over"
            case ast.Raise(exc=ast.Name(id="NotImplementedError") | ast.Call(func=ast.Name(id="NotImplementedError"))):
                yield f"{node.lineno}: NotImplementedError"


def test_no_forbidden_calls() -> None:
    found = {name(p): list(faults(ast.parse(p.read_text()), prints="cli" in p.parts)) for p in SOURCE}
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(path)",
        "from torch import load",
        "yaml.load(text)",
        "eval(text)",
        "exec(text)",
        "print(text)",
        "subprocess.run(text, shell=True)",
        "try: f()\nexcept: raise",
        "try: f()\nexcept Exception: pass",
        "raise NotImplementedError",
        "raise NotImplementedError('later')",
    ],
)
def test_the_guard_sees(line: str) -> None:
    assert len(list(faults(ast.parse(line), prints=False))) == 1


@pytest.mark.parametrize("line", ["model.eval()", "yaml.safe_load(text)", "np.load(path)", "console.print(text)"])
def test_the_guard_lets_pass(line: str) -> None:
    assert list(faults(ast.parse(line), prints=False)) == []


# --- text ---


def test_files_stay_short() -> None:
    lengths = {name(path): len(path.read_text().splitlines()) for path in PYTHON}
    assert {path: length for path, length in lengths.items() if length > LONGEST_FILE} == {}


# Spelt in pieces, so that this file does not hold what it forbids.
MACHINE_PATH = re.compile(r"(?<![\w.~:/}\])-])/(?:" + "|".join(["work", "tmp", "root", "home", "Users"]) + r")\b")
UNFINISHED = re.compile(r"\b(?:" + "|".join(["TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK"]) + r")\b")


def lines_with(pattern: re.Pattern[str]) -> list[str]:
    return [
        f"{name(path)}: {line.strip()[:100]}"
        for path in TEXT
        for line in path.read_text(errors="replace").splitlines()
        if pattern.search(line)
    ]


def test_no_machine_paths() -> None:
    assert lines_with(MACHINE_PATH) == []


def test_nothing_is_left_for_later() -> None:
    assert lines_with(UNFINISHED) == []


@pytest.mark.parametrize("folder", ["tmp", "work", "home", "root"])
def test_a_machine_path_is_seen(folder: str) -> None:
    for text in (f"cd /{folder}/x", f'"/{folder}"', f"=/{folder}/a"):
        assert MACHINE_PATH.search(text), text
    for text in (f"a/{folder}/x", f"https://host/{folder}", f"/{folder}er", f"../{folder}/x", f"$HOME/{folder}"):
        assert not MACHINE_PATH.search(text), text
