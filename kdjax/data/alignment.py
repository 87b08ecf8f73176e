"""The alignment of two tokenizations of a response: positions where both have the same token.

A position counts where both tokenizers begin and end a token at the same bytes of the response, and
the vocabularies share that token (strict one-to-one positions, arXiv 2610.08448).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kdjax.base import TeacherRows
from kdjax.data.spelling import Spelling
from kdjax.data.tokenizer import Tokenizer
from kdjax.errors import ConfigError


class SharedVocabulary(NamedTuple):
    """The tokens that a student and a teacher of another tokenizer share.

    teacher_of_v: int32 [V], the teacher's id of each of the student's tokens; -1 where it has none.
    size: tokens of the teacher.
    stops: (the student's, the teacher's) stop ids where they are one event; empty where both stop
        at the same tokens, which then are shared like any other.
    renumbered: both have the same tokens and cut text alike: only the ids differ, if they do.
    """

    teacher_of_v: np.ndarray
    size: int
    stops: tuple[tuple[int, ...], tuple[int, ...]]
    renumbered: bool

    def __str__(self) -> str:
        own = int((self.teacher_of_v < 0).sum()), self.size - int((self.teacher_of_v >= 0).sum())
        return (
            f"{len(self.teacher_of_v) - own[0]} tokens are shared, of the student's"
            f" {len(self.teacher_of_v)} and the teacher's {self.size}"
        )


def share(student: Tokenizer, teacher: Tokenizer) -> SharedVocabulary:
    """The tokens of equal bytes, and control tokens of equal names. A token that several ids spell
    is paired in the order of their names, bytes by themselves (<0xE4>) last.

    Stop tokens are shared by their role: where the models stop at other tokens, all of the
    student's are one event, and all of the teacher's. Errors: ConfigError, as `read_spelling`, and
    where nothing is shared.
    """
    ends = [{t.token(i) for i in t.stop_ids} for t in (student, teacher)]
    same_stops = ends[0] == ends[1]
    stops = ((), ()) if same_stops else (student.stop_ids, teacher.stop_ids)
    alike = student.cutting == teacher.cutting and student.full_size == teacher.full_size
    if same_stops and alike and student.fingerprint == teacher.fingerprint:
        same = np.arange(student.full_size, dtype=np.int32)
        return SharedVocabulary(same, teacher.full_size, stops, True)
    theirs = _by_text(teacher.spelling(), stops[1])
    found = np.full(student.full_size, -1, np.int32)
    for text, ids in _by_text(student.spelling(), stops[0]).items():
        for own, other in zip(ids, theirs.get(text, ()), strict=False):
            found[own] = other
    shared = int((found >= 0).sum())
    if not shared:
        raise ConfigError(
            f"{student.folder} and {teacher.folder} share no token; take a teacher whose tokenizer"
            " has some of the student's"
        )
    whole = same_stops and alike and shared == student.full_size
    return SharedVocabulary(found, teacher.full_size, stops, whole)


def _by_text(spelling: Spelling, stops: tuple[int, ...]) -> dict[bytes | str, list[int]]:
    """The ids of each text, control tokens by name (a str); without these stops."""
    found: dict[bytes | str, list[int]] = defaultdict(list)
    for number, (text, name) in enumerate(zip(spelling.bytes_of, spelling.names, strict=True)):
        if name is not None and number not in stops:
            found[name if text is None else text].append(number)
    for ids in found.values():
        ids.sort(key=lambda i: (i in spelling.fallback, spelling.names[i]))
    return found


def align(
    student: Tokenizer, teacher: Tokenizer, shared: SharedVocabulary, response: Sequence[int]
) -> tuple[list[int], np.ndarray]:
    """(the response's ids as the teacher reads them, without a stop token; int [T], for each token
    of the response the number of the teacher's that is the same one at the same place, or -1).

    At the student's stop, where both end, it is the number of ids: the teacher's own stop would be
    next. What follows a control token, or text that the teacher's tokenizer changes, is not
    aligned; nor is a last character that is not whole. Student and teacher may change places.
    """
    ids, ended = list(response), bool(len(response)) and int(response[-1]) in student.stop_ids
    body, places = ids[:-1] if ended else ids, np.full(len(ids), -1)
    if shared.renumbered:
        theirs = [int(shared.teacher_of_v[i]) for i in body]
        places[:] = np.arange(len(ids))
        return theirs, places
    data, spans = _spans(student.spelling(), body)
    theirs = _encoded(teacher.spelling(), data)
    other, their_spans = _spans(teacher.spelling(), theirs)
    agreed = _common_start(data, other)
    number = {span: u for u, span in enumerate(their_spans) if span[1] <= agreed}
    for t, span in enumerate(spans):
        u = number.get(span, -1)
        if u >= 0 and shared.teacher_of_v[body[t]] == theirs[u]:
            places[t] = u
    read = len(spans) == len(body) and len(their_spans) == len(theirs)
    if ended and read and agreed == len(data) == len(other):
        places[-1] = len(theirs)
    return theirs, places


def _encoded(spelling: Spelling, data: bytes) -> list[int]:
    """The ids of a text given in bytes. Bytes that are no UTF-8 are tokens of one byte, where there
    are such tokens; else all ends before them, as it does before a last character that is not
    whole, which would be read otherwise."""
    ids: list[int] = []
    while data:
        try:
            return ids + spelling.encode(data.decode())
        except UnicodeDecodeError as error:
            ids += spelling.encode(data[: error.start].decode())
            wrong, data = data[error.start : error.end], data[error.end :]
            single = [spelling.of_byte.get(byte) for byte in wrong]
            if None in single or error.reason == "unexpected end of data":
                return ids
            ids += [number for number in single if number is not None]
    return ids


def _spans(spelling: Spelling, ids: Sequence[int]) -> tuple[bytes, list[tuple[int, int]]]:
    """(the bytes of the ids before the first that has none, where each begins and ends)."""
    data, spans = b"", []
    pieces = []
    place = 0
    for number in ids:
        piece = spelling.bytes_of[number] if number < len(spelling.bytes_of) else None
        if not piece:
            break
        pieces.append(piece)
        spans.append((place, place + len(piece)))
        place += len(piece)
    return data.join(pieces), spans


def _common_start(one: bytes, other: bytes) -> int:
    """The number of bytes that both begin with.

    >>> _common_start(b"abc", b"abd")
    2
    """
    least = min(len(one), len(other))
    a, b = (np.frombuffer(x[:least], np.uint8) for x in (one, other))
    differ = np.flatnonzero(a != b)
    return int(differ[0]) if len(differ) else least


def teacher_rows(
    student: Tokenizer,
    teacher: Tokenizer,
    shared: SharedVocabulary,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    width: int,
    length: int,
) -> TeacherRows:
    """The rows of a teacher of another tokenizer: its own prompts, and the responses in its tokens.

    Args:
        student, teacher, shared: the pair, by `share`.
        prompts: the teacher's ids of each row's prompt.
        responses: the student's ids of each row's response.
        width: S', slots of a row; what is longer is cut, and not aligned.
        length: T, response positions of the student's rows.
    """
    tokens = np.zeros((len(prompts), width), np.int32)
    slots = np.full((len(prompts), length), -1, np.int32)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        ids, places = align(student, teacher, shared, response)
        whole = [*prompt, *ids][:width]
        tokens[row, : len(whole)] = whole
        found = np.where(places < 0, -1, len(prompt) - 1 + places)
        slots[row, : len(found)] = np.where(found < width, found, -1)
    return TeacherRows(tokens, slots)
