"""Data files, checked before a library reads them: no archive, and JSON that its parser survives.

The library `datasets` unpacks whatever looks like an archive, of any size, and its JSON parser ends
the process at deep nesting.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from kdjax.errors import DataError
from kdjax.runtime.files import json_object, member, one_line

ARCHIVES = {
    "gzip": b"\x1f\x8b",
    "zip": b"PK\x03\x04",
    "bzip2": b"BZh",
    "xz": b"\xfd7zXZ",
    "zstd": b"\x28\xb5\x2f\xfd",
    "7z": b"7z\xbc\xaf\x27\x1c",
    "rar": b"Rar!",
    "lz4": b"\x04\x22\x4d\x18",
}
"""The first bytes of archives; a tar has its mark at byte 257."""

DEEPEST = 64
"""The deepest nesting of lists and objects in a row."""


def check_file(path: Path) -> None:
    """Errors: DataError unless a file is safe to read by its library."""
    with open(path, "rb") as file:
        start = file.read(512)
    found = [kind for kind, magic in ARCHIVES.items() if start.startswith(magic)]
    found += ["tar"] * (start[257:262] == b"ustar")
    if found:
        raise DataError(f"{path}: it is a {found[0]} archive; unpack it, and give what is in it")
    if path.suffix in (".json", ".jsonl"):
        _check_json(path)


def check_saved(folder: Path) -> None:
    """Errors: DataError unless all files of a dataset of `save_to_disk` are in its folder."""
    splits = json_object(folder, "dataset_dict.json").get("splits", [])
    for place in [folder / _plain(folder, name) for name in _listed(folder, splits)] or [folder]:
        files = _listed(place, json_object(place, "state.json").get("_data_files"))
        for entry in files:
            name = _plain(place, entry.get("filename") if isinstance(entry, dict) else entry)
            if member(place, name) is None:
                raise DataError(f"{place}: {name} of its state.json is missing; fetch it again")
        member(place, "dataset_info.json")


def _listed(folder: Path, names: Any) -> list[Any]:
    if not isinstance(names, list):
        raise DataError(f"{folder}: not written by save_to_disk ({names!r} is no list of files)")
    return names


def _plain(folder: Path, name: Any) -> str:
    if not isinstance(name, str) or name != os.path.basename(name) or name in ("", ".", ".."):
        raise DataError(f"{folder}: {name!r} is not the plain name of a file in it")
    return name


def _check_json(path: Path) -> None:
    """Objects, one a line; or all in one list."""
    with open(path, "rb") as file:
        whole = file.read(512).lstrip().startswith(b"[")
        file.seek(0)
        for number, text in enumerate([file.read()] if whole else file, 1):
            where = f"{path}" if whole else f"{path}, line {number}"
            if not text.strip():
                continue
            try:
                value = json.loads(text.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: not JSON ({one_line(error)}); fix it") from None
            rows = value if whole else [value]
            if not all(isinstance(row, dict) for row in rows):
                raise DataError(f"{where}: a row must be a JSON object; fix it")
            if text.count(b"[") + text.count(b"{") > DEEPEST and _depth(rows) > DEEPEST:
                raise DataError(f"{where}: more than {DEEPEST} levels of lists and objects")


def _depth(rows: list[Any]) -> int:
    """The nesting of lists and objects below a list."""
    depth, level = 0, rows
    while level := [
        inner
        for value in level
        if isinstance(value, list | dict)
        for inner in (value.values() if isinstance(value, dict) else value)
    ]:
        depth += 1
    return depth
