"""Datasets by name or path: `openai/gsm8k`, `openai/gsm8k:train[:256]`, `org/set=file.parquet`,
`problems.jsonl`."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from kdjax.base import Problem
from kdjax.data.sources import rows as reading
from kdjax.data.sources.files import KINDS, Rows
from kdjax.data.sources.known import KNOWN
from kdjax.data.sources.mapping import Mapping, mapping_of, needed
from kdjax.data.sources.survey import Counts, in_words, survey
from kdjax.errors import ConfigError, DataError

NAME = re.compile(
    r"(?P<dataset>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[\w./-]+))?(?::(?P<split>\w+))?"
    r"(?:\[(?P<first>\d*):(?P<last>\d*)\])?(?:=(?P<path>.+))?"
)
GRAMMAR = "ORG/DATASET[@REVISION][:SPLIT][[FIRST:LAST]][=PATH]"
"""The form of a name; FIRST and LAST count the problems that are used."""

Cut = tuple[int | None, int | None]


class Loaded(NamedTuple):
    """The problems of a dataset, held in memory as text: problem(index), index < size.

    identity is equal for equal problems in equal order; about is a text on what was left out, note
    on what a user should know.
    """

    size: int
    problem: Callable[[int], Problem]
    counts: Counts
    identity: str
    about: str
    note: str = ""


def load(text: str, columns: Sequence[str], use: str) -> Loaded:
    """A dataset by its name, or a file or folder by its path. Where a name gives no split, that of
    this use ("train" or "test"), or of the other use if there is none.

    Errors: as `load_name`.
    """
    if is_path(text):
        return load_path(text, columns, use)
    name = NAME.fullmatch(text)
    known = KNOWN.get(name["dataset"]) if name else None
    if known is not None and getattr(known, use) is None:
        use = {"train": "test", "test": "train"}[use]
    return load_name(text, columns, use)


def is_path(text: str) -> bool:
    """Whether a text means a file or folder rather than a dataset's name.

    >>> is_path("a/b.jsonl"), is_path("openai/gsm8k"), is_path("openai/gsm8k=a/b.jsonl")
    (True, False, False)
    """
    if "=" in text and NAME.fullmatch(text):
        return False
    known_kind = Path(text).suffix in KINDS
    return known_kind or Path(text).exists() or not NAME.fullmatch(text)


def load_path(path: str | Path, columns: Sequence[str] = (), use: str = "train") -> Loaded:
    """The problems of a file or folder with named columns (see `mapping_of`); of a folder of
    several splits, that of this use ("train" or "test")."""
    mapping, path = mapping_of(columns), Path(path)
    split = reading.split_for(path, use)
    title = f"{path.name}:{split}" if split else path.name
    return _load(mapping, title, path, _stamp(path), split, (None, None), None)


def load_name(text: str, columns: Sequence[str], use: str) -> Loaded:
    """The problems of a dataset by its name (GRAMMAR).

    use: "train" or "test", the split of a name that gives none. columns: "field=column", of a
    dataset that kdjax does not know. Errors: ConfigError for a name of another form, DataError for
    a dataset that can't be reached or used.
    """
    name = NAME.fullmatch(text)
    if name is None:
        near = next((one for one in KNOWN if text.lower() in one.lower()), None)
        hint = f"; did you mean {near}?" if near else ""
        raise ConfigError(f"{text!r} is no dataset's name; it is written {GRAMMAR}{hint}")
    if name["revision"] and name["path"]:
        raise ConfigError(
            f"{text}: a revision is of the hub, and {name['path']} is read as it is; leave out"
            f" @{name['revision']}"
        )
    dataset = name["dataset"]
    mapping = _mapping(dataset, columns)
    split = name["split"] or getattr(mapping, use)
    if split is None:
        other = {"train": mapping.test, "test": mapping.train}[use]
        fit = ", ".join(one for one, m in KNOWN.items() if getattr(m, use))
        raise ConfigError(
            f"{text} has no {use} split; name the split to use it all the same"
            f" ({dataset}:{other}), or take one of {fit}"
        )
    first, last = (int(name[side]) if name[side] else None for side in ("first", "last"))
    path = Path(name["path"]) if name["path"] else None
    revision = name["revision"] or mapping.revision
    stamp = path and _stamp(path)
    return _load(mapping, f"{dataset}:{split}", path, stamp, split, (first, last), revision)


def read_problems(mapping: Mapping, title: str, rows: Rows, cut: Cut = (None, None)) -> Loaded:
    """The problems of these rows, counted; of those that are used, [first:last].

    Errors: DataError for a missing column, for a row that contradicts itself (it is named), and
    where no problem is left.
    """
    if not rows.columns:
        raise DataError(f"{title}: the dataset is empty; it needs at least one row")
    names = needed(mapping, rows.columns, title)
    found = survey(mapping, title, rows.each(names))
    if not found.counts.rows:
        raise DataError(f"{title}: the dataset is empty; it needs at least one row")
    if not found.kept:
        raise DataError(f"{title}: no row can be used: {in_words(found.counts)}")
    places = slice(*cut)
    kept = found.kept[places]
    asked = f"[{'' if cut[0] is None else cut[0]}:{'' if cut[1] is None else cut[1]}]"
    if not kept:
        raise DataError(f"{title}{asked}: that is none of its {found.counts.used} problems")
    return Loaded(
        size=len(kept),
        problem=kept.__getitem__,
        counts=found.counts,
        identity="rows:" + hashlib.sha256(b"".join(found.digests[places])).hexdigest()[:16],
        about=f"{title}: {in_words(found.counts)}" + ("" if places == slice(None) else asked),
        note=mapping.note,
    )


@functools.lru_cache(maxsize=16)  # a run asks for its problems many times
def _load(
    mapping: Mapping,
    title: str,
    path: Path | None,
    stamp: tuple | None,
    split: str | None,
    cut: Cut,
    revision: str | None,
) -> Loaded:
    """The problems of a dataset, read once a process.

    Args:
        mapping: its columns.
        title: what problems and errors are named after; of a hub's dataset, "org/name:split".
        path: the file or folder; None reads the hub.
        stamp: changes when the files do (`_stamp`).
        split, revision: of the hub's dataset; a path may have no split.
        cut: (first, last) of the problems that are used.
    """
    if path is None:
        dataset = title.partition(":")[0]
        rows = reading.read_hub(dataset, mapping.config, split or "train", revision)
    else:
        rows = reading.read_local(path, split)
    try:
        loaded = read_problems(mapping, title, rows, cut)
    except DataError as error:
        if path is None:
            raise
        said = str(error).removeprefix(f"{title}: ")
        raise DataError(said if said.startswith(str(path)) else f"{path}: {said}") from error
    if path is None:
        loaded = loaded._replace(about=f"{loaded.about}, revision {revision or 'main'}")
    expected = dict(mapping.rows).get(split or "")
    if expected in (None, loaded.counts.rows):
        return loaded
    surprise = f"{loaded.counts.rows} rows, where {expected} were expected"
    return loaded._replace(note="; ".join(part for part in (surprise, loaded.note) if part))


def _mapping(dataset: str, columns: Sequence[str]) -> Mapping:
    if dataset not in KNOWN and not columns:
        raise ConfigError(
            f"{dataset} is no dataset that kdjax knows ({', '.join(KNOWN)}); say its columns"
            " (prompt=... answer=...)"
        )
    if dataset in KNOWN and columns:
        raise ConfigError(
            f"kdjax knows the columns of {dataset}, and columns {tuple(columns)} are set; leave"
            " them out, or give its file as a path"
        )
    return KNOWN[dataset] if dataset in KNOWN else mapping_of(columns)


def _stamp(path: Path) -> tuple:
    """A value that changes when the files do: also where times are set back, which ctime tells."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    states = ((str(f), f.stat()) for f in files if f.exists())
    return tuple((f, s.st_ino, s.st_ctime_ns, s.st_mtime_ns, s.st_size) for f, s in states)
