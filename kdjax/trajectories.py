"""The teacher's trajectories, drawn once and kept on disk as Arrow files, in chunks of problems.

A folder is named by everything that decides its contents (the weights' identity, the prompts, the
sampling settings), which also stand in its settings.json. A chunk is drawn when it is first asked
for, written beside its place and renamed: a killed run loses at most the chunk in flight.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kdjax.base import DataError, Samples, StorageError

CHUNK_ROWS = 256


def open_trajectories(
    cache: Path, settings: dict[str, Any], size: int, draw: Callable[[np.ndarray], Samples]
) -> Callable[[np.ndarray], Samples]:
    """read(rows) -> Samples as host arrays, drawing missing chunks with `draw(rows)`.

    `settings` names the contents. Errors: StorageError when the folder can't be written, DataError
    naming a damaged chunk.
    """
    text = json.dumps(settings, sort_keys=True, indent=2)
    folder = cache / "trajectories" / hashlib.sha256(text.encode()).hexdigest()[:16]

    @functools.cache
    def chunk(number: int) -> Samples:
        place = folder / f"chunk-{number:05d}"
        if not place.is_dir():
            rows = np.arange(number * CHUNK_ROWS, min(size, (number + 1) * CHUNK_ROWS))
            _write_chunk(place, rows, draw(rows), text)
        return _read_chunk(place)

    def read(rows: np.ndarray) -> Samples:
        numbers, offsets = np.divmod(rows, CHUNK_ROWS)
        picked = [
            jax.tree.map(lambda field, o=o: field[o], chunk(int(n)))
            for n, o in zip(numbers, offsets, strict=True)
        ]
        return jax.tree.map(lambda *column: np.stack(column), *picked)

    return read


def _write_chunk(place: Path, rows: np.ndarray, samples: Samples, settings: str) -> None:
    import datasets

    datasets.disable_progress_bars()
    columns = {name: np.asarray(value) for name, value in samples._asdict().items()}
    partial = place.with_name(f"{place.name}.{os.getpid()}.partial")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        (place.parent / "settings.json").write_text(settings + "\n")
        table = datasets.Dataset.from_dict(
            {"row": rows, **{name: list(v) for name, v in columns.items()}}
        )
        table.save_to_disk(str(partial))
        if place.is_dir():  # another process was faster, with the same contents
            shutil.rmtree(partial)
        else:
            partial.rename(place)
    except OSError as error:
        raise StorageError(
            f"can't keep teacher trajectories in {place.parent}: {error}; set --cache"
        ) from error


def _read_chunk(place: Path) -> Samples:
    import datasets

    try:
        table = datasets.load_from_disk(str(place)).with_format("numpy")
        fields = {name: table[name][:] for name in Samples._fields}
    except Exception as error:  # the library raises many kinds; all mean a damaged folder
        raise DataError(
            f"teacher trajectories in {place} are damaged ({error}); delete that folder"
        ) from error
    return Samples(**fields)
