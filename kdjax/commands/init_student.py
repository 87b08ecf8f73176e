"""`kdjax init-student`: a student of its teacher's widths and fewer layers."""

from __future__ import annotations

import re
from pathlib import Path

from kdjax.commands.arguments import option
from kdjax.errors import ConfigError

USAGE = "kdjax init-student TEACHER OUT --layers 10|0,3,6 [--fresh [--seed 0]]"


def run(args: list[str]) -> None:
    rest = list(args)
    layers, seed = option(rest, "--layers"), option(rest, "--seed")
    fresh = "--fresh" in rest
    rest = [arg for arg in rest if arg != "--fresh"]
    if len(rest) != 2 or layers is None or (seed is not None and not fresh):
        raise ConfigError(f"usage: {USAGE}")
    if seed is not None and not re.fullmatch(r"\d{1,9}", seed):
        raise ConfigError(f"--seed is a whole number, got {seed}")
    from kdjax import models
    from kdjax.models.pruned import init_student

    teacher, out = models.find(rest[0]), rest[1]
    kept = init_student(teacher, Path(out), _parsed(layers), int(seed or 0) if fresh else None)
    listed = ", ".join(map(str, kept))
    what = f"{len(kept)} fresh layers as wide as those" if fresh else f"layers {listed}"
    print(f"wrote {out}: {what} of {rest[0]}")


def _parsed(text: str) -> int | list[int]:
    """How many layers, or which: 10, or 0,3,6 (one alone: 3,)."""
    if not re.fullmatch(r"\d{1,6}(,\d{1,6})*,?", text):
        raise ConfigError(f"--layers is a number, such as 10, or a list, such as 0,3,6; got {text}")
    return [int(part) for part in text.split(",") if part] if "," in text else int(text)
