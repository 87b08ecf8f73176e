"""The configs that come with the package, by name."""

from __future__ import annotations

import ast
import difflib
import re
from pathlib import Path

from kdjax.errors import ConfigError

PACKAGE = Path(__file__).parents[1]


def folder() -> Path:
    """Where they lie: in the package of a wheel, beside it in the repository."""
    inside = PACKAGE / "configs"
    return inside if inside.is_dir() else PACKAGE.parent / "configs"


def names() -> dict[str, Path]:
    """Name -> its file, of every config that comes along.

    >>> names()["methods/gkd"].name
    'gkd.py'
    """
    place = folder()
    files = (path for path in sorted(place.rglob("*.py")) if holds(path, "config", "study"))
    return {path.relative_to(place).with_suffix("").as_posix(): path for path in files}


def find(name: str) -> Path:
    """The config file of a path, or else of a name: student_mix, methods/gkd, and, from whatever
    folder, configs/student_mix.py. Errors: ConfigError, with the nearest name.

    >>> find("methods/gkd").name
    'gkd.py'
    """
    if Path(name).is_file():
        return Path(name)
    known = names()
    wanted = name.removeprefix("configs/").removesuffix(".py")
    if wanted in known and not Path(name).exists():
        return known[wanted]
    near = difflib.get_close_matches(wanted, known, n=1)
    remedy = f"did you mean {near[0]}?" if near else "kdjax list names those that come along"
    raise ConfigError(f"no config file {name}; {remedy}")


def about(path: Path) -> str:
    """The first sentence of a config's docstring; it is not run."""
    return first_sentence(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "")


def first_sentence(text: str) -> str:
    """Of a docstring, in one line.

    >>> first_sentence("Dr. GRPO: centred\\nadvantages. Two updates.")
    'Dr. GRPO: centred advantages'
    """
    line = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<!Dr)(?<!\.)\.(?: |$)", line)[0]


def holds(path: Path, *kinds: str) -> bool:
    """Whether a file has get_config() or get_study(), which are of these kinds."""
    text = path.read_text(encoding="utf-8")
    return any(f"def get_{kind}(" in text for kind in kinds)
