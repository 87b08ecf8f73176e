"""The teacher's own prompts: what only it is told, such as the worked solution."""

from __future__ import annotations

import functools
import hashlib
import re
from typing import NamedTuple

from kdjax.base import Problem
from kdjax.data.batches import Source, chosen, having
from kdjax.data.tokenizer import Tokenizer
from kdjax.errors import DataError

FIELDS = ("prompt", "answer", "solution", "teacher_prompt")
"""The fields of a problem that a template may hold."""
_FIELD = re.compile(rf"(\\\w+)?\{{({'|'.join(FIELDS)})\}}")
LIMIT = "data.max_teacher_prompt_tokens"


class TeacherPrompts(NamedTuple):
    """How a teacher's prompts are made: problems whose prompt they are (`as_teacher`), the
    tokenizer that renders them, and the most tokens that one may have."""

    source: Source
    tokenizer: Tokenizer
    max_tokens: int


def fields_of(template: str) -> frozenset[str]:
    r"""The fields of a template; braces behind a LaTeX command are text.

    >>> sorted(fields_of(r"{solution} so \boxed{answer}. {prompt}"))
    ['prompt', 'solution']
    """
    return frozenset(found[2] for found in _FIELD.finditer(template) if not found[1])


def filled(template: str, problem: Problem) -> str:
    r"""The template with the problem's fields in it; what these hold is not looked into.

    >>> filled(r"Hint: {answer} of {prompt}, \boxed{answer}", Problem("p", "1+1={answer}", "2"))
    'Hint: 2 of 1+1={answer}, \\boxed{answer}'
    """

    def value(found: re.Match[str]) -> str:
        return found[0] if found[1] else getattr(problem, found[2]) or ""

    return _FIELD.sub(value, template)


@functools.lru_cache(maxsize=8)
def as_teacher(source: Source, template: str) -> Source:
    """The problems with the prompts that the teacher reads, and nothing to train on."""
    which = hashlib.sha256(template.encode()).hexdigest()[:16]

    def problem(index: int) -> Problem:
        own = source.problem(index)
        return own._replace(prompt=filled(template, own), solution=None)

    return Source(source.size, problem, f"{source.identity}, read as {which}", source.about)


@functools.lru_cache(maxsize=8)  # it reads every problem
def with_fields(source: Source, template: str) -> Source:
    """The problems that have all fields of a template, in order; the source itself where all do.

    Errors: DataError where none has one of them.
    """
    for field in sorted(fields_of(template) - {"prompt", "answer"}):
        kept = having(source, field)
        if not kept:
            raise DataError(
                f"no problem has a {field}, which data.teacher_prompt_template puts before the"
                f" teacher: fill that column (data.columns {field}=...), or leave it out"
            )
        source = chosen(source, kept, f"a {field}", f"have a {field}, and are used")
    return source
