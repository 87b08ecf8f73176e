r"""Worked solutions of chains in many right styles: steps merged and checked at random.

A chain is a start value and (operator, operand) terms applied from left to right. A solution walks
it:

    7+5x3-2=  ->  7+5=12;12x3=36;36-2=34;\boxed{34}
              or  7+5=12;?7+5=12;12x3=36;36-2=34;\boxed{34}     a checked step is written twice
              or, where neighbours are sums,  4+3-2=5;...        two terms in one step

The many styles give a teacher entropy, which a student keeps or loses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

Term = tuple[str, int]

MERGE_PROBABILITY = 0.25
CHECK_PROBABILITY = 0.12


def apply_term(value: int, term: Term) -> int:
    """One step of a calculator.

    >>> apply_term(7, ("x", 3))
    21
    """
    operator, operand = term
    return {"+": value + operand, "-": value - operand, "x": value * operand}[operator]


def chain_text(start: int, terms: Sequence[Term]) -> str:
    """The prompt's text.

    >>> chain_text(7, [("+", 5), ("x", 3)])
    '7+5x3='
    """
    return f"{start}" + "".join(f"{operator}{operand}" for operator, operand in terms) + "="


def solution_text(
    rng: np.random.Generator,
    start: int,
    terms: Sequence[Term],
    step: Callable[[int, Term], int] = apply_term,
) -> str:
    """A worked solution in a random style; only neighbouring sums and differences are merged."""
    value, position, text = start, 0, ""
    while position < len(terms):
        count = 2 if merges(rng, terms[position:], MERGE_PROBABILITY) else 1
        taken = terms[position : position + count]
        before = value
        for term in taken:
            value = step(value, term)
        line = chain_text(before, taken) + f"{value};"
        text += line + ("?" + line if rng.random() < CHECK_PROBABILITY else "")
        position += count
    return text + rf"\boxed{{{value}}}"


def merges(rng: np.random.Generator, terms: Sequence[Term], probability: float) -> bool:
    """Whether the first two terms are taken in one line: by chance, and only where both are sums or
    differences."""
    pair = terms[:2]
    return len(pair) == 2 and all(op in "+-" for op, _ in pair) and rng.random() < probability
