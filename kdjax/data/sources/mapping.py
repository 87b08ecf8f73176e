"""Mappings: which columns of a dataset become a problem's fields, and by which functions."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

from kdjax.data.sources import cells
from kdjax.data.sources.files import Row
from kdjax.errors import ConfigError, DataError


class Column(NamedTuple):
    """read(the cells of `names`, then those of `optional`, None where absent) -> the field.

    A dotted name looks inside a struct. Every one of names must be there; where there are none, a
    prompt or an answer needs one of optional.
    """

    names: tuple[str, ...]
    read: Callable[..., Any] = cells.text
    optional: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[str, ...]:
        return (*self.names, *self.optional)

    def of(self, row: Row) -> Any:
        return self.read(*(_cell(row, name) for name in self.all))


@dataclasses.dataclass(frozen=True)
class Mapping:
    """How one dataset is read: a column for each field of a problem.

    traces: counts the worked responses of a row. keeps: true for the rows that are used; None: all.
    train, test: its splits of that use, None where it has none. config: of the hub. revision: the
    one that is read where a name gives none. rows: how many a split has, where that is known. same:
    a row is a duplicate where its prompt, or all of it, is that of an earlier row. note: what a
    user of it should know.
    """

    prompt: Column
    answer: Column
    solution: Column | None = None
    tag: Column | None = None
    teacher_prompt: Column | None = None
    traces: Column | None = None
    keeps: Column | None = None
    train: str | None = None
    test: str | None = None
    config: str | None = None
    revision: str | None = None
    rows: tuple[tuple[str, int], ...] = ()
    same: Literal["prompt", "row"] = "prompt"
    note: str = ""

    @property
    def columns(self) -> tuple[Column, ...]:
        read = (self.prompt, self.answer, self.solution, self.tag, self.teacher_prompt)
        every = (*read, self.traces, self.keeps)
        return tuple(column for column in every if column is not None)


FIELDS = ("prompt", "answer", "solution", "tag", "teacher_prompt")


def mapping_of(columns: Sequence[str]) -> Mapping:
    """The mapping of a file with named columns, each "field=column"; a field that is not named has
    the column of its own name, and solution, tag and teacher_prompt may be absent.

    Errors: ConfigError for a text of another form.

    >>> mapping_of(["prompt=question", "answer=meta.gold"]).answer.names
    ('meta.gold',)
    """
    given: dict[str, str] = {}
    for written in columns:
        field, _, column = written.partition("=")
        if field not in FIELDS or not column or field in given:
            raise ConfigError(
                f'columns: each is written "field=column" once, with the fields'
                f" {', '.join(FIELDS)}; got {written!r}"
            )
        given[field] = column

    def field_of(field: str, read: Callable[..., Any]) -> Column:
        if field in given or field in ("prompt", "answer"):
            return Column((given.get(field, field),), read)
        return Column((), read, optional=(field,))

    return Mapping(
        prompt=field_of("prompt", cells.user_turn),
        answer=field_of("answer", cells.text),
        solution=field_of("solution", cells.verbatim),
        tag=field_of("tag", cells.text),
        teacher_prompt=field_of("teacher_prompt", cells.verbatim),
        train="train",
        test="test",
        same="row",
    )


MOST_COLUMNS = 10_000
"""A table of more, fields of structs counted, is no table of problems."""

SHOWN_COLUMNS = 20


def needed(mapping: Mapping, there: Iterable[str], name: str) -> list[str]:
    """The columns to read of those that are `there` (structs' fields by dotted names).

    Errors: DataError naming a column that is missing and the one most like it, and for more than
    MOST_COLUMNS.
    """
    there = list(there)
    if len(there) > MOST_COLUMNS:
        raise DataError(f"{name}: {len(there)} columns, and at most {MOST_COLUMNS} are read")
    for column in mapping.columns:
        missing = [one for one in column.names if one not in there]
        of_it = column.optional if column in (mapping.prompt, mapping.answer) else ()
        if not column.names and of_it and not {*of_it} & {*there}:
            missing = [of_it[0]]
        if missing:
            raise DataError(f"{name}: no column {missing[0]}{_nearest(missing[0], there)}")
    wanted = {one for column in mapping.columns for one in column.all if one in there}
    return sorted(wanted)


def _nearest(name: str, there: list[str]) -> str:
    lower = {one.lower(): one for one in there}
    near = difflib.get_close_matches(name.lower(), lower, n=1)
    hint = f"did you mean {lower[near[0]]}? " if near else ""
    more = f" and {len(there) - SHOWN_COLUMNS} more" if len(there) > SHOWN_COLUMNS else ""
    shown = ", ".join(there[:SHOWN_COLUMNS]) + more
    return f"; {hint}it has {shown} (say which by columns: prompt=... answer=...)"


def _cell(row: Row, name: str) -> Any:
    """A cell; bytes, which some writers make of text, as the text."""
    value: Any = row
    for part in [name] if name in row else name.split("."):
        if not isinstance(value, dict):
            return None
        value = value.get(part)
    return value.decode() if isinstance(value, bytes) else value
