"""The rows of a file, a folder or a dataset of the hub: the one user of the library `datasets`."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kdjax.data.sources.guard import check_file, check_saved
from kdjax.errors import DataError
from kdjax.runtime.files import one_line

READERS = {
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
BATCH_ROWS = 1000
KINDS = ".jsonl, .json, .csv, .parquet or .arrow"


def read_local(path: Path, split: str | None = None):
    """The rows of a file or a folder: a folder of `save_to_disk`, or one of files, of which only
    those of the split are read where their names contain splits.

    Errors: DataError when it is missing, unreadable or empty.
    """
    import datasets

    datasets.disable_progress_bars()
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return _not_empty(path, _saved(path, split))
        files = _files(path, split)
    elif path.is_file() and path.suffix in READERS:
        files = [path]
    else:
        raise DataError(f"{path}: give an existing {KINDS} file, or a folder of them")
    if all(file.stat().st_size == 0 for file in files):
        raise DataError(f"{path}: the dataset is empty; it needs at least one row")
    reader = READERS[files[0].suffix]
    for file in files:
        check_file(file)
    names = [glob.escape(str(file)) for file in files]  # the library reads them as patterns
    try:
        rows = datasets.load_dataset(reader, data_files=names, split="train")
    except Exception as error:  # the library raises many kinds; all mean an unreadable file
        reason = one_line(error.__cause__ or error)
        raise DataError(f"{path}: can't read it as {reader} ({reason})") from error
    return _not_empty(path, rows)


def read_hub(dataset: str, config: str | None, split: str, revision: str | None):
    """The rows of a split of a dataset of the hub, or of the library's cache of it.

    Errors: DataError saying what was looked for, why it can't be had, and the way without a hub.
    """
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(dataset, config, split=split, revision=revision)
    except Exception as error:  # the library raises many kinds: network, rights, names, formats
        raise DataError(
            f"{dataset}: looked on the hub for split {split} at revision {revision or 'main'}:"
            f" {_reason(error)}; or download it elsewhere and give its file or folder:"
            f" {dataset}=PATH, or --data.file PATH --data.columns prompt=... answer=..."
        ) from error


def column_names(rows) -> list[str]:
    """The names of columns, and of the fields of structs, dotted."""

    def names(features: Mapping[str, Any], prefix: str) -> Iterator[str]:
        for name, kind in features.items():
            yield prefix + name
            if isinstance(kind, dict):
                yield from names(kind, f"{prefix}{name}.")

    return list(names(rows.features, ""))


def columns_only(rows, names: Sequence[str]):
    """The rows with these columns alone; of a dotted name, the struct that holds it.

    Errors: DataError for a column of images or the like, which the library would open from any path
    or address that a row names.
    """
    whole = rows.column_names
    wanted = sorted({name if name in whole else name.split(".")[0] for name in names})
    for name in wanted:
        if _opens_files(rows.features[name]):
            raise DataError(f"column {name} holds {rows.features[name]}; a text is needed")
    return rows.select_columns(wanted)


def _opens_files(kind: Any) -> bool:
    inner = kind.values() if isinstance(kind, dict) else kind if isinstance(kind, list) else ()
    beneath = [*inner, *([kind.feature] if hasattr(kind, "feature") else [])]
    own = hasattr(kind, "decode") and type(kind).__name__ != "Json"
    return own or any(map(_opens_files, beneath))


def every_row(rows) -> Iterator[dict[str, Any]]:
    """Rows in their order, read in batches."""
    for first in range(0, len(rows), BATCH_ROWS):
        batch = rows[first : first + BATCH_ROWS]
        names = list(batch)
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(names, values, strict=True))


def _saved(path: Path, split: str | None):
    import datasets

    check_saved(path)
    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:
        raise DataError(f"{path}: can't read it ({one_line(error)})") from error
    if not isinstance(found, datasets.DatasetDict):
        return found
    if split not in found:
        raise DataError(f"{path}: no split {split}; it has {', '.join(found)}")
    return found[split]


def _files(path: Path, split: str | None) -> list[Path]:
    """The files of a split in a folder, all of one kind."""
    found = sorted(p for p in path.rglob("*") if p.suffix in READERS and p.is_file())
    named = {p: re.findall(r"train|validation|test", p.name) for p in found}
    if split is not None and any(named.values()):
        found = [p for p in found if re.match(rf"{re.escape(split)}(?![a-z])", p.name)]
    if not found:
        of = f" of split {split}" if split else ""
        raise DataError(f"{path}: the folder holds no {KINDS} file{of}; give one that does")
    kinds = sorted({p.suffix for p in found})
    if len(kinds) > 1:
        raise DataError(f"{path}: holds {' and '.join(kinds)} files; give one file of them")
    return found


def _not_empty(path: Path, rows):
    if len(rows) == 0:
        raise DataError(f"{path}: the dataset is empty; it needs at least one row")
    try:
        rows.data.validate(full=True)  # offsets that point elsewhere would be followed
    except Exception as error:
        raise DataError(f"{path}: its values are damaged ({one_line(error)})") from error
    return rows


def _reason(error: Exception) -> str:
    if isinstance(error, ConnectionError):
        return "the hub is offline (HF_HUB_OFFLINE) or can't be reached; run it where it can"
    said = one_line(error)
    if "gated" in said.lower():
        return "it is gated; accept its terms on its page and run hf auth login"
    return f"{type(error).__name__} ({said})"
