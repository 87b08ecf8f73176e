r"""`recheck`: calc's chains worked by someone who slips, notices, and looks twice: many modes.

Lines are calc's, and each is written again, after a `?`, as long as it is wrong, or by chance:

    7+5-3x2=    7+5=12;12-3=9,9x2=18;\boxed{18}
                7+5=17,?5+7=12;?7+5=12;12-3=9,9x2=18;\boxed{18}
                7+5-3=9;?7+5-3=9;9x2=18,\boxed{18}

A solution has a habit of checking, so that whole solutions are brief or long; what is merged, which
operand stands first and how a line ends are chances of each line. The teacher thus knows how to go
on from an error, its own or a student's, and a student that can't get a line right may go on
checking it until its tokens end.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kdjax.tasks import calc
from kdjax.tasks.worked import Term, apply_term, chain_text, merges

CHECK_HABITS = (0.0, 0.15, 0.4)
MERGE_PROBABILITY = 0.3
SLIP_PROBABILITY = 0.05
SWAP_PROBABILITY = 0.3
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
    """A worked solution in a random style; a wrong line is always followed by another try."""
    check = rng.choice(CHECK_HABITS)
    value, position, text = start, 0, ""
    while position < len(terms):
        count = 2 if merges(rng, terms[position:], MERGE_PROBABILITY) else 1
        taken = terms[position : position + count]
        right = value
        for term in taken:
            right = apply_term(right, term)
        found, mark = -1, ""
        while found != right or rng.random() < check:
            found = _slip(rng, right) if rng.random() < SLIP_PROBABILITY else right
            text += f"{mark}{_left_side(rng, value, taken)}{found}{rng.choice(list(ENDS))}"
            mark = "?"
        value, position = right, position + count
    return text + rf"\boxed{{{value}}}"


def _left_side(rng: np.random.Generator, value: int, taken: Sequence[Term]) -> str:
    """The line up to its equals sign; one sum or product may have its operands swapped."""
    (operator, operand), *more = taken
    if not more and operator in "+x" and rng.random() < SWAP_PROBABILITY:
        return chain_text(operand, [(operator, value)])
    return chain_text(value, taken)


def _slip(rng: np.random.Generator, right: int) -> int:
    """The number with one of its two digits wrong, in 0..99."""
    unit = 10 ** int(rng.integers(2))
    digit = right // unit % 10
    return right + unit * (int((digit + rng.integers(1, 10)) % 10) - digit)
