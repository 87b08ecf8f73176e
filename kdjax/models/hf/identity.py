"""The identity of a model folder: a hash of everything that decides what it computes."""

from __future__ import annotations

import functools
import hashlib
import time
from pathlib import Path

from kdjax.models.hf.folder import INDEX_FILE, has_weights, weight_files
from kdjax.runtime.files import member

IDENTITY_FILES = (
    "tokenizer_config.json",
    "config.json",
    "tokenizer.json",
    "chat_template.jinja",
    "generation_config.json",
)
LATER_FILES = (INDEX_FILE, "special_tokens_map.json", "added_tokens.json")
"""Hashed after the weights, where they exist: a folder without them keeps its earlier hash."""

SETTLED_SECONDS = 2.0
"""Newer files are always hashed anew: one may be written again within a tick of its clock."""


def identity(folder: Path) -> str:
    """sha256 (first 16 hex digits) of everything that decides what a model folder computes.

    Computed once a process for files of the same paths, sizes and modification times.
    """
    first = [member(folder, name) for name in IDENTITY_FILES]
    later = [member(folder, name) for name in LATER_FILES]
    weights = weight_files(folder) if has_weights(folder) else []  # an engine may have them
    paths = [path for path in (*first, *weights, *later) if path is not None]
    stats = [(path, path.stat()) for path in paths]
    files = tuple((str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats)
    newest = max(stat.st_mtime_ns for _, stat in stats)
    settled = time.time_ns() - newest > SETTLED_SECONDS * 1e9
    return (_digest if settled else _digest.__wrapped__)(files)


@functools.lru_cache(maxsize=64)
def _digest(files: tuple[tuple[str, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for path, size, _ in files:
        digest.update(f"{Path(path).name}:{size}:".encode())
        with open(path, "rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()[:16]
