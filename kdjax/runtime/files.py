"""Files and JSON: read without believing them, written whole or not at all, named by digests."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kdjax.errors import DataError, StorageError
from kdjax.runtime import processes


def digest(value: Any) -> str:
    """The first 16 hex digits of the sha256 of a value's JSON with sorted keys.

    >>> digest({"seed": 0, "terms": (2, 3)}) == digest({"terms": [2, 3], "seed": 0})
    True
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """'field: old -> new' for each value that differs, nested fields by dotted names.

    >>> differences({"a": {"b": 1}}, {"a": {"b": 2}})
    ['a.b: 1 -> 2']
    """
    found = []
    for name in sorted({*old, *new}):
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{prefix}{name}.")
        elif before != after:
            found.append(f"{prefix}{name}: {before} -> {after}")
    return found


def read_json(path: Path) -> Any:
    """A JSON file of a run. Errors: DataError when it is missing or damaged."""
    if not path.exists():
        raise DataError(f"{path.parent} holds no {path.name}; is it a run folder?")
    try:
        return strict_json(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error})") from error


def read_text(path: Path) -> str:
    """Errors: DataError for what is no regular file (a pipe has no end), or no UTF-8."""
    try:
        _require_file(path)
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error})") from error


MAX_JSON_BYTES = 64 << 20


def strict_json(path: Path) -> Any:
    """The JSON value of a file. Errors: OSError, and ValueError for what is no regular file, too
    large, no UTF-8, nested too deep, or says a key twice."""
    _require_file(path)
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ValueError(f"{size} bytes are too many for a JSON file")
    text = path.read_bytes().decode("utf-8-sig")
    try:
        return json.loads(text, object_pairs_hook=without_twins)
    except RecursionError as error:
        raise ValueError(str(error)) from error


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise ValueError("no regular file")


def without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs of a JSON text. Errors: ValueError where a key stands twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice")
    return found


def as_json(value: Any, **how: Any) -> str:
    """A value as JSON that every reader takes: null for a number that is not finite.

    >>> as_json({"error": float("nan"), "of": (1, 2)})
    '{"error": null, "of": [1, 2]}'
    """
    return json.dumps(_finite(value), allow_nan=False, **how)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file (`as_json`) whole or not at all. Errors: StorageError."""
    write_text(path, as_json(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, by the first process of a run. Errors: StorageError."""
    if not processes.is_first():
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        data = text.encode(errors="backslashreplace")  # JSON's own escape of a lone surrogate
        with whole_file(path) as partial, partial.open("xb") as file:
            file.write(data)
    except OSError as error:
        raise StorageError(f"can't write {path}: {error}") from error


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Where to write what becomes a file: beside its place, and renamed at the end, so that a file
    is whole or as it was. Errors: OSError."""
    partial = beside(path)
    try:
        yield partial
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Where to write what becomes a folder, which is whole or absent. Errors: OSError, at the end
    also where there is one that is not empty."""
    partial = beside(folder)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def beside(place: Path) -> Path:
    """A name of its own for what is not yet, or no more, what stands in its place."""
    return place.with_name(f"{place.name}.{uuid.uuid4().hex[:8]}.partial")


def is_partial(name: str, of: Sequence[str]) -> bool:
    """Whether `beside` gives this name for one of these.

    >>> is_partial("a.txt.0123abcd.partial", ["a.txt"]), is_partial("a.txt.partial", ["a.txt"])
    (True, False)
    """
    found = re.fullmatch(r"(.+)\.[0-9a-f]{8}\.partial", name)
    return found is not None and found[1] in of


def remove_partials(folder: Path) -> None:
    """Delete what processes that were killed left of a folder: what they did not finish."""
    for place in folder.parent.glob("*.partial"):
        if is_partial(place.name, [folder.name]):
            shutil.rmtree(place, ignore_errors=True)


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


def json_object(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object of the folder; {} if the file is absent.

    Errors: DataError naming the file that is too large, not JSON, or says a key twice.
    """
    path = member(folder, name)
    if path is None:
        return {}
    try:
        found = strict_json(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable JSON file ({one_line(error)})") from None
    if not isinstance(found, dict):
        raise DataError(f"{path}: a JSON object was expected")
    return found


def one_line(error: BaseException) -> str:
    """What a library said, on one line of at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Where to write what becomes a model folder, whole or not at all. Errors: StorageError, also
    where it exists and is not empty."""
    if folder.exists() and not (folder.is_dir() and next(folder.iterdir(), None) is None):
        raise StorageError(
            f"{folder} exists and is not empty; choose another folder, nothing was overwritten"
        )
    remove_partials(folder)
    try:
        with whole_folder(folder) as partial:
            yield partial
    except OSError as error:
        raise StorageError(f"can't write the model folder {folder}: {error}") from error
