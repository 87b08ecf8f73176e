"""`kdjax list`: the names that come along, a line each."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from kdjax.errors import ConfigError

if TYPE_CHECKING:
    from kdjax.models import DecoderConfig

Listed = Iterator[tuple[str, str]]


def run(args: list[str]) -> None:
    if len(args) > 1 or (args and args[0] not in KINDS):
        raise ConfigError(f"usage: kdjax list [{'|'.join(KINDS)}], got {' '.join(args)}")
    columns = shutil.get_terminal_size((10_000, 24)).columns  # of a pipe, all that is said
    for kind in args or KINDS:
        if not args:
            print(f"\n{kind}:" if kind != next(iter(KINDS)) else f"{kind}:")
        found = list(KINDS[kind]())
        width = max(len(name) for name, _ in found)
        for name, about in found:
            line = f"  {name:<{width}}  {about}".rstrip()
            print(line if len(line) <= columns else line[: columns - 3] + "...")


def _configs() -> Listed:
    from kdjax.config import shipped

    for name, path in shipped.names().items():
        if not name.startswith(("methods/", "embedded/")):
            study = "a study: " if shipped.holds(path, "study") else ""
            yield name, study + shipped.about(path)


def _methods() -> Listed:
    from kdjax.config import shipped

    for name, path in shipped.names().items():
        if name.startswith("methods/"):
            yield name, shipped.about(path)


def _functions(*tables: str) -> Callable[[], Listed]:
    def listed() -> Listed:
        from kdjax.config.shipped import first_sentence
        from kdjax.losses import named

        for name, function in named(*tables).items():
            yield name, first_sentence(inspect.getdoc(function) or "")

    return listed


def _models() -> Listed:
    from kdjax.models import EMBEDDED, read_config
    from kdjax.models.hf.families import FAMILIES
    from kdjax.models.known import KNOWN

    for path in sorted(EMBEDDED.iterdir()):
        yield f"kdjax:{path.name}", f"{_size(read_config(path))}; comes along"
    for name, known in KNOWN.items():
        yield name, f"{_size(known.config)}; from the hub, or a local folder"
    yield "FOLDER", f"a Hugging Face folder of {', '.join(FAMILIES)}"


def _size(config: DecoderConfig) -> str:
    import jax

    from kdjax.models import abstract_params

    leaves = jax.tree.leaves(abstract_params(config, "float32"))
    return f"{sum(leaf.size for leaf in leaves):,} parameters"


def _tasks() -> Listed:
    from kdjax.data.tasks import TASKS

    for name, make in TASKS.items():
        text = inspect.getdoc(inspect.getmodule(make)) or ""
        yield name, text.split("\n")[0].partition(": ")[2].rstrip(".")


def _datasets() -> Listed:
    from kdjax.data.sources.known import KNOWN

    for name, mapping in KNOWN.items():
        yield name, ", ".join(f"{split} {rows:,} rows" for split, rows in mapping.rows)
    yield "FILE", "JSONL, CSV, Parquet, Arrow, or a folder of them (docs/data.md)"


KINDS: Mapping[str, Callable[[], Listed]] = {
    "configs": _configs,
    "methods": _methods,
    "losses": _functions("TOKEN_LOSSES", "TOKEN_LOSS_MAKERS"),
    "objectives": _functions("OBJECTIVES", "OBJECTIVE_MAKERS"),
    "reductions": _functions("REDUCTIONS", "REDUCTION_MAKERS"),
    "models": _models,
    "tasks": _tasks,
    "datasets": _datasets,
}
"""What can be listed."""
