"""Compiles the CPU kernels into the package when it is built or installed; without a compiler there are none.

Every kernel file is compiled once for each instruction set; what runs is chosen when the library is loaded. The
compiler is that of CXX (as every build tool has it), else the first of c++, g++ and clang++ that there is. Run as a
script, it builds into the source tree: ``python hatch_build.py [--sanitize]``.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run as a script
    BuildHookInterface = object

KERNELS = Path(__file__).resolve().parent / "src" / "crocuta" / "ops" / "kernels"
SOURCES = KERNELS / "cpp"
LIBRARY = KERNELS / "_native.so"
FAILURE = KERNELS / "_native.txt"
"""Why there is no library; ``crocuta inspect --kernels`` says it."""

COMMON = ("threads.cpp", "library.cpp", "memory.cpp")
"""Compiled once, for every machine of the architecture."""
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-pthread", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno"]
FLAGS += ["-fno-trapping-math", "-Wall", "-Wextra", "-Wno-psabi"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1", "-fno-omit-frame-pointer"]
SANITIZE += ["-O1"]  # with checks in it, the code of -O3 takes a quarter of an hour to compile
ISAS = {
    "base": ["-O1"],  # rarely runs: compiled faster
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", "-mprefer-vector-width=512"],
}


class BuildError(Exception):
    """There is no compiler, or it refuses the sources."""


def build(*, sanitize: bool = False) -> None:
    """Compile and link ``LIBRARY``, in the place of what an earlier build left there. Raises BuildError."""
    compiler = find_compiler()
    checks = SANITIZE if sanitize else []
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    isas = ISAS if x86 else {"base": []}
    jobs = [(SOURCES / name, "", [f'-DCROCUTA_SOURCES="{hash_of_sources(SOURCES)}"']) for name in COMMON]
    for source in sorted(SOURCES.glob("*.cpp")):
        if source.name not in COMMON:
            jobs += [(source, isa, [f"-DCROCUTA_ISA={isa}", *extra]) for isa, extra in isas.items()]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [Path(folder) / f"{source.stem}{isa}.o" for source, isa, _ in jobs]
        commands = [
            [*compiler, *FLAGS, *extra, *checks, "-c", str(source), "-o", str(target)]
            for (source, _, extra), target in zip(jobs, objects, strict=True)
        ]
        list(pool.map(run, commands))
        linked = Path(folder) / "linked.so"
        run([*compiler, *FLAGS, *checks, "-shared", *map(str, objects), "-o", str(linked)])
        shutil.copy(linked, LIBRARY.with_suffix(".new"))
    LIBRARY.with_suffix(".new").replace(LIBRARY)  # a process that has the old one open keeps it


def find_compiler() -> list[str]:
    """The words that begin a call of the C++ compiler. Raises BuildError."""
    if chosen := os.environ.get("CXX"):
        return shlex.split(chosen)
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return [found]
    raise BuildError("no C++ compiler was found (c++, g++, clang++), and CXX names none")


def run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"the C++ compiler {command[0]} cannot be run: {error}") from error
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise BuildError(
            f"the C++ compiler {command[0]} failed: {' / '.join(lines[:3]) or f'status {done.returncode}'}"
        )


def hash_of_sources(folder: Path) -> str:
    """Of all files in ``folder``; the loader computes the same (crocuta.ops.kernels.library)."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.[ch]*")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


class KernelBuildHook(BuildHookInterface):  # type: ignore[misc]
    """Puts the library into wheels and, for editable installs, into the source tree."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        FAILURE.unlink(missing_ok=True)
        build_data["artifacts"] += [f"/{path.relative_to(self.root)}" for path in (LIBRARY, FAILURE)]
        try:
            build()
        except BuildError as error:
            LIBRARY.unlink(missing_ok=True)
            FAILURE.write_text(f"{error}\n")
            self.app.display_warning(f"Crocuta is installed without its compiled kernels: {error}")
        else:
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"


if __name__ == "__main__":
    FAILURE.unlink(missing_ok=True)
    try:
        build(sanitize="--sanitize" in sys.argv[1:])
    except BuildError as error:
        sys.exit(str(error))
