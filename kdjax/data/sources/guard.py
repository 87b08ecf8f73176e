"""Data files and rows, checked before more is made of them: no archive, no bottomless nesting."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from kdjax.errors import DataError
from kdjax.runtime.files import json_object, member

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


def check_no_archive(path: Path) -> None:
    """Errors: DataError for an archive, whatever its name."""
    with open(path, "rb") as file:
        start = file.read(512)
    found = [kind for kind, magic in ARCHIVES.items() if start.startswith(magic)]
    found += ["tar"] * (start[257:262] == b"ustar")
    if found:
        raise DataError(f"{path}: it is a {found[0]} archive; unpack it, and give what is in it")


def check_depth(row: dict[str, Any], where: str) -> None:
    """Errors: DataError for more than DEEPEST levels of lists and objects, the row's own among
    them."""
    depth = 0
    level: list[Any] = [row]
    while level := [
        inner
        for value in level
        for inner in (value.values() if isinstance(value, dict) else value)
        if isinstance(inner, list | dict)
    ]:
        depth += 1
        if depth >= DEEPEST:
            raise DataError(f"{where}: more than {DEEPEST} levels of lists and objects")


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
