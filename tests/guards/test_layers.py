"""Imports flow down: a module imports from its own package and from the layers before it, and never in a circle.

Read from the source (imports inside functions and under TYPE_CHECKING count too), so that nothing need be run.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "src" / "crocuta"

LAYERS = [
    {"errors"},
    {"schema"},
    {"config"},
    {"presets", "published", "types"},
    {"ops", "tokenizers"},
    {"model"},
    {"checkpoints", "data"},
    {"inference", "training"},
    {"serve", "integrations"},
    {"crocuta"},  # the package itself, which offers the others' names
    {"cli"},
]
LEVEL = {part: level for level, layer in enumerate(LAYERS) for part in layer}


def modules() -> dict[str, Path]:
    """Dotted name to file, for every module of the package."""
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ("crocuta", *path.relative_to(PACKAGE).with_suffix("").parts)
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


MODULES = modules()


def imports(tree: ast.AST, module: str, is_package: bool, known: set[str]) -> Iterator[tuple[int, str]]:
    """(line, module of this package) for every import; ``from a import b`` means a.b where that is a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] == "crocuta")
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*above, *filter(None, [node.module])])
            if base.split(".")[0] != "crocuta":
                continue
            for alias in node.names:
                if (base, alias.name) != ("crocuta", "__version__"):
                    yield node.lineno, f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base


def imports_of(module: str) -> list[tuple[int, str]]:
    path = MODULES[module]
    return list(imports(ast.parse(path.read_text()), module, path.name == "__init__.py", set(MODULES)))


def part(module: str) -> str:
    """The top-level part of the package that a module belongs to."""
    return module.partition(".")[2].split(".")[0] or "crocuta"


def test_every_part_has_a_layer() -> None:
    assert {part(module) for module in MODULES} <= set(LEVEL)
    assert {"errors", "ops", "model", "crocuta"} <= {part(module) for module in MODULES}


def test_imports_go_down() -> None:
    upward = [
        f"{MODULES[module]}:{line} imports {imported}"
        for module in MODULES
        for line, imported in imports_of(module)
        if part(imported) != part(module) and LEVEL[part(imported)] >= LEVEL[part(module)]
    ]
    assert upward == []


def test_no_circles() -> None:
    graph = {module: {imported for _, imported in imports_of(module)} - {module} for module in MODULES}
    size = len(graph) + 1
    while len(graph) < size:  # drop what imports nothing that is left, or is imported by nothing that is left
        size, imported = len(graph), set().union(*graph.values())
        graph = {m: needs & set(graph) for m, needs in graph.items() if needs & set(graph) and m in imported}
    assert graph == {}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import crocuta.model.lm", ["crocuta.model.lm"]),
        ("from crocuta.model import lm", ["crocuta.model.lm"]),
        ("from crocuta.model.lm import Model", ["crocuta.model.lm"]),
        ("def f():\n    from crocuta.cli import main", ["crocuta.cli"]),
        ("if TYPE_CHECKING:\n    from ..model.lm import Model", ["crocuta.model.lm"]),
        ("from . import fir", ["crocuta.ops.fir"]),
        ("from crocuta import __version__", []),
        ("from crocuta import load", ["crocuta"]),
        ("import torch\nfrom crocutalib import x", []),
    ],
)
def test_the_guard_sees(source: str, expected: list[str]) -> None:
    known = {"crocuta", "crocuta.model", "crocuta.model.lm", "crocuta.ops", "crocuta.ops.fir", "crocuta.cli"}
    assert [name for _, name in imports(ast.parse(source), "crocuta.ops.modal", False, known)] == expected
