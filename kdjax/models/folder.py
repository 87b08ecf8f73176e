"""A model folder, checked before anything in it is believed: safetensors in plain files inside it.

Whoever made the folder may have meant harm: no name leads out of it, nothing in it is run, and a
JSON file too large to be one is not read.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kdjax.base import DataError, StorageError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_JSON_BYTES = 64 << 20
MAX_LISTED = 20

StoredTensor = Any
"""A tensor in a file, by the safetensors library: get_shape(), get_dtype(), [slices] -> NumPy."""


def member(folder: Path, name: str) -> Path | None:
    """The file of this name in the folder; None if there is none.

    Errors: DataError where it is no regular file or links out of the folder (a snapshot in a hub's
    cache may link to anything of its own repository).
    """
    path = folder / name
    if not os.path.lexists(path):
        return None
    home, real = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    if home.parent.name == "snapshots":  # <repository>/snapshots/<commit>, links to ../../blobs
        home = home.parent.parent
    if not real.is_relative_to(home):
        raise DataError(f"{path}: links out of the model folder; put the file itself there")
    if not real.is_file():
        raise DataError(f"{path}: not a regular file (or a broken link); fetch the file again")
    return path


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object of the folder; {} if the file is absent.

    Errors: DataError naming the file that is too large, not JSON, or says a key twice.
    """
    path = member(folder, name)
    if path is None:
        return {}
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise DataError(f"{path}: {size} bytes are too many for a JSON file; fetch it again")
        found = json.loads(path.read_bytes(), object_pairs_hook=_without_twins)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a readable JSON file ({one_line(error)})") from None
    if not isinstance(found, dict):
        raise DataError(f"{path}: a JSON object was expected")
    return found


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights: model.safetensors, else the shards that the index names.

    Errors: DataError where there are none, or the index names what is not a file of the folder.
    """
    return _files(folder, read_index(folder))


def read_index(folder: Path) -> dict[str, str] | None:
    """Tensor -> the shard that holds it; None for a folder with one file, which comes first (as in
    transformers)."""
    if member(folder, WEIGHTS_FILE) is not None or member(folder, INDEX_FILE) is None:
        return None
    index = read_json(folder, INDEX_FILE).get("weight_map")
    where = folder / INDEX_FILE
    if not isinstance(index, dict) or not index:
        raise DataError(f"{where}: no weight_map; fetch the file again")
    for name in index.values():
        plain = isinstance(name, str) and name == os.path.basename(name) and name.isprintable()
        if not plain or "\\" in name or not name.endswith(".safetensors"):
            raise DataError(
                f"{where}: shard {shown(name)} is not the plain name of a safetensors file of this"
                " folder; fetch the folder again from a source that you trust"
            )
    return index


def open_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder by its name; nothing of it is read until it is sliced.

    Errors: DataError where a file is damaged, a tensor stands twice, or index and shards disagree.
    """
    index = read_index(folder)
    found: dict[str, StoredTensor] = {}
    homes: dict[str, str] = {}
    for path in _files(folder, index):
        for name, tensor in _opened(path).items():
            if name in homes:
                raise DataError(
                    f"{path}: tensor {shown(name)} is also in {homes[name]}; keep one of them"
                )
            found[name], homes[name] = tensor, path.name
    if index is not None and index != homes:
        names = sorted(n for n in {*index, *homes} if index.get(n) != homes.get(n))
        said = [
            f"{shown(n)} is in {homes.get(n, 'no shard')}, the index says {index.get(n, 'nothing')}"
            for n in names
        ]
        raise DataError(f"{folder / INDEX_FILE}: index and shards disagree: {listed(said)}")
    return found


def listed(problems: list[str]) -> str:
    """The first 20, and how many more there are."""
    more = len(problems) - MAX_LISTED
    return "; ".join(problems[:MAX_LISTED]) + (f"; and {more} more" if more > 0 else "")


def shown(name: object) -> str:
    """A name out of a file, fit for one line of an error."""
    return str(name)[:100].encode("unicode_escape").decode()


def one_line(error: BaseException) -> str:
    """What a library said, on one line of at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice")
    return found


def _files(folder: Path, index: dict[str, str] | None) -> list[Path]:
    if index is not None:
        names = sorted(set(index.values()))
        found = [member(folder, name) for name in names]
        absent = [name for name, path in zip(names, found, strict=True) if path is None]
        if absent:
            raise DataError(
                f"{folder}: {len(absent)} of {len(names)} shards of the index are missing:"
                f" {listed(absent)}; fetch them"
            )
        return [path for path in found if path is not None]
    path = member(folder, WEIGHTS_FILE)
    if path is None:
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
        raise DataError(
            f"{folder}: no {WEIGHTS_FILE} and no {INDEX_FILE}"
            + (
                f"; {shown(pickles[0])} is a pickle, which could run code when it is read:"
                " convert it to safetensors"
                if pickles
                else "; kdjax reads weights in safetensors only"
            )
        )
    return [path]


def _opened(path: Path) -> dict[str, StoredTensor]:
    from safetensors import safe_open

    try:
        with safe_open(path, framework="np") as file:
            return {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # the library raises its own kinds for every damage
        raise DataError(
            f"{path}: damaged or not safetensors ({_instead(path) or one_line(error)});"
            " fetch the file again"
        ) from error


def _instead(path: Path) -> str:
    """What often lies in a weight file's place after a download that went wrong."""
    with open(path, "rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer: git lfs pull"
    return "it is a web page" if start.lstrip().lower().startswith((b"<html", b"<!doctype")) else ""


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Where to write what becomes `folder`: beside its final place, and renamed at the end, so that
    a folder is whole or absent. Errors: StorageError, also where it exists and is not empty."""
    if folder.exists() and not (folder.is_dir() and next(folder.iterdir(), None) is None):
        raise StorageError(
            f"{folder} exists and is not empty; choose another folder, nothing was overwritten"
        )
    partial = folder.with_name(folder.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except OSError as error:
        raise StorageError(f"can't write the model folder {folder}: {error}") from error
