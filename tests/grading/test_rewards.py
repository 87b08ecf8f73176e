"""Rewards: the accuracy of a task, functions that misbehave, the penalty of long responses."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from kdjax.base import Problem
from kdjax.errors import KdjaxError
from kdjax.grading.rewards import accuracy, overlong_penalty, reward_all

PROBLEMS = [Problem(f"p/{n}", f"{n}+1=", str(n + 1)) for n in range(6)]


def test_accuracy():
    r"""1 for the gold answer in the last closed box after thinking, 0 for anything else."""
    assert accuracy("", r"<think>\boxed{1}</think>\boxed{07}", "7") == 1.0
    for response in (r"\boxed{8}", "7", r"\boxed{7", r"\boxed{3+4}", ""):
        assert accuracy("", response, "7") == 0.0


def test_rewards_are_in_order():
    """However long each takes; a function of the user's own sees prompt, response and answer."""

    def slow_first(prompt, response, answer):
        time.sleep(0.05 if prompt.startswith("0") else 0)
        return len(response) + int(answer) / 10

    made = reward_all(slow_first, PROBLEMS, ["x" * n for n in range(6)])
    np.testing.assert_allclose(made, [n + (n + 1) / 10 for n in range(6)])


def test_an_array_of_one_number_is_a_number():
    assert reward_all(lambda p, r, a: np.asarray(0.5), PROBLEMS[:1], [""]).tolist() == [0.5]


def test_workers_are_bounded():
    """No more at a time than asked for."""
    running, most, lock = 0, 0, threading.Lock()

    def counted(prompt, response, answer):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= 1
        return 0.0

    reward_all(counted, PROBLEMS * 3, [""] * 18, workers=2)
    assert most == 2


HERE = r"^rl.reward: {} \(.*test_rewards.py:\d+\)"


def raising(prompt, response, answer):
    raise ZeroDivisionError("oh")


@pytest.mark.parametrize(
    ("reward", "says"),
    [
        (raising, HERE.format("raising") + ": ZeroDivisionError: oh, of problem p/0; a reward"),
        (lambda p, r, a: sys.exit(0), HERE.format("<lambda>") + ": SystemExit: 0, of problem p/0"),
        (lambda p, r, a: None, HERE.format("<lambda>") + " made None of problem p/0; it must be"),
        (lambda p, r, a: float("nan"), HERE.format("<lambda>") + " made nan of problem p/0"),
        (lambda p, r, a: np.ones(3), HERE.format("<lambda>") + r" made array\(.* of problem p/0"),
        (lambda p, r, a: time.sleep(1.5), "p/0: its reward did not come within 0.1 s"),
    ],
)
def test_a_reward_that_misbehaves_is_named(reward, says):
    """One line with the problem, function, file and line; a hanging one does not hold the run."""
    began = time.perf_counter()
    with pytest.raises(KdjaxError, match=says):
        reward_all(reward, PROBLEMS, [""] * 6, deadline_seconds=0.1)
    assert time.perf_counter() - began < 1.4


def test_a_hanging_reward_does_not_hold_the_process():
    """The error is told, and the process ends."""
    code = """
import time
from kdjax.base import Problem
from kdjax.errors import DataError
from kdjax.grading.rewards import reward_all
try:
    reward_all(lambda *a: time.sleep(1000), [Problem("p", "", "")], [""], deadline_seconds=0.1)
except DataError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("p: its reward did not come within 0.1 s")


def test_overlong_penalty():
    """Nothing without a buffer, and -1 at the limit."""
    lengths = np.array([1, 48, 56, 64])
    np.testing.assert_array_equal(overlong_penalty(lengths, 64, 0), 0)
    np.testing.assert_allclose(overlong_penalty(lengths, 64, 16), [0, 0, -0.5, -1])
