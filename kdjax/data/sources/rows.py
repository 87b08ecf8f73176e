"""The rows of a file, a folder or a dataset of the hub: the one user of the library `datasets`."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from kdjax.data.sources.files import (
    BATCH_ROWS,
    KINDS,
    NARROW,
    Row,
    Rows,
    chain,
    holders,
    names_of,
    read_file,
    shortest,
)
from kdjax.data.sources.guard import check_saved
from kdjax.errors import DataError, StorageError
from kdjax.runtime.files import one_line


def read_local(path: Path, split: str | None = None) -> Rows:
    """The rows of a file or a folder: a folder of `save_to_disk`, or one of files, of which those
    of the split (`split_files`).

    Errors: DataError when it is missing or unreadable.
    """
    if path.is_dir():
        saved = (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
        return _saved(path, split) if saved else chain(list(map(read_file, _files(path, split))))
    if path.is_file() and path.suffix in KINDS:
        return read_file(path)
    raise DataError(f"{path}: give an existing {_kinds()} file, or a folder of them")


UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOENT)
"""What the system says of a cache folder that can't be made or written."""


def read_hub(dataset: str, config: str | None, split: str, revision: str | None) -> Rows:
    """The rows of a split of a dataset of the hub, or of the library's cache of it.

    Errors: DataError saying what was looked for, why it can't be had, and the way without a hub;
    StorageError for a cache that can't be written.
    """
    import datasets

    datasets.disable_progress_bars()
    try:
        return _of_dataset(datasets.load_dataset(dataset, config, split=split, revision=revision))
    except Exception as error:  # the library raises many kinds: network, rights, names, formats
        if isinstance(error, OSError) and error.errno in UNWRITABLE:
            raise StorageError(
                f"{dataset}: the cache {datasets.config.HF_DATASETS_CACHE} can't be written"
                f" ({one_line(error)}); set HF_HOME to a folder that can be written"
            ) from error
        raise DataError(
            f"{dataset}: looked on the hub for split {split} at revision {revision or 'main'}:"
            f" {_reason(error)}; or download it elsewhere and give its file or folder:"
            f" {dataset}=PATH, or --data.file PATH --data.columns prompt=... answer=..."
        ) from error


def _of_dataset(rows: Any) -> Rows:
    """The rows of a `datasets.Dataset`, read in batches."""

    def each(names: Iterable[str]) -> Iterator[Row]:
        wanted = holders(names, rows.column_names)
        for name in wanted:
            if _opens_files(rows.features[name]):
                raise DataError(f"column {name} holds {rows.features[name]}; a text is needed")
        held = rows.select_columns(sorted(wanted))
        kinds = {name: str(getattr(rows.features[name], "dtype", "")) for name in wanted}
        narrow = {name: kind for name, kind in kinds.items() if kind in NARROW.values()}
        for first in range(0, len(held), BATCH_ROWS):
            batch = held[first : first + BATCH_ROWS]
            for name, kind in narrow.items():
                batch[name] = [shortest(value, kind) for value in batch[name]]
            for values in zip(*batch.values(), strict=True):
                yield dict(zip(batch, values, strict=True))

    return Rows(tuple(names_of(rows.features)), each)


def _opens_files(kind: Any) -> bool:
    """Whether a column is of images or the like, which the library would open from any path or
    address that a row names."""
    inner = kind.values() if isinstance(kind, dict) else kind if isinstance(kind, list) else ()
    beneath = [*inner, *([kind.feature] if hasattr(kind, "feature") else [])]
    own = hasattr(kind, "decode") and type(kind).__name__ != "Json"
    return own or any(map(_opens_files, beneath))


def _saved(path: Path, split: str | None) -> Rows:
    import datasets

    check_saved(path)
    try:
        found = datasets.load_from_disk(str(path))
        if isinstance(found, datasets.DatasetDict):
            if split not in found:
                raise DataError(f"{path}: no split {split}; it has {', '.join(found)}")
            found = found[split]
        found.data.validate(full=True)  # offsets that point elsewhere would be followed
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{path}: can't read it ({one_line(error)})") from error
    return _of_dataset(found)


def split_for(path: Path, use: str) -> str | None:
    """The split of a path for a use ("train" or "test"): that of the use where it is a folder of
    several, by its own table or by the names of its files; else none, as all of it is read.

    Errors: DataError where some names say one split and others none: what those are is not known.
    """
    if (path / "dataset_dict.json").is_file():
        return use
    said = {_said(way): file for file, way in _listed(path).items()} if path.is_dir() else {}
    splits = [split for split in said if split is not None]
    if None in said and len(splits) == 1:
        raise DataError(
            f"{path}: {said[splits[0]].name} says the split {splits[0]}, and {said[None].name}"
            " none; give one file, or names that say the split of each"
        )
    return use if len(splits) > 1 else None


def _files(folder: Path, split: str | None) -> list[Path]:
    """The files in a folder, all of one kind; where names say splits, those of this one."""
    found = _listed(folder)
    has = sorted({said for said in map(_said, found.values()) if said})
    if split is not None and has:
        found = {path: parts for path, parts in found.items() if _is_of(split, parts)}
    if not found:
        of = f" of split {split}; it has {', '.join(has)}" if has else "; give one that does"
        raise DataError(f"{folder}: the folder holds no {_kinds()} file{of}")
    kinds = sorted({path.suffix for path in found})
    if len(kinds) > 1:
        raise DataError(f"{folder}: holds {' and '.join(kinds)} files; give one file of them")
    return list(found)


def _listed(folder: Path) -> dict[Path, tuple[str, ...]]:
    """The data files in a folder with the names on the way to each; what begins with a dot is an
    editor's or a system's, and no data."""
    ways = {path: path.relative_to(folder).parts for path in sorted(folder.rglob("*"))}
    return {
        path: way
        for path, way in ways.items()
        if path.suffix in KINDS and not any(n.startswith(".") for n in way) and path.is_file()
    }


SPLIT = re.compile(
    r"(?<![a-z])(?:(?P<train>train)(?:ing|set)?|(?P<test>test|eval)(?:ing|set|uation)?"
    r"|(?P<validation>validation|valid|val|dev)(?:set)?)(?![a-z])"
)


def _said(way: tuple[str, ...]) -> str | None:
    """The split that a file's name says, or else a folder's.

    >>> _said(("test", "gsm8kTrain.jsonl")), _said(("dev", "0.csv")), _said(("latest.csv",))
    ('train', 'validation', None)
    """
    words = (re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower() for name in reversed(way))
    found = next(filter(None, map(SPLIT.search, words)), None)
    return found.lastgroup if found else None


def _is_of(split: str, way: tuple[str, ...]) -> bool:
    """Whether a file is of a split, which may have any name."""
    known = _said((split,))
    if known is not None:
        return _said(way) == known
    word = rf"(?<![a-z]){re.escape(split.lower())}(?![a-z])"
    return any(re.search(word, name.lower()) for name in way)


def _kinds() -> str:
    *most, last = KINDS
    return f"{', '.join(most)} or {last}"


def _reason(error: Exception) -> str:
    if isinstance(error, ConnectionError):
        return "the hub is offline (HF_HUB_OFFLINE) or can't be reached; run it where it can"
    said = one_line(error)
    if "gated" in said.lower():
        return "it is gated; accept its terms on its page and run hf auth login"
    return f"{type(error).__name__} ({said})"
