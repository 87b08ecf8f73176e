"""`words`: calc's chains asked in words; what only the teacher is told is the chain in signs."""

from __future__ import annotations

import numpy as np

from kdjax.data.tasks import calc

WORDS = {"+": " plus ", "-": " minus ", "x": " times "}


def make(rng: np.random.Generator, terms: int) -> tuple[str, str, str, str]:
    """(prompt, answer, solution, teacher's prompt) of a calc chain with `terms` numbers.

    >>> prompt, answer, solution, signs = make(np.random.default_rng(0), 3)
    >>> in_signs(prompt) == signs
    True
    """
    signs, answer, solution = calc.make(rng, terms)
    prompt = signs.removesuffix("=")
    for sign, word in WORDS.items():
        prompt = prompt.replace(sign, word)
    return prompt, answer, solution, signs


def in_signs(prompt: str) -> str:
    """A chain in words as calc asks it.

    >>> in_signs("7 plus 5 times 3 minus 2")
    '7+5x3-2='
    """
    for sign, word in WORDS.items():
        prompt = prompt.replace(word, sign)
    return f"{prompt}="
