r"""`recheck`: calc's chains with solutions of many modes, brief or long: lines are checked again.

Lines are calc's. Each may be repeated after a `?`, any number of times:

    7+5-3x2=    7+5=12;12-3=9,9x2=18;\boxed{18}
                7+5=12;?7+5=12,?7+5=12;12-3=9;?12-3=9,9x2=18;\boxed{18}
                7+5-3=9,9x2=18,\boxed{18}

The probability of a check is drawn once a solution, so that solutions are brief or long, and can
be told apart while they are read; whether sums are merged and which sign ends a line is drawn for
each line. A check is a copy, easy to continue for as long as there are tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kdjax.data.tasks import calc
from kdjax.data.tasks.worked import Term, apply_term, chain_text, merges

CHECK_HABITS = (0.0, 0.15, 0.6)
MERGE_PROBABILITY = 0.3
ENDS = ";,"


def make(rng: np.random.Generator, terms: int) -> tuple[str, str, str]:
    """(prompt, answer, solution) of a calc chain with `terms` numbers, every value in 0..99.

    >>> prompt, answer, solution = make(np.random.default_rng(0), 3)
    >>> solution.endswith("boxed{" + answer + "}")
    True
    """
    start, chain, value = calc.draw_chain(rng, terms)
    return chain_text(start, chain), str(value), solution_text(rng, start, chain)


def solution_text(rng: np.random.Generator, start: int, terms: Sequence[Term]) -> str:
    """A worked solution in a random style."""
    check = rng.choice(CHECK_HABITS)
    value, position, text = start, 0, ""
    while position < len(terms):
        count = 2 if merges(rng, terms[position:], MERGE_PROBABILITY) else 1
        taken, before = terms[position : position + count], value
        for term in taken:
            value = apply_term(value, term)
        line, mark = f"{chain_text(before, taken)}{value}", ""
        while not mark or rng.random() < check:
            text += mark + line + ENDS[rng.integers(len(ENDS))]
            mark = "?"
        position += count
    return text + rf"\boxed{{{value}}}"
