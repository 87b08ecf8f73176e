"""The arguments that commands take out of their line before fields are overridden."""

from __future__ import annotations

import os
from pathlib import Path

from kdjax.errors import ConfigError, StorageError


def first(args: list[str], usage: str) -> tuple[str, list[str]]:
    if not args or not args[0] or args[0].startswith("-"):
        raise ConfigError(f"usage: {usage} [--field VALUE ...] (kdjax --help)")
    return args[0], list(args[1:])


def option(rest: list[str], name: str) -> str | None:
    """Take `name VALUE` out of the arguments."""
    rest[:] = [
        part for arg in rest for part in (arg.split("=", 1) if arg.startswith(name) else [arg])
    ]
    if name not in rest:
        return None
    at = rest.index(name)
    if not "".join(rest[at + 1 : at + 2]):
        raise ConfigError(f"{name} needs a value")
    value = rest[at + 1]
    del rest[at : at + 2]
    return value


def new_file(out: str | None) -> Path | None:
    """Where --out writes, at the end of what may take hours. Errors: StorageError where something
    is there already, or nothing can be made."""
    if out is None:
        return None
    if Path(out).exists():
        raise StorageError(f"{out} exists; choose another --out, nothing was overwritten")
    place = next(parent for parent in Path(out).absolute().parents if os.path.lexists(parent))
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise StorageError(f"can't write {out}: {place} is no folder that takes files")
    return Path(out)
