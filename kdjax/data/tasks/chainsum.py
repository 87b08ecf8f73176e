"""`chainsum`, the control: signed sums of two-digit numbers, where steps are not needed."""

from __future__ import annotations

import numpy as np

from kdjax.data.tasks.worked import Term, apply_term, chain_text, solution_text


def make(rng: np.random.Generator, terms: int) -> tuple[str, str, str]:
    """(prompt, answer, solution) of a signed sum with `terms` numbers from 10 to 99.

    >>> prompt, answer, solution = make(np.random.default_rng(0), 4)
    >>> eval(prompt[:-1]) == int(answer)
    True
    """
    start = value = int(rng.integers(10, 100))
    chain: list[Term] = []
    for _ in range(terms - 1):
        chain.append(("+-"[rng.integers(2)], int(rng.integers(10, 100))))
        value = apply_term(value, chain[-1])
    return chain_text(start, chain), str(value), solution_text(rng, start, chain)
