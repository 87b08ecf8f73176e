"""Rewards: plain functions of (prompt, response, answer), run outside the step by bounded workers.

A reward never evaluates model text in this process; one that must (`math`) asks workers of its own
that can be killed.
"""

from __future__ import annotations

import functools
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from kdjax.base import Problem
from kdjax.errors import ConfigError, DataError, first_line, place_of, raised_in
from kdjax.grading.answers import Grader, Outcome, extract_answer
from kdjax.grading.equivalence import is_equivalent
from kdjax.grading.symbolic import open_symbolic

Reward = Callable[[str, str, str], float]
"""(prompt, response, gold answer) -> a number, most often in [0, 1]."""


LATE = object()
"""In a reward's place, where it did not come in time."""


def accuracy(prompt: str, response: str, answer: str) -> float:
    r"""1 where the last closed box after the thinking part is the gold answer, exactly; else 0.

    >>> accuracy("6x7=", r"\boxed{42}", "42"), accuracy("6x7=", "42", "42")
    (1.0, 0.0)
    """
    del prompt
    return float(is_equivalent(extract_answer(response), answer))


def math(prompt: str, response: str, answer: str) -> float:
    r"""1 where the last closed box after the thinking part is the gold answer, exactly or by
    math-verify (the strict grader of docs/verifier.md; extra `math`); else 0.

    By itself it starts a worker for each call; a run starts its workers once (`open_rewarder`).

    math("", r"\boxed{\sqrt{12}}", r"2\sqrt{3}")  # 1.0
    """
    with open_symbolic() as grader:
        return float(_graded(grader, [Problem("", prompt, answer)], [response]).value_b[0])


class Rewards(NamedTuple):
    """Of the responses of a batch: value_b float64, and where something says so not_scored_b, the
    rows of value 0 that the verifier could not judge."""

    value_b: np.ndarray
    not_scored_b: np.ndarray | None = None


class Rewarder(NamedTuple):
    """A reward as a run uses it: of_all(problems, responses) -> Rewards, and close() at its end."""

    of_all: Callable[[Sequence[Problem], Sequence[str]], Rewards]
    close: Callable[[], None]


def open_rewarder(reward: Reward, *, workers: int = 4, deadline_seconds: float = 60.0) -> Rewarder:
    """The reward by so many workers at a time: threads, all of a batch within the deadline
    (`reward_all`); for `math` processes, which live until close and have a deadline for each
    answer (`open_symbolic`).

    Errors: ConfigError for `math` without its extra.

    >>> rewarder = open_rewarder(accuracy)
    >>> rewarder.of_all([Problem("one", "6x7=", "42")], [r"\\boxed{42}"]).value_b.tolist()
    [1.0]
    """
    if reward is math:
        grader = open_symbolic(workers=workers)
        return Rewarder(functools.partial(_graded, grader), grader.close)
    own = functools.partial(reward_all, reward, workers=workers, deadline_seconds=deadline_seconds)
    return Rewarder(lambda problems, responses: Rewards(own(problems, responses)), lambda: None)


def _graded(grader: Grader, problems: Sequence[Problem], responses: Sequence[str]) -> Rewards:
    golds = (problem.answer for problem in problems)
    outcomes = [graded.outcome for graded in grader([*zip(responses, golds, strict=True)])]
    correct, not_scored = (
        np.array([one is wanted for one in outcomes])
        for wanted in (Outcome.CORRECT, Outcome.NOT_SCORED)
    )
    return Rewards(correct.astype(float), not_scored)


def reward_all(
    reward: Reward,
    problems: Sequence[Problem],
    responses: Sequence[str],
    *,
    workers: int = 4,
    deadline_seconds: float = 60.0,
) -> np.ndarray:
    """Rewards of responses to their problems, [B] float64.

    Args:
        reward: a function of (prompt, response, answer).
        problems, responses: B of each.
        workers: threads at a time.
        deadline_seconds: for all of them together.

    Errors: ConfigError naming the function, its file and line, and the problem, where a reward
    raised or is no finite number; DataError where one did not come within the deadline of all.
    """
    waiting = list(enumerate(zip(problems, responses, strict=True)))[::-1]
    found: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()

    def work() -> None:
        while waiting:
            try:
                row, (problem, response) = waiting.pop()
            except IndexError:  # another was quicker
                return
            try:
                found.put((row, reward(problem.prompt, response, problem.answer)))
            except (Exception, SystemExit) as error:  # told where it can be named
                found.put((row, error))

    for _ in range(min(workers, len(waiting))):  # daemons: one that hangs does not hold the process
        threading.Thread(target=work, daemon=True).start()
    values: dict[int, Any] = {}
    limit = time.monotonic() + deadline_seconds
    while len(values) < len(problems):
        try:
            row, value = found.get(timeout=max(0.0, limit - time.monotonic()))
        except queue.Empty:
            waiting.clear()
            break
        values[row] = value
    return np.array(
        [
            _value(reward, problem, values.get(n, LATE), deadline_seconds)
            for n, problem in enumerate(problems)
        ]
    )


def _value(reward: Reward, problem: Problem, value: Any, deadline_seconds: float) -> float:
    if value is LATE:
        raise DataError(
            f"{problem.id}: its reward did not come within {deadline_seconds:g} s"
            " (rollouts.reward_seconds); make it quicker, or bound it in a process of its own"
        )
    place = place_of(reward)
    if isinstance(value, BaseException):
        raise ConfigError(
            f"rl.reward: {raised_in(value) or place}: {first_line(value)}, of problem {problem.id};"
            " a reward makes a number of (prompt, response, answer), whatever the response"
        ) from value
    if getattr(value, "shape", None) == ():  # an array of one number, such as jnp.mean makes
        value = value.item()
    if not isinstance(value, int | float | np.number) or not np.isfinite(value):
        raise ConfigError(
            f"rl.reward: {place} made {_brief(value)} of problem {problem.id}; it must be a finite"
            " number"
        )
    return float(value)


def _brief(value: Any) -> str:
    return repr(value) if len(repr(value)) <= 100 else f"a {type(value).__name__}"


def overlong_penalty(length_b: np.ndarray, limit: int, buffer_tokens: int) -> np.ndarray:
    """0 up to limit - buffer tokens, then down to -1 at the limit, in a line (DAPO's soft overlong
    punishment, arXiv 2503.14476); 0 everywhere for a buffer of 0.

    >>> overlong_penalty(np.array([10, 15, 20]), limit=20, buffer_tokens=10).tolist()
    [0.0, -0.5, -1.0]
    """
    if not buffer_tokens:
        return np.zeros(len(length_b))
    return np.minimum(0.0, (limit - buffer_tokens - length_b) / buffer_tokens)


REWARDS = (accuracy, math)
