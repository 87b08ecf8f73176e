"""`shown`: calc's chains, three of four with their worked solution before them."""

from __future__ import annotations

import numpy as np

from kdjax.data.tasks import calc

SHARE = 0.75
"""Of the prompts that show the solution."""


def make(rng: np.random.Generator, terms: int) -> tuple[str, str, str]:
    r"""(prompt, answer, solution) of a calc chain with `terms` numbers.

    >>> made = (make(np.random.default_rng(seed), 3) for seed in range(8))
    >>> {prompt.removesuffix(bare(prompt)) in ("", f"{told}\n") for prompt, _, told in made}
    {True}
    """
    prompt, answer, solution = calc.make(rng, terms)
    shows = rng.random() < SHARE
    return f"{solution}\n{prompt}" if shows else prompt, answer, solution


def bare(prompt: str) -> str:
    r"""The question alone.

    >>> bare("1+2=3;\\boxed{3}\n1+2=")
    '1+2='
    """
    return prompt.rpartition("\n")[2]
