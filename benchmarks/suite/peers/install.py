"""Makes the peers' environment, ``.venv-peers``, from the pins beside this file.

    python benchmarks/suite/peers/install.py

Does nothing where it is there already, made from the same pins. It stands apart from ``.venv`` because the peers'
packages ask for what the library must not depend on.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
FOLDER = HERE.parents[2] / ".venv-peers"
STAMP = FOLDER / ".installed"

WHEELS = ("stripedhyena==0.2.2", "vtx==1.1.0")
"""Installed without their dependencies: flash-attention and others build against CUDA, and nothing here calls them."""


def key() -> str:
    """What the environment is made from."""
    return (HERE / "requirements.txt").read_text() + "\n".join(WHEELS)


def install() -> None:
    """CalledProcessError with pip's own words where a package cannot be had."""
    if not (FOLDER / "bin" / "python").exists():
        venv.create(FOLDER, with_pip=True)
    STAMP.unlink(missing_ok=True)
    (FOLDER / ".gitignore").write_text("*\n")
    pip = [str(FOLDER / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--requirement", str(HERE / "requirements.txt")], check=True)
    subprocess.run([*pip, "--no-deps", *WHEELS], check=True)
    STAMP.write_text(key())


def main() -> int:
    if STAMP.exists() and STAMP.read_text() == key():
        return 0
    print("Installing the benchmark's peers into .venv-peers; the first time takes some minutes.", file=sys.stderr)
    try:
        install()
    except subprocess.CalledProcessError as error:
        print(f"The peers could not be installed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
