"""The command ``crocuta``: one file a verb. ``--help`` works without importing torch."""

from __future__ import annotations


def main() -> None:
    """Run the command with the arguments of the process, and exit."""
    from crocuta.cli.app import app

    app()
