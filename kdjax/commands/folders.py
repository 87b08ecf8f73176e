"""`kdjax export`, `export-adapter` and `init-student`: folders of models that others read."""

from __future__ import annotations

import re
from pathlib import Path

from kdjax.commands.arguments import option
from kdjax.errors import ConfigError

USAGE = "kdjax init-student TEACHER OUT --layers 10|0,3,6 [--fresh [--seed 0]]"


def export(args: list[str]) -> None:
    from kdjax import export as exports

    rest = list(args)
    dtype, step = option(rest, "--dtype") or "float32", option(rest, "--step") or exports.NEWEST
    if len(rest) != 2 or not all(rest) or dtype not in ("float32", "bfloat16"):
        raise ConfigError(
            "usage: kdjax export RUN OUT [--dtype float32|bfloat16] [--step newest|best|N]"
        )
    run, out = rest
    exports.export(run, out, dtype, step)
    print(f"wrote {out}: a Hugging Face folder in {dtype}")


def export_adapter(args: list[str]) -> None:
    from kdjax import export as exports

    rest = list(args)
    step = option(rest, "--step") or exports.NEWEST
    if len(rest) != 2 or not all(rest):
        raise ConfigError("usage: kdjax export-adapter RUN OUT [--step newest|best|N]")
    run, out = rest
    exports.export_adapter(run, out, step)
    print(f"wrote {out}: a peft adapter")


def init_student(args: list[str]) -> None:
    rest = list(args)
    layers, seed = option(rest, "--layers"), option(rest, "--seed")
    fresh = "--fresh" in rest
    rest = [arg for arg in rest if arg != "--fresh"]
    if len(rest) != 2 or layers is None or (seed is not None and not fresh):
        raise ConfigError(f"usage: {USAGE}")
    if seed is not None and not re.fullmatch(r"\d{1,9}", seed):
        raise ConfigError(f"--seed is a whole number, got {seed}")
    from kdjax import models
    from kdjax.models import pruned

    teacher, out = models.find(rest[0]), rest[1]
    kept = pruned.init_student(
        teacher, Path(out), _parsed(layers), int(seed or 0) if fresh else None
    )
    listed = ", ".join(map(str, kept))
    what = f"{len(kept)} fresh layers as wide as those" if fresh else f"layers {listed}"
    print(f"wrote {out}: {what} of {rest[0]}")


def _parsed(text: str) -> int | list[int]:
    """How many layers, or which: 10, or 0,3,6 (one alone: 3,)."""
    if not re.fullmatch(r"\d{1,6}(,\d{1,6})*,?", text):
        raise ConfigError(f"--layers is a number, such as 10, or a list, such as 0,3,6; got {text}")
    return [int(part) for part in text.split(",") if part] if "," in text else int(text)
