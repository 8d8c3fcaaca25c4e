"""The command run inside the test's process, and tiny saved models for it."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import pytest

from crocuta.checkpoints.native import save
from crocuta.cli.app import app
from crocuta.config import ComplexModalFilterConfig
from crocuta.model.build import build_model
from crocuta.presets import preset, striped
from crocuta.tokenizers.bytes import ByteTokenizer
from crocuta.tokenizers.dna import DNATokenizer


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    stdout: bytes
    stderr: str

    @property
    def out(self) -> str:
        return self.stdout.decode()


class Terminal(io.TextIOWrapper):
    """Standard input that a person types."""

    def isatty(self) -> bool:
        return True


Run: TypeAlias = Callable[..., Done]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]) -> Run:
    """``run("score", folder, "-", stdin=b"...")``; an exception that is no exit reaches the test."""
    monkeypatch.setattr(logging.getLogger("crocuta"), "handlers", [])

    def run(*arguments: object, stdin: bytes = b"", terminal: bool = False) -> Done:
        stream = (Terminal if terminal else io.TextIOWrapper)(io.BufferedReader(io.BytesIO(stdin)))
        monkeypatch.setattr(sys, "stdin", stream)
        capsysbinary.readouterr()
        with pytest.raises(SystemExit) as exit_:
            app([str(argument) for argument in arguments])
        sys.stdout.flush()
        out, err = capsysbinary.readouterr()
        return Done(int(exit_.value.code or 0), out, err.decode())

    return run


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model of bytes."""
    folder = tmp_path_factory.mktemp("models") / "bytes"
    save(build_model(preset("tiny-striped"), seed=1), ByteTokenizer(), folder)
    return folder


@pytest.fixture(scope="session")
def dna_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model of nucleotides, with a BOS token."""
    filter_ = ComplexModalFilterConfig(modes=2)
    config = striped(vocab_size=16, hidden_size=16, num_layers=1, filter=filter_, num_heads=2)
    folder = tmp_path_factory.mktemp("models") / "dna"
    save(build_model(config, seed=2), DNATokenizer(), folder)
    return folder
