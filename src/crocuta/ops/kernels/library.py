"""The compiled kernels: a shared library of plain C functions, opened when it is first asked for.

It is built when the package is installed and a C++ compiler is there (hatch_build.py). Functions are named
``crocuta_<kernel>_<dtype>_<instruction set>``; the machine decides once which instruction set runs.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])

_HERE = Path(__file__).resolve().parent
_ARGUMENTS: dict[str, Any] = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "d": ctypes.c_double}
_DTYPES = {torch.float32: "f32", torch.float64: "f64"}

INSTRUCTION_SETS = ("base", "avx2", "avx512")
"""From the least to the best; a machine that has one has those before it."""


class Library:
    """The functions of one instruction set; ``isa`` may be set to a lesser one (``limited_to``)."""

    def __init__(self, path: Path) -> None:
        self._functions = ctypes.CDLL(str(path))
        self.isa = _text(self._functions.crocuta_best_isa)
        self.intel = bool(self._functions.crocuta_intel())
        self.memory_array = self._functions.crocuta_memory_array
        self.memory_array.restype = ctypes.c_void_p
        self.memory_array.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
        self.memory_release = self._functions.crocuta_memory_release
        self.memory_release.restype, self.memory_release.argtypes = ctypes.c_int64, []
        self._found: dict[tuple[str, torch.dtype, str], Callable[..., None]] = {}

    def function(self, name: str, dtype: torch.dtype, signature: str) -> Callable[..., None]:
        """A kernel for a dtype: ``signature`` has a letter an argument: p (tensor or None), i (integer), d (real).

        The callable takes tensors as they are and passes their addresses: shapes, strides, dtypes and devices are the
        caller's concern. Python threads run on while it works.
        """
        key = name, dtype, self.isa
        found = self._found.get(key)
        if found is None:
            symbol = self.symbol(name, dtype, signature)

            def found(*arguments: Tensor | int | float | None) -> None:
                symbol(*[a.data_ptr() if isinstance(a, Tensor) else a for a in arguments])

            self._found[key] = found
        return found

    def symbol(self, name: str, dtype: torch.dtype, signature: str) -> Callable[..., None]:
        """The same for addresses instead of tensors, where a microsecond counts."""
        isa = "avx2" if (self.isa, dtype) == ("avx512", torch.float64) else self.isa  # as cpp/simd.h has it
        symbol = self._functions[f"crocuta_{name}_{_DTYPES[dtype]}_{isa}"]
        symbol.restype = None
        symbol.argtypes = [_ARGUMENTS[letter] for letter in signature]
        return symbol


_switched_off = False


def library() -> Library | None:
    """The library, or None where there is none (``why_not``)."""
    return None if _switched_off else _opened()[0]


def constant_in_graphs(function: F) -> F:
    """``torch.compiler.assume_constant_result``, which would import the compiler: half the time that a start takes."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_in_graphs  # a graph need not, and cannot, look at files
def available() -> bool:
    """Whether there is a library."""
    return library() is not None


@constant_in_graphs
def why_not() -> str | None:
    """Why there is no library, or None where there is one."""
    return why_switched_off() or _opened()[1]


def why_switched_off() -> str | None:
    """A reason while ``switched_off`` holds."""
    return "compiled kernels are switched off" if _switched_off else None


@contextmanager
def switched_off() -> Iterator[None]:
    """No compiled kernels for a while, as on a machine without a compiler, for comparisons. Not for use by threads."""
    global _switched_off
    before, _switched_off = _switched_off, True
    try:
        yield
    finally:
        _switched_off = before


# --- what modules that call kernels share ---


def function(name: str, dtype: torch.dtype, signature: str) -> Callable[..., None]:
    """``Library.function`` of the library that there is."""
    opened = library()
    assert opened is not None, "the dispatcher asks for compiled kernels only where there are some"
    return opened.function(name, dtype, signature)


def runs_here(u: Tensor) -> bool:
    """Whether ops of [b l d] use the compiled kernel: on a CPU that has it, for channels that lie side by side.

    Where time does, the products of matrices in torch need no copy, and the kernels would need two.
    """
    return u.device.type == "cpu" and u.stride(-1) == 1 and u.shape[-1] > 1 and available()


def rows_of(u: Tensor) -> Tensor:
    """[.. d] with neighbouring channels side by side; other strides stay as they are."""
    return u if u.stride(-1) == 1 or u.shape[-1] == 1 else u.contiguous()


def contiguous(*tensors: Tensor | None) -> list[Any]:
    """``tensor.contiguous()`` of each that is there."""
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


@contextmanager
def limited_to(isa: str) -> Iterator[None]:
    """A lesser instruction set for a while, for tests on one machine of what others run. Not for use by threads."""
    opened = library()
    if opened is None or INSTRUCTION_SETS.index(isa) > INSTRUCTION_SETS.index(opened.isa):
        raise ValueError(f"this machine has no {isa} kernels")
    best, opened.isa = opened.isa, isa
    try:
        yield
    finally:
        opened.isa = best


@functools.cache
def _opened() -> tuple[Library | None, str | None]:
    path, failure = _HERE / "_native.so", _HERE / "_native.txt"
    if not path.is_file():
        reason = failure.read_text().strip() if failure.is_file() else "the package was installed without building them"
        return None, f"no library: {reason}"
    try:
        sources = _text(ctypes.CDLL(str(path)).crocuta_sources)
        if sources != _hash_of_sources(_HERE / "cpp"):
            return None, "the compiled kernels are not of these sources: install the package again"
        return Library(path), None
    except (OSError, AttributeError) as error:
        return None, f"the compiled kernels cannot be loaded: {error}"


def _text(function: Callable[[], bytes]) -> str:
    function.restype = ctypes.c_char_p  # type: ignore[attr-defined]
    return function().decode()


def _hash_of_sources(folder: Path) -> str:
    """As hatch_build.py has it, which cannot be imported here."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.[ch]*")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
