"""`calc`, the default: a calculator chain of + - x on integers kept in 0..99, step by step."""

from __future__ import annotations

import numpy as np

from kdjax.data.tasks.worked import Term, apply_term, chain_text, solution_text

LARGEST = 99
OPERATORS = ("+", "-", "x")


def make(rng: np.random.Generator, terms: int) -> tuple[str, str, str]:
    """(prompt, answer, solution) of a chain with `terms` numbers, every value in 0..99.

    >>> prompt, answer, solution = make(np.random.default_rng(0), 3)
    >>> solution.endswith("boxed{" + answer + "}")
    True
    """
    start, chain, value = draw_chain(rng, terms)
    return chain_text(start, chain), str(value), solution_text(rng, start, chain)


def draw_chain(rng: np.random.Generator, terms: int) -> tuple[int, list[Term], int]:
    """(start, the other terms, result) of a chain with `terms` numbers."""
    start = value = int(rng.integers(0, LARGEST + 1))
    chain: list[Term] = []
    for _ in range(terms - 1):
        term = _allowed_term(rng, value)
        chain.append(term)
        value = apply_term(value, term)
    return start, chain, value


def _allowed_term(rng: np.random.Generator, value: int) -> Term:
    while True:
        operator = OPERATORS[rng.integers(3)]
        term = (operator, int(rng.integers(2 if operator == "x" else 1, 10)))
        if 0 <= apply_term(value, term) <= LARGEST:
            return term
