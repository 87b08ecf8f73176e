"""Readers of a dataset's cells, for the mappings: a cell -> text, or None where there is none."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

from kdjax.grading.answers import extract_answer
from kdjax.grading.equivalence import is_equivalent

LONGEST_NUMBER = 10_000
"""Digits of a number that is written out; 1e999999999 is no number that a problem has."""


def text(value: Any) -> str | None:
    """Text and numbers as text: numbers exactly, whole ones without their point. None for anything
    else, for a number that is not finite, and for blank text.

    >>> text(27.0), text(" x "), text(Decimal("0.50")), text(""), text(float("nan")), text(True)
    ('27', 'x', '0.50', None, None, None)
    """
    if isinstance(value, str):
        return value.strip() or None
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return None
    number = Decimal(str(value)) if isinstance(value, float) else Decimal(value)
    if not number.is_finite() or abs(number.adjusted()) > LONGEST_NUMBER:
        return None
    whole = number.to_integral_value()
    return format(whole if whole == number else number, "f")


def verbatim(value: Any) -> str | None:
    """As `text`, but space around a text stays."""
    return value if isinstance(value, str) and value.strip() else text(value)


def user_turn(value: Any) -> str | None:
    """The user turn of a chat ([{role, content}, ...]); a text as it is. Other roles are left out:
    the system prompt is the config's.

    Errors: ValueError for a chat of several user turns.

    >>> user_turn([{"role": "system", "content": "s"}, {"role": "user", "content": "1+1?"}])
    '1+1?'
    """
    if not isinstance(value, list):
        return verbatim(value)
    chat = (turn for turn in value if isinstance(turn, dict))
    turns = [turn.get("content") for turn in chat if turn.get("role") == "user"]
    if len(turns) > 1:
        raise ValueError(f"{len(turns)} user turns, and a prompt is one")
    return verbatim(turns[0]) if turns else None


def same(*values: Any) -> str | None:
    """The text of columns with the same content, of which some may be absent or empty.

    Errors: ValueError where two differ.
    """
    found = {value for value in map(text, values) if value is not None}
    if len(found) > 1:
        raise ValueError(f"two columns differ: {', '.join(repr(v[:60]) for v in sorted(found))}")
    return found.pop() if found else None


def after_marks(value: Any) -> str | None:
    """GSM8K's gold: what follows the last ####, without separators, spaces and currency.

    >>> after_marks("#### 5 no, #### $1,234 ")
    '1234'
    """
    _, marks, gold = str(value or "").rpartition("####")
    return text(re.sub(r"[\s,$]", "", gold)) if marks else None


def worked(value: Any) -> str | None:
    r"""GSM8K's worked text before the last ####, without calculator marks, ending with the gold in
    a box, where the verifier reads it.

    >>> worked("2+2=<<2+2=4>>4 eggs\n#### 4")
    '2+2=4 eggs\n\\boxed{4}'
    """
    gold = after_marks(value)
    before = re.sub(r"<<[^<>]*>>", "", str(value or "").rpartition("####")[0]).strip()
    return f"{before}\n\\boxed{{{gold}}}" if before and gold else None


def unboxed(value: Any) -> str | None:
    r"""The content of the last box of a text.

    >>> unboxed(r"\boxed{70}")
    '70'
    """
    return text(extract_answer(value)) if isinstance(value, str) else None


DAPO_BEFORE = re.compile(
    r"^\s*Solve the following math problem step by step\..*?"
    r"is the answer to the problem\.\s*",
    re.DOTALL,
)
DAPO_AFTER = re.compile(
    r"\s*Remember to put your answer on its own line after \"?Answer:\"?\.?\s*$"
)


def without_dapo_wrapper(value: Any) -> str | None:
    """DAPO's problem without the instruction around it ("... the form Answer: $Answer ...").

    Errors: ValueError where the instruction stands on one side only: the text is not DAPO's.
    """
    whole = user_turn(value)
    if whole is None:
        return None
    inner, before = DAPO_BEFORE.subn("", whole)
    inner, after = DAPO_AFTER.subn("", inner)
    if before != after:
        raise ValueError("DAPO's instruction stands on one side of the problem only")
    return text(inner)


def verified_trace(generations: Any, complete: Any, by_rule: Any, by_judge: Any) -> str | None:
    """OpenR1's first trace that is complete and that math-verify, or else the judge, found right.

    >>> verified_trace(["a", "b", "c"], [True, False, True], [False, True, True], None)
    'c'
    """
    for place, trace in enumerate(generations or []):
        verified = _flag(by_rule, place) or _flag(by_judge, place)
        if verified and _flag(complete, place):
            return verbatim(trace)
    return None


def trace_with_answer(answer: Any, *traces: Any) -> str | None:
    r"""The first trace whose last box is the answer.

    >>> trace_with_answer("2", r"so \boxed{3}", None, r"so \boxed{2}")
    'so \\boxed{2}'
    """
    gold = text(answer)
    right = (
        trace
        for trace in traces
        if isinstance(trace, str) and gold and is_equivalent(extract_answer(trace), gold)
    )
    return next(right, None)


def how_many(*values: Any) -> int:
    """Texts that are there, one a cell or a list in one cell."""
    cells = values[0] if len(values) == 1 and isinstance(values[0], list) else values
    return sum(1 for cell in cells if text(cell) is not None)


def _flag(flags: Any, place: int) -> bool:
    return bool(flags) and place < len(flags) and flags[place] is True
