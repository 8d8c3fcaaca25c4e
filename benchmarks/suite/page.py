"""docs/benchmarks.md: tables between two marks, and the plots beside it. The words around them are written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from suite import report
from suite.registry import P_ITEMS
from suite.report import Plain

PAGE = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"

COLOURS = {
    "ours": "#1f5fa8",
    "ours, implicit": "#58a4d8",
    "Llama, SDPA": "#c8442d",
    "stripedhyena": "#d99a1c",
    "HyenaDNA": "#7a5aa6",
}


def document(result: dict[str, Any], page: Path = PAGE) -> list[Path]:
    """Write the measured part of the page and its plots; returns what was written. ValueError without the marks."""
    text = page.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{page.name} must have one line {BEGIN} and one line {END}")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    written = [page]
    growth = growth_series(result["cases"])
    plots = []
    if growth:
        written.append(page.with_name("benchmarks-growth.png"))
        plot_growth(growth, written[-1])
        plots.append("![Seconds of a layer against length](benchmarks-growth.png)\n")
    if with_goals := [case for case in result["cases"] if case["item"]]:
        written.append(page.with_name("benchmarks-goals.png"))
        plot_goals(with_goals, written[-1])
        plots.append("![Every figure as a share of its goal](benchmarks-goals.png)\n")
    page.write_text(f"{before}{BEGIN}\n{measured(result, plots)}{END}{after}")
    return written


def measured(result: dict[str, Any], plots: Sequence[str] = ()) -> str:
    """The part of the page that a run writes."""
    cases, machine = result["cases"], result["manifest"]
    listed = [case for case in cases if case["item"]]
    others = [case for case in cases if not case["item"]]
    parts = [
        f"{machine['date'][:10]}, {machine['cpu']} ({machine['cores']} cores), torch {machine['torch']}, "
        f"{machine['threads']} thread, commit {str(machine['commit'])[:7]}"
        f"{' with uncommitted changes' if machine['uncommitted_changes'] else ''}. {report.summary(cases)}.\n",
        "### The P-list\n",
        _by_item(listed),
        report.crossover(cases) + "\n",
        "### Without a goal\n",
        report.results_table([case for case in others if not case["name"].startswith("growth/")]) + "\n",
        "### Growth with length\n",
        growth_table(growth_series(cases)),
        *plots,
        "### Seconds and bytes\n",
        report.seconds_table(cases) + "\n",
        "### Errors\n",
        report.errors_table(cases) + "\n",
    ]
    return "\n".join(parts)


def _by_item(cases: Sequence[Plain]) -> str:
    """The table, and which items have no case in it."""
    missing = [item for item in P_ITEMS if item not in {case["item"] for case in cases}]
    told = f"Not run: {', '.join(missing)}.\n" if missing else ""
    return report.results_table(cases) + "\n" + told


# --- growth ---


def growth_series(cases: Sequence[Plain]) -> dict[str, list[tuple[int, float]]]:
    """Of each side, (length, median CPU seconds), the shortest first."""
    series: dict[str, list[tuple[int, float]]] = {}
    for case in cases:
        if case["name"].startswith("growth/"):
            for side, each in case["cpu_seconds"].items():
                series.setdefault(side, []).append((case["sizes"]["length"], report.median(each)))
    return {side: sorted(points) for side, points in series.items()}


def growth_table(series: dict[str, list[tuple[int, float]]]) -> str:
    lengths = sorted({length for points in series.values() for length, _ in points})
    lines = []
    for side, points in series.items():
        at = dict(points)
        lines.append((side, *(report.seconds(at[length]) if length in at else "" for length in lengths)))
    return report.table(("a layer, forward", *(f"{length:,}" for length in lengths)), lines) + "\n" if lines else ""


def plot_growth(series: dict[str, list[tuple[int, float]]], path: Path) -> None:
    figure, axes = _figure(3.8)
    for side, points in series.items():
        lengths, seconds = zip(*points, strict=True)
        style = "-o" if side.startswith("ours") else "--s"
        axes.loglog(lengths, seconds, style, label=side, color=COLOURS.get(side), markersize=4)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens", ylabel="CPU seconds of a layer, forward (one thread)")
    axes.legend(frameon=False)
    _finish(figure, axes, path)


def plot_goals(cases: Sequence[Plain], path: Path) -> None:
    """One point a goal: 1 is the goal, right of it is better."""
    points = [
        (f"{case['item']}  {case['name']}, {goal['against']}", _of_goal(goal))
        for case in cases
        for goal in case["goals"]
        if goal["bound"] is not None and goal["figure"] is not None
    ]
    figure, axes = _figure(0.19 * len(points) + 1.2)
    for row, (_, share) in enumerate(points):
        colour = "#2f7d4f" if share >= 1 else "#c8442d"
        axes.plot([1, share], [row, row], color=colour, linewidth=1)
        axes.plot(share, row, "o", color=colour, markersize=4)
    axes.axvline(1, color="#404040", linewidth=1)
    axes.set_xscale("log", base=10)
    axes.set_yticks(range(len(points)), [label for label, _ in points], fontsize=6)
    axes.set_ylim(len(points) - 0.5, -0.5)
    axes.set(xlabel="share of the goal (1 is reached)")
    _finish(figure, axes, path)


def _of_goal(goal: Plain) -> float:
    found = goal["figure"]["median"]
    return found / goal["bound"] if goal["kind"] == "times faster" else goal["bound"] / found


def _figure(height: float) -> tuple[Any, Any]:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    return plt.subplots(figsize=(7, height), dpi=120)


def _finish(figure: Any, axes: Any, path: Path) -> None:
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)
    import matplotlib.pyplot as plt

    plt.close(figure)
