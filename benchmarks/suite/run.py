"""Ours against the published peers: ``python benchmarks/suite/run.py``; ``--help`` has the options."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the folder of the package, not the package itself

from suite.command import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
