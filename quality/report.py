"""The Markdown table of a result, and its place in docs/quality.md.

python quality/report.py quality/results/small-2026-01-01.json     # puts the table into docs/quality.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from _timing import table

DOCS = Path(__file__).resolve().parents[1] / "docs" / "quality.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"

PUBLISHED: Mapping[str, Mapping[str, str]] = {
    "in-context-recall": {"hyena": "81.7", "transformer": "94.1", "multi-head": "99.0"},
    "noisy-in-context-recall": {"hyena": "78.8", "transformer": "86.8", "multi-head": "98.6"},
    "fuzzy-in-context-recall": {"hyena": "7.9", "transformer": "29.8", "multi-head": "14.4"},
    "memorization": {"hyena": "89.5", "transformer": "85.2", "multi-head": "89.4"},
    "compression": {"hyena": "45.2", "transformer": "51.6", "multi-head": "44.8"},
    "selective-copying": {"hyena": "93.1", "transformer": "99.6", "multi-head": "93.0"},
}
"""Per cent, of MAD at its own budget, as the DeltaNet paper prints them again."""


def markdown(result: Mapping[str, Any]) -> str:
    """A row for each test, a column for each model: per cent right, or bits; "(published)" where there is a figure."""
    models = list(dict.fromkeys(run["model"] for run in result["runs"]))
    rows: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for run in result["runs"]:
        for test in run["tests"]:
            rows.setdefault((run["row"], test), {})[run["model"]] = run
    header = ["task", "figure", *models]
    body = [
        [
            row if test == "test" else f"{row}, {test}",
            "% right" if next(iter(runs.values()))["unit"] == "accuracy" else "bits a token",
            *(_cell(runs.get(model), test) for model in models),
        ]
        for (row, test), runs in rows.items()
    ]
    return table(header, body)


def _cell(run: Mapping[str, Any] | None, test: str) -> str:
    if run is None:
        return ""
    score = run["tests"][test]
    if run["unit"] == "bits":
        return f"{score['bits']:.3f}"
    published = PUBLISHED.get(run["row"], {}).get(run["model"])
    return f"{100 * score['accuracy']:.1f}" + (f" ({published})" if published else "")


def caption(result: Mapping[str, Any]) -> str:
    """Size, seed, date, commit and machine of a result."""
    manifest = result["manifest"]
    sizes = sorted({run["parameters"] for run in result["runs"]})
    commit = (manifest["commit"] or "no commit")[:12] + (" with changes" if manifest["uncommitted_changes"] else "")
    return (
        f"Size `{result['size']}`, seed {result['seed']}, {manifest['date'][:10]}, commit {commit}, {manifest['cpu']}, "
        f"{manifest['cores']} cores, {result['workers']} processes of one thread, device {result['device']}; "
        f"{sizes[0]:,} to {sizes[-1]:,} parameters; {result['seconds'] / 60:.0f} minutes."
    )


def document(result: Mapping[str, Any], page: Path = DOCS) -> None:
    """Put caption and table between the marks of a page."""
    before, rest = page.read_text().split(BEGIN)
    after = rest.split(END)[1]
    skipped = "".join(f"\nLeft out: {row}: {reason}\n" for row, reason in result["left_out"].items())
    page.write_text(f"{before}{BEGIN}\n{caption(result)}\n\n{markdown(result)}\n{skipped}{END}{after}")


if __name__ == "__main__":
    document(json.loads(Path(sys.argv[1]).read_text()))
