"""``crocuta download``: the folder on standard output, everything else on standard error."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub_stand_in import Hub, Revision, serve

from crocuta.published import PUBLISHED

SCRIPT = """
import sys
from crocuta.cli import main
try:
    main()
finally:
    print('\\0' + '\\0'.join(sys.modules), end='', file=sys.stderr)
"""
FILES = {"config.json": b"{}", "evo2_7b.pt": b"w" * 5000, "README.md": b"#", "extra.py": b"raise SystemExit"}


@pytest.fixture
def server() -> Iterator[Hub]:
    with serve() as hub:
        hub.repositories["arcinstitute/evo2_7b"] = [
            Revision(FILES),
            Revision({"evo2_7b.pt": b"v" * 10}, names=("v0",)),
        ]
        yield hub


Command = Callable[..., tuple[int, str, str, set[str]]]


@pytest.fixture
def command(server: Hub, tmp_path: Path) -> Command:
    """``command("evo2_7b")`` runs in a process of its own: exit code, output, messages, names of loaded modules."""

    def command(*arguments: str, **variables: str) -> tuple[int, str, str, set[str]]:
        places = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": server.endpoint, "NO_PROXY": "*", "COLUMNS": "100"}
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, "download", *arguments],
            capture_output=True,
            text=True,
            env=environment | places | variables,
            timeout=60,
        )
        messages, _, modules = done.stderr.partition("\0")
        return done.returncode, done.stdout, messages, set(modules.split("\0"))

    return command


def test_a_download_and_its_second_use_without_a_server(server: Hub, command: Command, tmp_path: Path) -> None:
    code, out, messages, modules = command("evo2_7b")
    assert code == 0, messages
    folder = Path(out.removesuffix("\n"))
    assert tmp_path in folder.parents
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "config.json": b"{}",
        "evo2_7b.pt": FILES["evo2_7b.pt"],
    }
    size = "arcinstitute/evo2_7b at main: 2 files, 5,002 bytes, 5,002 of them to download"
    assert messages.splitlines()[0] == size
    assert modules & {"torch", "numpy"} == set()

    server.repositories.clear()  # the Hub knows nothing any more
    for variables in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}, {}):
        code, again, messages, _ = command("arcinstitute/evo2_7b", **variables)
        assert (code, again) == (0, out), messages


def test_a_revision(command: Command) -> None:
    code, out, messages, _ = command("evo2_7b", "--revision", "v0")
    assert code == 0, messages
    assert (Path(out.removesuffix("\n")) / "evo2_7b.pt").read_bytes() == b"v" * 10
    assert messages.startswith("arcinstitute/evo2_7b at v0: 1 file, 10 bytes")


def test_an_error_is_one_line(command: Command) -> None:
    code, out, messages, _ = command("evo2_7b", "-r", "v9")
    assert (code, out) == (1, "")
    assert messages.startswith("crocuta: error: no such revision: got 'v9'")
    assert messages.count("\n") == 1


def test_help_and_list_load_neither_torch_nor_huggingface_hub(command: Command) -> None:
    for arguments in (("--help",), ("--list",)):
        code, out, _, modules = command(*arguments)
        assert code == 0
        assert out
        assert "crocuta.cli.download" in modules
        assert modules & {"torch", "numpy", "huggingface_hub"} == set()


def test_the_list(run) -> None:
    lines = run("download", "--list").out.splitlines()
    assert lines[0] == "name\trepo\trevision\tpreset\tlayout"
    rows = [line.split("\t") for line in lines[1:]]
    assert [row[0] for row in rows] == list(PUBLISHED)
    assert ["evo-1-131k-base", "togethercomputer/evo-1-131k-base", "1.1_fix", "evo1-131k", "stripedhyena-hf"] in rows
    assert {len(row) for row in rows} == {5}


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["evo2-7b"], 1, ["'evo2-7b'", "did you mean 'evo2_7b'"]),
        ([], 2, ["NAME or --list", "crocuta download --help"]),
        (["evo2_7b", "--list"], 2, ["NAME or --list"]),
        (["evo2_7b", "--revison", "x"], 2, ["--revison"]),
    ],
)
def test_wrong_usage(run, arguments: list[str], code: int, words: list[str]) -> None:
    done = run("download", *arguments)
    assert (done.code, done.out) == (code, "")
    assert done.stderr.startswith("crocuta: error: ")
    assert done.stderr.count("\n") == 1
    assert [word for word in words if word not in done.stderr] == []
