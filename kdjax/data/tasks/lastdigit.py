"""`lastdigit`: an affine chain modulo the prime 97, where working step by step is needed.

Sums can be computed without steps; long chains of products can't, so a model that answers at once
stays near chance (1 in 97).
"""

from __future__ import annotations

import numpy as np

from kdjax.data.tasks.worked import Term, apply_term, chain_text, solution_text

PRIME = 97


def make(rng: np.random.Generator, terms: int) -> tuple[str, str, str]:
    """(prompt, answer, solution) of a chain with `terms` numbers, every step reduced modulo 97.

    >>> prompt, answer, solution = make(np.random.default_rng(0), 4)
    >>> 0 <= int(answer) < 97
    True
    """
    start = int(rng.integers(0, PRIME))
    chain: list[Term] = []
    for _ in range(terms - 1):
        operator = "+-xx"[rng.integers(4)]
        chain.append((operator, int(rng.integers(2, 10))))
    value = start
    for term in chain:
        value = _step(value, term)
    return chain_text(start, chain), str(value), solution_text(rng, start, chain, step=_step)


def _step(value: int, term: Term) -> int:
    return apply_term(value, term) % PRIME
