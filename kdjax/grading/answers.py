r"""Grading a response: which part of it is the answer, and one of four outcomes.

Text is read and never evaluated. `grade` is the one door that evaluation and rewards use.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from kdjax.grading.equivalence import MAX_ANSWER_CHARACTERS, is_equivalent, read

BOXES_LOOKED_AT = 3
TAIL_CHARACTERS = 512

Policy = Callable[[str], str | None]
"""The text after the thinking part -> the answer in it, or None."""


class Outcome(enum.StrEnum):
    """What became of a response: right, wrong, without an answer, or beyond the verifier.

    A reward counts the last two as 0; evaluation reports the rate of each.
    """

    CORRECT = "correct"
    WRONG = "wrong"
    NO_ANSWER = "no_answer"
    NOT_SCORED = "not_scored"


class Graded(NamedTuple):
    """An outcome, the answer that it is about, and for NOT_SCORED why."""

    outcome: Outcome
    answer: str | None
    reason: str = ""


Grader = Callable[[Sequence[tuple[str, str]]], list[Graded]]
"""[(response, gold)] -> what became of each, in order."""


def boxed(text: str) -> str | None:
    r"""The content of the last closed \boxed{...} of 512 characters at most, or None.

    Braces nest, and \{ and \} are no braces. The last three boxes are looked at.

    >>> boxed(r"3+4=7;\boxed{7} or \boxed{8")
    '7'
    """
    end = len(text)
    for _ in range(BOXES_LOOKED_AT):
        end = text.rfind(_BOX, 0, end)
        if end == -1:
            return None
        content = _closed(text[end + len(_BOX) : end + len(_BOX) + MAX_ANSWER_CHARACTERS + 1])
        if content is not None:
            return content
    return None


_BOX = "\\boxed{"
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def _closed(text: str) -> str | None:
    """The text up to the brace that closes it, or None."""
    level = 1
    for found in _BRACE.finditer(text):
        if found[0] == "{":
            level += 1
        elif found[0] == "}":
            level -= 1
            if not level:
                return text[: found.start()]
    return None


def after_hashes(text: str) -> str | None:
    """What follows the last #### on its line, as GSM8K's solutions end, or None.

    >>> after_hashes("3+4=7\\n#### 7")
    '7'
    """
    place = text.rfind("####")
    if place == -1:
        return None
    line = text[place + 4 : place + 5 + MAX_ANSWER_CHARACTERS].partition("\n")[0]
    return line.strip() if len(line) <= MAX_ANSWER_CHARACTERS else None


def last_number(text: str) -> str | None:
    """The last plain number of the last 512 characters, or None.

    >>> last_number("so 6*7 = 42. Done")
    '42'
    """
    numbers = _PLAIN.findall(text[-TAIL_CHARACTERS:])
    return numbers[-1] if numbers else None


_PLAIN = re.compile(
    r"(?<![\w.,])[+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+|/[0-9]+)?(?![\w/])", re.ASCII
)


def first_of(*policies: Policy) -> Policy:
    """The answer of the first policy that finds one."""

    def first(text: str) -> str | None:
        return next((a for a in (policy(text) for policy in policies) if a is not None), None)

    return first


flexible: Policy = first_of(boxed, after_hashes, last_number)
"""A box, else what follows ####, else the last number: for models that were not asked to box."""


def extract_answer(response: str, policy: Policy = boxed) -> str | None:
    r"""The answer that a policy finds after the last </think>, or None; blank is none.

    A <think> that is still open is no answer, whatever stands in it.

    >>> extract_answer(r"<think>\boxed{6}</think>3+4=7;\boxed{7}")
    '7'
    >>> extract_answer(r"3+4=7;\boxed{7") is None
    True
    """
    said = response.rpartition("</think>")[2]
    answer = None if "<think>" in said else policy(said)
    return answer if answer and not answer.isspace() else None


def grade(response: str, gold: str, policy: Policy = boxed) -> Graded:
    r"""What becomes of a response by the exact verifier.

    NOT_SCORED only where the gold can't be compared with: it is blank or over 512 characters.

    >>> grade(r"so \boxed{\frac12}", "0.5").outcome.value
    'correct'
    """
    answer = extract_answer(response, policy)
    if answer is None:
        return Graded(Outcome.NO_ANSWER, None)
    if len(gold) > MAX_ANSWER_CHARACTERS or read(gold) == ():
        return Graded(Outcome.NOT_SCORED, answer, "the gold answer is blank or too long")
    return Graded(Outcome.CORRECT if is_equivalent(answer, gold) else Outcome.WRONG, answer)


def grade_boxed(pairs: Sequence[tuple[str, str]]) -> list[Graded]:
    """`grade` of many (response, gold) pairs."""
    return [grade(response, gold) for response, gold in pairs]


def grade_flexible(pairs: Sequence[tuple[str, str]]) -> list[Graded]:
    """`grade` of many (response, gold) pairs by the policy `flexible`."""
    return [grade(response, gold, flexible) for response, gold in pairs]
