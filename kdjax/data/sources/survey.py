"""The survey of a dataset's rows: which are problems, and counts of what is left out or looks
wrong."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from kdjax.base import Problem
from kdjax.data.sources.files import Row
from kdjax.data.sources.mapping import Column, Mapping
from kdjax.errors import DataError
from kdjax.grading.answers import extract_answer
from kdjax.grading.equivalence import is_equivalent


class Counts(NamedTuple):
    """Counts of a dataset's rows. Used are rows - left_out - no_prompt - no_answer - duplicates;
    the other fields count rows that are used all the same.

    - left_out: by the dataset's own rule (proofs, multiple choice).
    - no_prompt, no_answer: nothing there, or nothing that can be read as text.
    - duplicates: the prompt of an earlier row (case and space do not count); in a file with named
      columns, all of an earlier row.
    - conflicting: the prompt of an earlier row with another answer, duplicates included.
    - unverifiable: the gold, boxed, would not be graded right by the verifier.
    - leaked: the prompt contains "answer is" and then the gold.
    - disagreeing: the worked response's box is not the gold.
    - several_traces, unverified_traces: rows with several worked responses to choose from, and with
      none of them chosen.
    - worked: rows with a worked response.
    """

    rows: int = 0
    left_out: int = 0
    no_prompt: int = 0
    no_answer: int = 0
    duplicates: int = 0
    conflicting: int = 0
    unverifiable: int = 0
    leaked: int = 0
    disagreeing: int = 0
    several_traces: int = 0
    unverified_traces: int = 0
    worked: int = 0

    @property
    def used(self) -> int:
        return self.rows - self.left_out - self.no_prompt - self.no_answer - self.duplicates


LEFT_OUT = {
    "left_out": "left out by the dataset's rule",
    "no_prompt": "without a prompt",
    "no_answer": "without an answer",
    "duplicates": "duplicates",
}


def in_words(counts: Counts) -> str:
    """The counts in one sentence: rows, problems, and what was left out.

    >>> in_words(Counts(rows=5, duplicates=2, no_answer=1))
    '5 rows, 2 problems (left out: 1 without an answer, 2 duplicates)'
    """
    out = [f"{getattr(counts, n)} {say}" for n, say in LEFT_OUT.items() if getattr(counts, n)]
    return f"{counts.rows} rows, {counts.used} problems" + (
        f" (left out: {', '.join(out)})" if out else ""
    )


class Survey(NamedTuple):
    """The problems of the rows that are used, a digest of each, and the counts of all rows."""

    kept: list[Problem]
    digests: list[bytes]
    counts: Counts


def survey(mapping: Mapping, title: str, rows: Iterable[Row]) -> Survey:
    """The survey of rows, each read once. Errors: DataError naming a row that contradicts
    itself."""
    found: Counter[str] = Counter()
    result = Survey([], [], Counts())
    answers: dict[bytes, str] = {}  # the first one of each prompt
    seen: set[bytes] = set()
    again: dict[bytes, list[str]] = {}  # cells -> the counts of a row that repeats them
    for index, row in enumerate(rows):
        found["rows"] += 1
        cells = _digest(repr(row))
        if cells in again:  # nothing new to read: of DAPO's rows, 99 in 100
            found.update(again[cells])
            continue
        read = read_row(mapping, title, index, row)
        if isinstance(read, str):
            found[read] += 1
            again[cells] = [read]
            continue
        fields = read[1:] if read.teacher_prompt else read[1:-1]  # all but the id
        prompt, whole = _digest(normalised(read.prompt)), _digest(*fields)
        first = answers.setdefault(prompt, read.answer)
        conflicts = first != read.answer and not is_equivalent(read.answer, first)
        found["conflicting"] += conflicts
        again[cells] = ["duplicates", "conflicting"] if conflicts else ["duplicates"]
        same = prompt if mapping.same == "prompt" else whole
        if same in seen:
            found["duplicates"] += 1
            continue
        seen.add(same)
        traces = mapping.traces.of(row) if mapping.traces else 0
        found.update(oddities(read, traces))
        result.kept.append(read)
        result.digests.append(whole)
    return result._replace(counts=Counts(**found))


def read_row(mapping: Mapping, title: str, index: int, row: Row) -> Problem | str:
    """A row's problem, or the name of the count that it belongs to if it is not used."""
    if mapping.keeps is not None and not mapping.keeps.of(row):
        return "left_out"
    try:
        prompt = mapping.prompt.of(row)
        if prompt is None:
            return "no_prompt"
        answer = mapping.answer.of(row)
        if answer is None:
            return "no_answer"
        solution, tag = _field(mapping.solution, row), _field(mapping.tag, row) or ""
        theirs = _field(mapping.teacher_prompt, row)
        (prompt + answer + (solution or "") + tag + (theirs or "")).encode()  # no half characters
        return Problem(f"{title}/{index}", prompt, answer, solution, tag, theirs)
    except ValueError as error:
        raise DataError(f"{title}/{index}: {error}; fix that row") from error


def _field(column: Column | None, row: Row) -> str | None:
    return None if column is None else column.of(row)


def oddities(problem: Problem, traces: int = 0) -> list[str]:
    """The counts that a row in use adds to."""
    boxed = extract_answer(f"\\boxed{{{problem.answer}}}")
    own = extract_answer(problem.solution or "")
    says = {
        "unverifiable": not is_equivalent(boxed, problem.answer),
        "leaked": is_leaked(problem.prompt, problem.answer),
        "disagreeing": own is not None and not is_equivalent(own, problem.answer),
        "several_traces": traces > 1,
        "unverified_traces": traces > 0 and problem.solution is None,
        "worked": problem.solution is not None,
    }
    return [name for name, so in says.items() if so]


_SAID = re.compile(r"answer\s+is\s*:?\s*(?:\$|\\boxed\{|\\\()*\s*", re.IGNORECASE)


def is_leaked(prompt: str, answer: str) -> bool:
    """True if the prompt has "answer is" and then the full answer, also in dollars or a box.

    >>> is_leaked("Show that the answer is $12$.", "12"), is_leaked("The answer is 120. Why?", "12")
    (True, False)
    """
    ends = (said.end() for said in _SAID.finditer(prompt))
    return any(
        prompt.startswith(answer, end) and not re.match(r"\w|[.,]\d", prompt[end + len(answer) :])
        for end in ends
    )


def normalised(prompt: str) -> str:
    """A prompt's form for comparisons: Unicode composed (NFC), case folded, runs of space as one.

    >>> normalised("  What is  1+1? ") == normalised("what IS 1+1?")
    True
    """
    return " ".join(unicodedata.normalize("NFC", prompt).casefold().split())


def _digest(*texts: str | None) -> bytes:
    """A digest of several texts, each with its length."""
    parts = (f"{len(text)}:{text}" for text in (t or "" for t in texts))
    return hashlib.blake2b("".join(parts).encode("utf-8", "surrogatepass"), digest_size=16).digest()
