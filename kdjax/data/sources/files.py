"""The rows of one file, read whole from the file itself: text stays text, numbers what is written.

A library that guesses a column's type makes a float of 9007199254740993 beside a blank, a date of
"2024-01-02" and nothing of "NA"; so JSON is read by Python's parser with exact numbers, and CSV as
text. Nothing is cached: a file that was replaced is read anew, whatever its times say.
"""

from __future__ import annotations

import contextlib
import csv
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kdjax.data.sources.guard import check_depth, check_no_archive
from kdjax.errors import DataError
from kdjax.runtime.files import one_line, without_twins

Row = dict[str, Any]

MOST_ROW_BYTES = 16 << 20
"""A longer row is refused: no problem is so long, and what is made of it takes many times that."""

BATCH_ROWS = 1000


class Rows(NamedTuple):
    """The rows of a dataset, to be read as often as is asked.

    - columns: their names, and those of the fields of structs, dotted.
    - each(names): the rows in order, with these columns (of a field, the struct that holds it); a
      column that a row lacks is absent there.
    """

    columns: tuple[str, ...]
    each: Callable[[Iterable[str]], Iterator[Row]]


def read_file(path: Path) -> Rows:
    """The rows of a file of one of KINDS. Errors: DataError, also while rows are read."""
    check_no_archive(path)
    if path.stat().st_size == 0:
        return Rows((), lambda names: iter(()))
    return KINDS[path.suffix](path)


def chain(files: list[Rows]) -> Rows:
    """The rows of several files, in order, with the columns of all.

    >>> a, b = (Rows((name,), lambda _, n=name: iter([{n: 1}])) for name in "ab")
    >>> chain([a, b]).columns, list(chain([a, b]).each("ab"))
    (('a', 'b'), [{'a': 1}, {'b': 1}])
    """
    columns = dict.fromkeys(name for rows in files for name in rows.columns)
    return Rows(tuple(columns), lambda names: (row for rows in files for row in rows.each(names)))


def holders(names: Iterable[str], columns: Iterable[str]) -> set[str]:
    """The columns that hold these: themselves where they are columns, else the structs of fields.

    >>> sorted(holders(["a.b", "c.d"], ["a.b", "c"]))
    ['a.b', 'c']
    """
    whole = {*columns}
    return {name if name in whole else name.split(".")[0] for name in names}


def names_of(row: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The names of a row's cells, or of columns with their kinds, and of the fields of structs,
    dotted."""
    for name, value in row.items():
        yield prefix + name
        if isinstance(value, dict):
            yield from names_of(value, f"{prefix}{name}.")


def _json(path: Path) -> Rows:
    def each(names: Iterable[str]) -> Iterator[Row]:
        names = tuple(names)
        for row in _json_rows(path):
            held = holders(names, row)
            yield {name: value for name, value in row.items() if name in held}

    columns: dict[str, None] = {}
    for row in _json_rows(path):
        columns |= dict.fromkeys(names_of(row))
    return Rows(tuple(columns), each)


def _json_rows(path: Path) -> Iterator[Row]:
    """Objects, one a line; or all in one list."""
    with open(path, "rb") as file:
        if file.read(512).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            file.seek(0)
            rows = _parse(file.read(), str(path))
            for number, row in enumerate(rows, 1):
                where = f"{path}, row {number}"
                if file.tell() > MOST_ROW_BYTES:
                    _check_size(where, len(json.dumps(row, default=str)))
                yield _checked(row, where)
            return
        file.seek(0)
        for number, line in enumerate(iter(lambda: file.readline(MOST_ROW_BYTES + 1), b""), 1):
            where = f"{path}, line {number}"
            _check_size(where, len(line))
            if line.strip():
                yield _checked(_parse(line, where), where)


def _parse(text: bytes, where: str) -> Any:
    try:
        return DECODER.decode(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({one_line(error)}); fix it") from None


DECODER = json.JSONDecoder(parse_int=Decimal, parse_float=Decimal, object_pairs_hook=without_twins)


def _checked(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise DataError(f"{where}: a row must be a JSON object; fix it")
    check_depth(row, where)
    return row


def _check_size(where: str, size: int) -> None:
    if size > MOST_ROW_BYTES:
        raise DataError(f"{where}: a row of more than {MOST_ROW_BYTES >> 20} MiB; shorten it")


def _csv(path: Path) -> Rows:
    """Cells are texts as they are written; an empty one is none."""

    def each(names: Iterable[str]) -> Iterator[Row]:
        with _reading(path, "csv"), open(path, encoding="utf-8-sig", newline="") as file:
            csv.field_size_limit(MOST_ROW_BYTES)
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            places = {name: header.index(name) for name in names if name in header}
            for cells in reader:
                if len(cells) > len(header):
                    raise ValueError(
                        f"line {reader.line_num}: {len(cells)} cells, where the header has"
                        f" {len(header)}"
                    )
                if cells:
                    yield {n: cells[at] or None for n, at in places.items() if at < len(cells)}

    with _reading(path, "csv"), open(path, encoding="utf-8-sig", newline="") as file:
        csv.field_size_limit(MOST_ROW_BYTES)
        header = next(csv.reader(file, strict=True), [])
        twice = [name for name, times in Counter(header).items() if name and times > 1]
        if twice:
            raise ValueError(f"the column {twice[0]} stands twice")
    return Rows(tuple(header), each)


def _parquet(path: Path) -> Rows:
    import pyarrow.parquet

    def each(names: Iterable[str]) -> Iterator[Row]:
        with _reading(path, "parquet"), pyarrow.parquet.ParquetFile(path) as file:
            held = sorted(holders(names, file.schema_arrow.names) & {*file.schema_arrow.names})
            for batch in file.iter_batches(BATCH_ROWS, columns=held):
                yield from _rows_of(batch)

    with _reading(path, "parquet"), pyarrow.parquet.ParquetFile(path) as file:
        return Rows(tuple(_fields(file.schema_arrow)), each)


def _arrow(path: Path) -> Rows:
    import pyarrow

    def each(names: Iterable[str]) -> Iterator[Row]:
        with _reading(path, "arrow"), pyarrow.memory_map(str(path)) as source:
            for batch in _batches(source):
                held = sorted(holders(names, batch.schema.names) & {*batch.schema.names})
                for first in range(0, batch.num_rows, BATCH_ROWS):
                    yield from _rows_of(batch.select(held).slice(first, BATCH_ROWS))

    with _reading(path, "arrow"), pyarrow.memory_map(str(path)) as source:
        return Rows(tuple(_fields(_opened(source).schema)), each)


def _opened(source: Any) -> Any:
    import pyarrow

    try:
        return pyarrow.ipc.open_stream(source)
    except pyarrow.ArrowInvalid:
        return pyarrow.ipc.open_file(source)


def _batches(source: Any) -> Iterator[Any]:
    reader = _opened(source)
    if hasattr(reader, "get_batch"):
        yield from map(reader.get_batch, range(reader.num_record_batches))
    else:
        yield from reader


def _rows_of(batch: Any) -> list[Row]:
    batch.validate(full=True)  # offsets that point elsewhere would be followed
    rows = batch.to_pylist()
    narrow = {f.name: NARROW[str(f.type)] for f in batch.schema if str(f.type) in NARROW}
    for row in rows if narrow else ():
        row |= {name: shortest(row[name], kind) for name, kind in narrow.items()}
    return rows


NARROW = {"halffloat": "float16", "float": "float32"}
"""Arrow's names of numbers that Python has no float for, and NumPy's."""


def shortest(value: float | None, kind: str) -> Decimal | None:
    """A number of few bits as it is written: as a float of Python's, 0.1 of 32 bits is
    0.10000000149011612.

    >>> shortest(0.10000000149011612, "float32")
    Decimal('0.1')
    """
    return None if value is None else Decimal(str(np.dtype(kind).type(value)))


def _fields(kinds: Iterable[Any], prefix: str = "") -> Iterator[str]:
    """The names of Arrow fields, and of the fields of structs, dotted."""
    import pyarrow

    for kind in kinds:
        yield prefix + kind.name
        if pyarrow.types.is_struct(kind.type):
            yield from _fields(kind.type, f"{prefix}{kind.name}.")


@contextlib.contextmanager
def _reading(path: Path, kind: str) -> Iterator[None]:
    """Errors: DataError for whatever a library raises over a file."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{path}: can't read it as {kind} ({one_line(error)})") from error


KINDS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _json,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
    ".arrow": _arrow,
}
"""How the rows of a file are read, by its suffix."""
