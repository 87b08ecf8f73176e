"""Reading an answer out of a response, and comparing answers exactly; text is never evaluated."""

from __future__ import annotations

import re
from fractions import Fraction

MAX_ANSWER_CHARACTERS = 512

_NUMBER = re.compile(r"[+-]?[0-9]{1,64}(?:\.[0-9]{1,64})?")
_RATIO = re.compile(r"([+-]?[0-9]{1,64})/([1-9][0-9]{0,63})")
_BRACE = re.compile(r"\\boxed\{|[{}]")


def extract_answer(response: str) -> str | None:
    r"""The content of the last closed \boxed{...} after the last </think>, or None.

    Braces may nest; contents over 512 characters are no answer.

    >>> extract_answer(r"3+4=7;\boxed{7}")
    '7'
    >>> extract_answer(r"3+4=7;\boxed{7") is None
    True
    """
    text = response.rpartition("</think>")[2]
    opened: list[re.Match] = []
    start, end = -1, -1
    for brace in _BRACE.finditer(text):
        if brace[0] != "}":
            opened.append(brace)
        elif opened:
            opener = opened.pop()
            fits = brace.start() - opener.end() <= MAX_ANSWER_CHARACTERS
            if opener[0] != "{" and fits and opener.end() > start:
                start, end = opener.end(), brace.start()
    return text[start:end] if start != -1 else None


def is_equivalent(answer: str | None, gold: str) -> bool:
    """True if both are the same exact rational number, or else the same text without outer spaces.

    >>> is_equivalent("07", "7"), is_equivalent("1/2", "0.5"), is_equivalent("6*7", "42")
    (True, True, False)
    """
    if answer is None:
        return False
    left, right = _rational(answer.strip()), _rational(gold.strip())
    if left is None or right is None:
        return answer.strip() == gold.strip()
    return left == right


def _rational(text: str) -> Fraction | None:
    if _NUMBER.fullmatch(text):
        return Fraction(text)
    ratio = _RATIO.fullmatch(text)
    return Fraction(int(ratio[1]), int(ratio[2])) if ratio else None
