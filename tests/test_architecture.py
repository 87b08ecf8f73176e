"""A room imports only from rooms of earlier rows: the direction of the flow, kept true."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from structure import depth, imports, modules, overlong

ROWS = (
    "errors numerics",
    "base sharding runtime",
    "losses models grading",
    "step rollouts data",
    "config storage evaluate tasks",
    "report export claims",
    "training",
    "study plan bench",
    "commands",
    "__main__",
)
ROW = {room: number for number, row in enumerate(ROWS, start=1) for room in row.split()}
NO_CONFIG = {room for room, row in ROW.items() if row <= 4} | {"storage", "evaluate"}
ONLY_IMPORTERS = {"orbax": {"storage"}, "flax": {"models"}, "datasets": {"data", "storage"}}
FILES = {name: path for name, path in modules().items() if name != "kdjax"}


def room(name: str) -> str:
    """kdjax.step.head -> step."""
    return name.split(".")[1]


@pytest.mark.parametrize("name", FILES)
def test_imports_go_up_the_rows(name):
    """Of other rooms a file imports those of earlier rows alone, and no config below row 5."""
    others = {room(other) for other in imports(FILES[name]) if other.startswith("kdjax.")}
    wrong = {o for o in others - {room(name)} if ROW[o] >= ROW[room(name)]}
    assert not wrong, f"{room(name)} (row {ROW[room(name)]}) imports {wrong}"
    assert "config" not in others or room(name) not in NO_CONFIG


def test_no_circles():
    """Following imports ends; the longest way is 20 files or fewer."""
    assert depth(FILES) <= 20


@pytest.mark.parametrize(("package", "allowed"), ONLY_IMPORTERS.items())
def test_packages_have_one_home(package, allowed):
    """orbax, flax and datasets are each known to one part of the project."""
    users = {room(n) for n, p in FILES.items() if package in {i.split(".")[0] for i in imports(p)}}
    assert users == allowed


def test_grading_needs_no_jax():
    """Graders and estimates load in a moment."""
    for name in (name for name in FILES if room(name) == "grading"):
        found = imports(FILES[name], run=True)
        assert not {i for i in found if i.split(".")[0] in ("jax", "flax")}, name
        allowed = {"grading", "errors"} | ({"base"} if name.endswith("rewards") else set())
        assert {room(i) for i in found if i.startswith("kdjax.")} <= allowed, name


def test_files_and_functions_are_short():
    """Past 400 lines a file, or 60 a function with its inner ones, two ideas share a room; past 12
    files a folder is two."""
    assert not overlong(FILES, lines=60)
    assert not [name for name, path in FILES.items() if path.read_text().count("\n") > 400]
    folders = [path.parent for path in FILES.values() if path.name != "__init__.py"]
    for folder in set(folders):
        assert folders.count(folder) <= 12, folder


def test_text_is_utf8_whatever_the_locale():
    """Who opens a file or a pipe as text says in which encoding."""
    unsaid = [f"{n}: {ast.unparse(call)}" for n, p in FILES.items() for call in _opens_text(p)]
    assert unsaid == []


def _opens_text(path: Path) -> list[ast.Call]:
    """The calls that open text in the locale's encoding (`files.read_text` has its own)."""
    found = []
    for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(call, ast.Call) or any(k.arg == "encoding" for k in call.keywords):
            continue
        owner, _, name = ast.unparse(call.func).rpartition(".")
        binary = any("b" in a.value for a in call.args if _is_mode(a))
        binary |= (owner, name) == ("os", "open")
        methods = {"read_text", "write_text"} if owner not in ("", "files") else set()
        pipe = owner == "subprocess" and any(k.arg == "text" for k in call.keywords)
        if pipe or (name in {"open", "fdopen"} | methods and not binary):
            found.append(call)
    return found


def _is_mode(node: ast.AST) -> bool:
    text = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return text and set(node.value) <= set("rwxab+t")


def test_public_names_have_one_home():
    """No file hands on another's names, but for the front pages that users import from."""
    front = {"kdjax.config", "kdjax.models", "kdjax.tasks", "kdjax.claims"}
    for name, path in FILES.items():
        lists = [n for n in ast.walk(ast.parse(Path(path).read_text())) if _is_all(n)]
        assert not lists or name in front, f"{name} has an __all__"


def _is_all(node: ast.AST) -> bool:
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
