r"""Symbolic answers by math-verify (extra `math`), in worker processes with hard limits.

The exact verifier is asked first, and only what it can't decide goes to a worker, behind filters of
size. What a worker can't decide in time and memory is NOT_SCORED, with the reason.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from kdjax.errors import ConfigError
from kdjax.grading.answers import Graded, Outcome, grade
from kdjax.grading.equivalence import MAX_ANSWER_CHARACTERS, Entries, Number, Value, read
from kdjax.grading.pool import Reply, Workers

MAX_NESTING = 16
MAX_DIGITS = 64
MAX_RESPONSE_CHARACTERS = 16_384

PROGRAM = Path(__file__).with_name("program.py")


class _Symbolic:
    """A Grader (kdjax.grading.answers) over workers: call it with pairs, close it, or use it in
    `with`."""

    def __init__(self, workers: Workers):
        self.workers = workers

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[Graded]:
        raise NotImplementedError

    def close(self) -> None:
        """End the workers. They also end with the interpreter."""
        self.workers.close()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()


class Strict(_Symbolic):
    """Boxed, after thinking; a literal when the gold is one; equal exactly, or by math-verify."""

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[Graded]:
        """What became of each response, in order."""
        graded = [grade(response, gold) for response, gold in pairs]
        asked: dict[tuple[str, str], list[int]] = {}  # equal samples of a problem are asked once
        for place, ((_, gold), exact) in enumerate(zip(pairs, graded, strict=True)):
            answer = exact.answer or ""
            if exact.outcome is not Outcome.WRONG or is_decided(answer, gold):
                continue
            reason = unfit(answer) or unfit(gold)
            if reason:
                graded[place] = Graded(Outcome.NOT_SCORED, answer, reason)
            else:
                asked.setdefault((answer, gold), []).append(place)
        replies = self.workers.map([{"answer": a, "gold": g} for a, g in asked])
        for (answer, _), reply, places in zip(asked, replies, asked.values(), strict=True):
            for place in places:
                graded[place] = _graded(reply, answer)
        return graded


class Lenient(_Symbolic):
    """math-verify's defaults on the whole response (its last 16,384 characters), to compare with
    published numbers: the last formula or number counts, boxed or not, evaluated or not."""

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[Graded]:
        """What became of each response, in order; there is no NO_ANSWER."""
        tails = [response[-MAX_RESPONSE_CHARACTERS:] for response, _ in pairs]
        golds = [gold for _, gold in pairs]
        asked = [{"answer": a, "gold": g} for a, g in zip(tails, golds, strict=True)]
        return [_graded(reply, None) for reply in self.workers.map(asked)]


def _graded(reply: Reply, answer: str | None) -> Graded:
    if reply.failure:
        return Graded(Outcome.NOT_SCORED, answer, reply.failure)
    return Graded(Outcome.CORRECT if reply.value else Outcome.WRONG, answer)


def open_symbolic(
    *, workers: int = 1, deadline_seconds: float = 3.0, memory_mib: int = 1024
) -> Strict:
    r"""The strict grader, for rewards and evaluation.

    Each answer has deadline_seconds of a worker, and a worker memory_mib of address space. Errors:
    ConfigError without the extra.

    with open_symbolic(workers=2) as grader:
        grader([(r"so \boxed{\sqrt{12}}", r"2\sqrt{3}")])[0].outcome  # correct
    """
    return Strict(_open("strict", workers, deadline_seconds, memory_mib))


def open_lenient(
    *, workers: int = 1, deadline_seconds: float = 10.0, memory_mib: int = 1024
) -> Lenient:
    """The lenient grader; its deadline is that of math-verify's parsing and one comparison."""
    return Lenient(_open("lenient", workers, deadline_seconds, memory_mib))


def _open(judge: str, workers: int, deadline_seconds: float, memory_mib: int) -> Workers:
    check_installed("symbolic grading")
    if min(workers, deadline_seconds, memory_mib) <= 0:
        raise ConfigError(
            "symbolic grading: workers, deadline_seconds and memory_mib must be positive, got"
            f" {workers}, {deadline_seconds} and {memory_mib}"
        )
    command = [sys.executable, "-P", str(PROGRAM), judge, str(deadline_seconds), str(memory_mib)]
    return Workers(command, workers, deadline_seconds)


def check_installed(what: str) -> None:
    """Errors: ConfigError where math-verify is missing."""
    if importlib.util.find_spec("math_verify") is None:
        raise ConfigError(
            f'{what} needs math-verify, which is not installed: pip install "kdjax[math]"'
        )


def is_decided(answer: str, gold: str) -> bool:
    r"""Whether the exact verifier's "wrong" is final: the gold is numbers, a choice or words, or
    the answer leaves a sum, an integral or the like to be evaluated that the gold does not have.

    >>> is_decided(r"6\cdot7", "42"), is_decided(r"\sqrt{12}", r"2\sqrt{3}")
    (True, False)
    """
    if _is_literal(read(gold)) or _WORDS.fullmatch(_TEXT.sub(r"\1", gold).strip()):
        return True
    return not set(_EVALUATES.findall(answer)) <= set(_EVALUATES.findall(gold))


def _is_literal(value: Value) -> bool:
    if isinstance(value, Entries):
        return all(map(_is_literal, value.values))
    return isinstance(value, Number)


_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}")
_WORDS = re.compile(r"\(?[A-J]\)?|(?=.*[A-Za-z]{4})[A-Za-z][A-Za-z ,.'-]*")
_EVALUATES = re.compile(r"\\(?:sum|prod|i*nt|lim|gcd|lcm|det|max|min|[dt]?binom|pmod|bmod)|[!*]")


def unfit(text: str) -> str:
    r"""Why a text is not given to a worker, or "" where it is.

    >>> unfit("9^{9^9}"), unfit(r"e^{x^2}")
    ('power tower', '')
    """
    if len(text) > MAX_ANSWER_CHARACTERS:
        return "length"
    if _DIGITS.search(text):
        return "digits"
    if _TOWER.search(text):
        return "power tower"
    level = 0
    for mark in _BRACKETS.findall(text):
        level += 1 if mark in "([{" else -1
        if level > MAX_NESTING:
            return "nesting"
    return ""


_DIGITS = re.compile(rf"[0-9]{{{MAX_DIGITS + 1}}}")
_BRACKETS = re.compile(r"[()\[\]{}]")
_TOWER = re.compile(r"(?:\^|\*\*)[ {(]{0,4}[^{}^]{0,16}[0-9)}][ })]{0,4}(?:\^|\*\*)")
