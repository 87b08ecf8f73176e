r"""Tasks: procedural, verifiable arithmetic, deterministic in (task, split, index), whose splits
can't overlap.

A task makes of a random generator and a number of terms a prompt, a gold answer, one of many right
worked solutions, and for some what only the teacher is told. Randomness comes from a counter-based
generator (Philox) keyed by (task, split) at counter `index`, and a prompt belongs to exactly one
split by the hash of its text: drawing again until the hash agrees makes an overlap impossible by
construction, however many problems are drawn.

    >>> problem("calc", "train", 0, (3,)) == problem("calc", "train", 0, (3,))
    True
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from kdjax.base import Problem
from kdjax.data.tasks import calc, chainsum, lastdigit, recheck, shown, words
from kdjax.errors import ConfigError

Make = Callable[[np.random.Generator, int], tuple[str, ...]]

TASKS: dict[str, Make] = {
    "calc": calc.make,
    "lastdigit": lastdigit.make,
    "chainsum": chainsum.make,
    "recheck": recheck.make,
    "words": words.make,
    "shown": shown.make,
}

OF_CALC: dict[str, Callable[[str], str]] = {"words": words.in_signs, "shown": shown.bare}
"""The tasks that put calc's chains otherwise -> the chain as calc asks it."""

SPLITS = {"train": 0.8, "heldout": 0.1, "test": 0.1}
"""Shares of all prompts: for training, for the curriculum's gate, for evaluation."""


def problem(task: str, split: str, index: int, terms: Sequence[int]) -> Problem:
    """Problem `index` of a split, with a number of terms drawn evenly from `terms` (each 2 to 32).

    Errors: an unknown task or split, or terms out of range.
    """
    if task not in TASKS:
        raise ConfigError(f"unknown task {task!r}; there are {sorted(TASKS)}")
    if split not in SPLITS:
        raise ConfigError(f"unknown split {split!r}; there are {sorted(SPLITS)}")
    if not terms or min(terms) < 2 or max(terms) > 32:
        raise ConfigError(f"terms must be numbers from 2 to 32, got {tuple(terms)}")
    rng = np.random.Generator(
        np.random.Philox(key=_hash64(f"{task}/{split}"), counter=[0, 0, 0, index])
    )
    count = int(rng.choice(np.asarray(terms)))
    while True:
        prompt, answer, solution, *told = TASKS[task](rng, count)
        if split_of(task, prompt) == split:
            return Problem(f"{task}/{split}/{index}", prompt, answer, solution, "", *told)


def split_of(task: str, prompt: str) -> str:
    """The only split that a prompt can appear in; of calc's chains in words, or with their solution
    before them, it is calc's, on which the embedded models were trained."""
    if task in OF_CALC:
        task, prompt = "calc", OF_CALC[task](prompt)
    position = _hash64(f"{task}:{prompt}") / 2**64
    for name, share in SPLITS.items():
        position -= share
        if position < 0:
            return name
    return name


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
