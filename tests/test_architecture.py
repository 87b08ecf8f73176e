"""A module imports only from rows above its own: the direction of the flow, kept true."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "kdjax"

ROWS = [
    "numerics equivalence passk claims figure digest retention fingerprint health usage",
    "base answers bootstrap majority svg",
    "processes",
    "progress",
    "symbolic chat composition kl comparison topk gate jobs sharding topology hlo"
    " preemption watchdog",
    "objective reduction advantage divergences grpo rewards head optimizer stops tasks"
    " models buckets",
    "tokenizer",
    "sources",
    "catalogue data sampler score flops",
    "config",
    "config_json",
    "timetable",
    "rollout arrow layout step checkpoint report student validation readings",
    "trajectories evaluate export command_line programs",
    "results teachers startup reference",
    "verdicts timeline",
    "tables",
    "plots summary paired terminal",
    "page expected profiling",
    "prefixes",
    "stored",
    "parts",
    "accounting drawing examine bench plan",
    "notes",
    "train",
    "study",
    "__main__",
]
ROW = {module: number for number, row in enumerate(ROWS) for module in row.split()}
WITHOUT_JAX = [
    "answers.py",
    "equivalence.py",
    "majority.py",
    "passk.py",
    "symbolic/program.py",
    "chat/program.py",
]
ONLY_IMPORTER = {
    "orbax": {"checkpoint"},
    "flax": {"models"},
    "datasets": {"sources", "trajectories"},
}


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Dotted names imported anywhere in a file; `from kdjax import x` counts as kdjax.x."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= (
                {f"{node.module}.{a.name}" for a in node.names}
                if node.module == "kdjax"
                else {node.module}
            )
    return found


FILES = sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_upwards(path):
    """kdjax.X is imported only by modules of a later row (or of the same room)."""
    own = room(path)
    for name in imports(path):
        if name.startswith("kdjax."):
            other = name.split(".")[1]
            assert other == own or ROW[other] < ROW[own], f"{own} (row {ROW[own]}) imports {other}"


@pytest.mark.parametrize(("package", "allowed"), ONLY_IMPORTER.items())
def test_packages_have_one_home(package, allowed):
    """orbax, flax and datasets are each known to one part of the project."""
    users = {room(p) for p in FILES if any(n.split(".")[0] == package for n in imports(p))}
    assert users == allowed


@pytest.mark.parametrize("path", WITHOUT_JAX)
def test_text_and_counts_need_no_jax(path):
    """Graders and estimates load in a moment: of kdjax, they import one another alone."""
    known = {f"kdjax.{name.split('/')[0].removesuffix('.py')}" for name in WITHOUT_JAX}
    found = imports(ROOT / path)
    assert not {name for name in found if name.split(".")[0] in ("jax", "flax")}
    assert {".".join(name.split(".")[:2]) for name in found if name.startswith("kdjax")} <= known


def test_files_and_functions_are_short():
    """Past 400 lines a file, or 60 a function, two ideas share a room."""
    for path in FILES:
        text = path.read_text()
        assert text.count("\n") <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                length = (
                    node.end_lineno
                    - node.lineno
                    - len((ast.get_docstring(node) or "").splitlines())
                )
                nested = [
                    n for n in ast.walk(node) if isinstance(n, ast.FunctionDef) and n is not node
                ]
                length -= sum(n.end_lineno - n.lineno for n in nested)
                assert length <= 60, f"{path.name}:{node.lineno} {node.name} has {length} lines"
