"""The structure of the package in figures: `python tests/support/structure.py [FOLDER]`.

FOLDER is a checkout; by default the one that this file is in. docs/development.md has the table.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections import Counter, defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2]
KDJAX = ROOT / "kdjax"


def modules(folder: Path = KDJAX) -> dict[str, Path]:
    """Dotted name -> file, of every module of the package."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@functools.cache
def imports(path: Path, run: bool = False) -> frozenset[str]:
    """Dotted names of the modules imported anywhere in a file.

    run: leave out what only type checkers import.
    """
    found = set()
    tree = ast.parse(path.read_text())
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if run and isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    for node in (node for node in ast.walk(tree) if id(node) not in skipped):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if _is_module(path, name) else node.module for name in inside}
    return frozenset(found)


def _is_module(importer: Path, name: str) -> bool:
    root = next((p.parent for p in importer.parents if p.name == "kdjax"), importer.parent)
    place = root / name.replace(".", "/")
    return place.with_suffix(".py").exists() or place.is_dir()


def graph(files: dict[str, Path]) -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports (a package's name is its __init__)."""
    return {
        name: {other for other in imports(path) if other in files and other != name}
        for name, path in files.items()
    }


def depth(files: dict[str, Path]) -> int:
    """Files on the longest way along imports. Errors: RecursionError where there is a circle."""
    return len(longest(files))


def longest(files: dict[str, Path]) -> list[str]:
    """The longest way along imports."""
    arrows = graph(files)

    @functools.cache
    def way(name: str) -> list[str]:
        return [name, *max((way(other) for other in arrows[name]), key=len, default=[])]

    return max((way(name) for name in files), key=len)


def overlong(files: dict[str, Path], lines: int = 60) -> list[str]:
    """Functions of more lines, their inner functions counted and their docstrings not."""
    found = []
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                about = len((ast.get_docstring(node) or "").splitlines())
                if (node.end_lineno or 0) - node.lineno - about > lines:
                    found.append(f"{name}.{node.name}")
    return found


def homes(files: dict[str, Path]) -> list[str]:
    """Public names that the package imports from two or more of its modules: from the one that
    defines them, and from one that hands them on."""
    found: dict[str, set[str]] = defaultdict(set)
    defined = {name: _defined(path) for name, path in files.items()}
    for path in files.values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module in files:
                for alias in node.names:
                    if not _is_module(path, f"{node.module}.{alias.name}"):
                        found[alias.name].add(node.module)
    return sorted(
        name
        for name, where in found.items()
        if len(where) > 1 and any(name not in defined[module] for module in where)
    )


def _defined(path: Path) -> set[str]:
    body = ast.parse(path.read_text()).body
    names = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    targets = [t for n in body if isinstance(n, ast.Assign) for t in n.targets]
    targets += [node.target for node in body if isinstance(node, ast.AnnAssign)]
    return names | {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}


def reads_config(path: Path) -> bool:
    """Whether a file imports the class `Config`."""
    return any(
        isinstance(node, ast.ImportFrom) and "Config" in {alias.name for alias in node.names}
        for node in ast.walk(ast.parse(path.read_text()))
    )


def figures(root: Path) -> dict[str, int | float | str]:
    """What the table of docs/development.md says of a checkout."""
    files = modules(root / "kdjax")
    inside = {name: path for name, path in files.items() if name != "kdjax"}
    folders = Counter(
        p.parent.relative_to(root) for p in inside.values() if p.name != "__init__.py"
    )
    arrows = {name: len(others) for name, others in graph(inside).items()}
    lines = sum(path.read_text().count("\n") for path in files.values())
    tests = sum(path.read_text().count("\n") for path in (root / "tests").rglob("*.py"))
    fullest, most = folders.most_common(1)[0]
    readers = sum(map(reads_config, inside.values()))
    return {
        "modules": len(files),
        "modules in one folder, most": f"{most} ({fullest})",
        "import depth, files": depth(inside),
        "largest fan-out": f"{max(arrows.values())} ({max(arrows, key=lambda n: arrows[n])})",
        "public names with two homes in use": len(homes(inside)),
        "functions over 60 lines, inner ones counted": len(overlong(inside)),
        "modules that read Config": readers,
        "package lines": lines,
        "test lines": tests,
        "test lines a package line": round(tests / lines, 2),
    }


if __name__ == "__main__":
    checkout = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT).resolve()
    for what, number in figures(checkout).items():
        print(f"| {what} | {number} |")
    inside = {n: p for n, p in modules(checkout / "kdjax").items() if n != "kdjax"}
    print("\nlongest:", " > ".join(longest(inside)))
    print("homes:", ", ".join(homes(inside)))
    print("overlong:", ", ".join(overlong(inside)))
