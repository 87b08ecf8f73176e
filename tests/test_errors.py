"""Errors: whose code raised, and a line of what."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from kdjax import errors
from kdjax.losses.combinators import mix
from kdjax.losses.kl import forward_kl

OWN = """
import jax.numpy as jnp
def branches(x, y):
    if x.sum() > 0:
        return x
def shapes(x, y):
    return jnp.dot(x, y)
"""


@pytest.mark.parametrize(("name", "line"), [("branches", 4), ("shapes", 7)])
def test_the_innermost_frame_of_theirs_is_named(tmp_path, name, line):
    """Through a combinator of ours, jit and grad of jax, whose tracebacks are filtered."""
    file, space = tmp_path / "own.py", {}
    exec(compile(OWN, str(file), "exec"), space)
    loss = mix(space[name], forward_kl, weight=0.5)
    with pytest.raises(Exception) as caught:  # noqa: PT011  of several kinds, by jax
        jax.jit(jax.grad(lambda x: loss(x, x).sum()))(jnp.ones((2, 3)))
    assert errors.raised_in(caught.value) == f"{name} ({file}:{line})"


def test_our_own_errors_are_not_theirs():
    """Of an error in this package there is no frame of theirs, but for what called it."""
    try:
        mix(forward_kl, forward_kl, weight=2)
    except errors.ConfigError as error:
        ours = error.with_traceback(error.__traceback__.tb_next)
    assert errors.raised_in(ours) == ""
    assert errors.first_line(ours) == "mix: weight must be in [0, 1], got 2"
