"""Model folders, checked before anything in them is trusted: safetensors in files of the folder.

A folder may be malicious: no name leads out of it, nothing in it is run, and a JSON file that is
too large is not read.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from kdjax.errors import DataError
from kdjax.runtime.files import (
    json_object,
    member,
    one_line,
)

COPIED_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
"""What a model folder holds beside config.json and weights."""

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_LISTED = 20

StoredTensor = Any
"""A tensor in a file, by the safetensors library: get_shape(), get_dtype(), [slices] -> NumPy."""


def has_weights(folder: Path) -> bool:
    """Whether a folder has weights, or says that it does; they may be damaged."""
    return any(member(folder, name) is not None for name in (WEIGHTS_FILE, INDEX_FILE))


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
    index = json_object(folder, INDEX_FILE).get("weight_map")
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
    """Every tensor of the folder by its name; its numbers are read when it is sliced.

    Errors: DataError for a damaged file, a tensor in two files, or an index that disagrees.
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
    """The first 20 problems, and how many more there are."""
    more = len(problems) - MAX_LISTED
    return "; ".join(problems[:MAX_LISTED]) + (f"; and {more} more" if more > 0 else "")


def shown(name: object) -> str:
    """A name from a file, escaped and cut for one line of an error."""
    return str(name)[:100].encode("unicode_escape").decode()


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
            f"{path}: damaged or not safetensors ({_likely_content(path) or one_line(error)});"
            " fetch the file again"
        ) from error


def _likely_content(path: Path) -> str:
    """What a weight file really is where a download went wrong, if it is known."""
    with open(path, "rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer: git lfs pull"
    return "it is a web page" if start.lstrip().lower().startswith((b"<html", b"<!doctype")) else ""
