"""Trajectories on disk: responses drawn once, with what was kept of a teacher, as Arrow files.

    FOLDER/settings.json    everything that decides the contents
    FOLDER/chunk-00000/     `chunk_rows` problems: Arrow files, and sha256.json of them
    FOLDER/rows-a1b2.../    a piece: problems in the order of a run that needed them, likewise

`fill` draws every chunk; a run that draws for itself draws pieces, of what it needs alone. Each is
written beside its place and renamed: a killed process loses at most the one in flight.
A row is as long as its response. bfloat16, which Arrow does not know, is kept as uint16, bit for
bit.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kdjax.base import Samples, TopK, Trajectories
from kdjax.data.sources.guard import check_saved
from kdjax.errors import ConfigError, DataError, StorageError
from kdjax.runtime.console import announce
from kdjax.runtime.files import (
    beside,
    differences,
    digest,
    json_object,
    member,
    one_line,
    remove_partials,
    whole_file,
    whole_folder,
)
from kdjax.storage.arrow import check_table, padded, row_of, table_of

CHUNK_ROWS = 256
"""Problems that are drawn at once: many enough to decode in full batches, few enough to wait for.
"""
SETTINGS, SUMS = "settings.json", "sha256.json"
MANY = 2**31 - 1
LIMITS = {"rows": MANY, "chunk_rows": MANY, "max_new_tokens": 2**20}
"""The settings that every folder has, each at least 1 and at most so much."""
KINDS = {
    "prefix": str, "keep": str, "vocabulary": int, "teacher_stop_ids": list, "stop_ids": list,
}  # fmt: skip

Draw = Callable[[np.ndarray], Trajectories]
"""places (0 .. settings["rows"] - 1) -> their trajectories, max_new_tokens wide."""


def place_of(cache: Path, settings: dict[str, Any]) -> Path:
    """The folder of these settings in a cache: other settings have another.

    >>> place_of(Path("cache"), {"seed": 0}) == place_of(Path("cache"), {"seed": 1})
    False
    """
    return cache / "trajectories" / digest(settings)


def open_trajectories(
    path: Path, settings: dict[str, Any], draw: Draw, needed: Callable[[], np.ndarray]
) -> Draw:
    """read(places) -> Trajectories as host arrays, of the places that are `needed`; a piece that is
    not there is drawn when it is first asked for.

    Errors: as `open_folder`, and as `reader`.
    """

    @functools.cache
    def read_needed() -> Draw:
        open_folder(path, settings)
        return reader(path, settings, pieces_of(path, settings, needed()), draw)

    return lambda places: read_needed()(places)


def pieces_of(path: Path, settings: dict[str, Any], needed: np.ndarray) -> list[np.ndarray]:
    """The places that a run needs, in its order, without those that chunks of the folder hold, cut
    into what is drawn at once: the same at every start of the run, as the last bits of a response
    may depend on those that it was drawn with."""
    rows = settings["chunk_rows"]
    chunks = {n for n in np.unique(needed // rows).tolist() if _chunk_place(path, n).is_dir()}
    left = needed[~np.isin(needed // rows, [*chunks])]
    return [left[first : first + rows] for first in range(0, len(left), rows)]


def fill_pieces(
    path: Path,
    settings: dict[str, Any],
    draw: Draw,
    needed: np.ndarray,
    share: tuple[int, int],
) -> list[np.ndarray]:
    """Draw this process's share of the pieces that a folder lacks; returns all of them. Errors: as
    `fill`."""
    open_folder(path, settings)
    pieces, (index, count) = pieces_of(path, settings, needed), share
    for number in range(len(pieces))[index::count]:
        if not _piece_place(path, pieces[number]).is_dir():
            _draw_piece(path, draw, pieces, number)
    return pieces


def lacking(path: Path, pieces: Sequence[np.ndarray]) -> int:
    """How many of these pieces are not there."""
    return sum(not _piece_place(path, piece).is_dir() for piece in pieces)


def open_folder(path: Path, settings: dict[str, Any]) -> None:
    """Make the folder of these settings, or find it.

    Settings hold rows, chunk_rows and max_new_tokens beside whatever else decides the contents.
    Errors: ConfigError naming settings that differ from those of the folder, StorageError where it
    holds something else or can't be written.
    """
    with _storing(path):
        if (path / SETTINGS).exists():
            changed = differences(read_settings(path), json.loads(json.dumps(settings)))
            if changed:
                raise ConfigError(
                    f"{path} holds trajectories of other settings: {'; '.join(changed)};"
                    " choose another --out, or the old values"
                )
            return
        path.mkdir(parents=True, exist_ok=True)
        foreign = sorted(p.name for p in path.iterdir() if not p.name.endswith(".partial"))
        if foreign and not (path / SETTINGS).exists():  # another process may have made it just now
            raise StorageError(
                f"{path} holds {foreign[:3]} but no trajectories; choose another --out,"
                " nothing was overwritten"
            )
        with whole_file(path / SETTINGS) as partial:
            text = json.dumps(settings, sort_keys=True, indent=2) + "\n"
            partial.write_text(text, encoding="utf-8")


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of a folder. Errors: DataError where there are none, or they are damaged."""
    if not (path / SETTINGS).is_file():
        raise DataError(
            f"{path} holds no trajectories (no {SETTINGS}); give a folder that kdjax rollouts wrote"
        )
    found = json_object(path, SETTINGS)
    kinds = {**KINDS, **dict.fromkeys(LIMITS, int)}
    wrong = [
        f"{name} is {found.get(name)!r}"
        for name, kind in kinds.items()
        if (name in found or name in LIMITS) and not _is_setting(kind, found.get(name), name)
    ]
    if wrong:
        raise DataError(
            f"{path / SETTINGS} is damaged ({'; '.join(wrong)}); restore it, or draw anew"
        )
    return found


def _is_setting(kind: type, value: Any, name: str) -> bool:
    if kind is list:
        return isinstance(value, list) and all(type(one) is int for one in value)
    if kind is int:
        return type(value) is int and 1 <= value <= LIMITS.get(name, MANY)
    return isinstance(value, str)


def fill(
    path: Path,
    settings: dict[str, Any],
    draw: Draw,
    *,
    share: tuple[int, int] = (0, 1),
    redo: bool = False,
) -> int:
    """Draw the chunks that a folder lacks; returns how many were drawn.

    Args:
        path, settings: the folder, and everything that decides what is in it.
        draw: (rows) -> their Trajectories.
        share: (index, count): every count-th chunk from the index-th on, so that count processes
            fill a folder together.
        redo: finished chunks are read through too, and the damaged ones drawn anew.

    Errors: as `open_folder`; StorageError where a chunk can't be written, what is finished stays.
    """
    open_folder(path, settings)
    index, count = share
    drawn, total = 0, _chunks(settings)
    for number in range(total)[index::count]:
        place, rows = _chunk_place(path, number), _rows(settings, number)
        if redo and place.is_dir():
            try:
                _load(place, rows, settings)
            except DataError as error:
                announce(f"{path}: drawing anew: {error}")
                _remove(place)
        if not place.is_dir():
            announce(f"{path}: drawing chunk {number + 1} of {total}")
            _keep(place, rows, draw)
            drawn += 1
    return drawn


def require_complete(path: Path, settings: dict[str, Any]) -> None:
    """DataError unless every chunk is there (what is in them is checked when they are read)."""
    total = _chunks(settings)
    there = [int(p.name[6:]) for p in path.glob("chunk-*") if p.name[6:].isdecimal() and p.is_dir()]
    gone = total - sum(_chunk_place(path, n).is_dir() for n in {*there} if n < total)
    if gone:
        raise DataError(
            f"{path}: {gone} of {total} chunks are missing;"
            f" kdjax rollouts CONFIG --out {path} completes it"
        )


def identity(path: Path) -> str:
    """A text that is equal for equal settings and responses: of the sums kept with the chunks.

    Errors: DataError where a chunk is missing or its sums are damaged.
    """
    settings = read_settings(path)
    require_complete(path, settings)
    whole = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for number in range(_chunks(settings)):
        sums = _read_sums(_chunk_place(path, number))
        whole.update(str(sorted(v for name, v in sums.items() if ".arrow" in name)).encode())
    return whole.hexdigest()[:16]


def reader(
    path: Path,
    settings: dict[str, Any],
    pieces: Sequence[np.ndarray] = (),
    draw: Draw | None = None,
) -> Draw:
    """read(places) -> Trajectories as host arrays, right-padded to max_new_tokens: from the piece
    that holds a place, else from its chunk. A piece that is missing is drawn, if `draw` is given.

    Rows are read from the disk when they are asked for; the first row of a chunk or piece has its
    sums verified. Errors: DataError naming a damaged or missing one, StorageError.
    """
    homes = {int(p): (n, at) for n, piece in enumerate(pieces) for at, p in enumerate(piece)}

    @functools.cache
    def chunk(number: int):
        return _load(_chunk_place(path, number), _rows(settings, number), settings)

    @functools.cache
    def piece(number: int):
        place = _piece_place(path, pieces[number])
        if not place.is_dir() and draw is not None:
            _draw_piece(path, draw, pieces, number)
        return _load(place, pieces[number], settings)

    def one(place: int):
        if place in homes:
            number, at = homes[place]
            return row_of(piece(number)[at])
        number, at = divmod(place, settings["chunk_rows"])
        return row_of(chunk(number)[at])

    def read(places: np.ndarray) -> Trajectories:
        rows = [one(int(place)) for place in places]
        fields = {
            name: padded([row[name] for row in rows], settings["max_new_tokens"])
            for name in rows[0]
        }
        samples = Samples(**{name: fields.get(name) for name in Samples._fields})  # type: ignore[arg-type]
        top_k: list[Any] = [fields.get(f"top_k_{name}") for name in TopK._fields]
        return Trajectories(
            samples, fields.get("states_btd"), None if top_k[0] is None else TopK(*top_k)
        )

    return read


def _chunks(settings: dict[str, Any]) -> int:
    return -(-settings["rows"] // settings["chunk_rows"])


def _rows(settings: dict[str, Any], number: int) -> np.ndarray:
    first = number * settings["chunk_rows"]
    return np.arange(first, min(settings["rows"], first + settings["chunk_rows"]))


def _chunk_place(path: Path, number: int) -> Path:
    return path / f"chunk-{number:05d}"


def _piece_place(path: Path, piece: np.ndarray) -> Path:
    return path / f"rows-{digest(piece.tolist())}"


def _draw_piece(path: Path, draw: Draw, pieces: Sequence[np.ndarray], number: int) -> None:
    before, needed = sum(map(len, pieces[:number])), sum(map(len, pieces))
    last = before + len(pieces[number])
    announce(f"{path}: drawing responses {before + 1} to {last} of the {needed} that are needed")
    _keep(_piece_place(path, pieces[number]), pieces[number], draw)


@contextlib.contextmanager
def _storing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"can't keep trajectories in {path}: {one_line(error)}; finished chunks stay: make room"
            " and run it again, or set --cache (or --out of kdjax rollouts)"
        ) from error


def _keep(place: Path, rows: np.ndarray, draw: Draw) -> None:
    """Draw a chunk and write it, whole or not at all."""
    try:
        with contextlib.ExitStack() as finished:
            with _storing(place.parent):  # before anything is drawn, in case it can't be kept
                partial = finished.enter_context(whole_folder(place))
            kept = draw(rows)
            with _storing(place.parent):
                _write(partial, rows, kept)
                finished.close()
    except StorageError:
        if not place.is_dir():  # else another process was faster, with the same contents
            raise
    remove_partials(place)


def _remove(place: Path) -> None:
    """Delete a chunk; one that is half deleted does not stand in its place."""
    aside = beside(place)
    with _storing(place.parent):
        place.rename(aside)
        shutil.rmtree(aside)


def _write(folder: Path, rows: np.ndarray, kept: Trajectories) -> None:
    import datasets

    datasets.disable_progress_bars()
    table = datasets.Dataset(table_of(rows, kept))
    table.save_to_disk(str(folder), num_shards=1)
    sums = {path.name: _digest(path) for path in sorted(folder.iterdir())}
    (folder / SUMS).write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")


def _load(place: Path, rows: np.ndarray, settings: dict[str, Any]):
    """A chunk, or piece, of these rows as a table on the disk, once its files are those that were
    written, and hold what it does."""
    import datasets

    try:
        sums = _read_sums(place)
        there = {path.name for path in place.iterdir()} - {SUMS}
        known = [n for n in sorted(there & {*sums}) if member(place, n) is not None]
        changed = [n for n in known if _digest(place / n) != sums[n]]
        changed += sorted(there ^ {*sums})
        if changed:
            raise ValueError(f"{', '.join(changed)} is not what was written")
        check_saved(place)
        found = datasets.load_from_disk(str(place)).with_format("arrow")
        check_table(found[:], len(rows), settings["max_new_tokens"])
        return found
    except Exception as error:  # the library raises many kinds; all mean a damaged folder
        raise _damaged(place, error) from error


def _read_sums(place: Path) -> dict[str, str]:
    sums = json_object(place, SUMS)
    if not sums or not all(isinstance(value, str) for value in sums.values()):
        raise _damaged(place, ValueError(f"{SUMS} is missing or holds no sums"))
    return sums


def _damaged(place: Path, error: Exception) -> DataError:
    return DataError(
        f"trajectories in {place} are damaged ({one_line(error)}); kdjax rollouts with --redo draws"
        " them anew, or delete that folder"
    )


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
