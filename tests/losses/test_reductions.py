"""Weights that know more than the mask: prefixes of a response, and its most uncertain tokens."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import first_tokens, most_uncertain, sequence_mean, token_mean
from kdjax.base import Rollout
from kdjax.config.names import REDUCTIONS, parse
from kdjax.errors import ConfigError
from kdjax.losses.composition import describe

MASK = jnp.arange(6)[None] < jnp.array([6, 3, 0, 1])[:, None]
ENTROPY = jnp.asarray(np.random.default_rng(0).permutation(24).reshape(4, 6), jnp.float32)
NONE = jnp.zeros(4)
DRAWN = Rollout(NONE, NONE, NONE, NONE, NONE, entropy_bt=ENTROPY)


@pytest.mark.parametrize("reduction", [sequence_mean, token_mean])
def test_first_tokens_is_the_reduction_of_shorter_responses(reduction):
    """The weights of a mask that was cut; at the whole length nothing changes."""
    cut = MASK & (jnp.arange(6)[None] < 2)
    np.testing.assert_array_equal(first_tokens(reduction, 2)(MASK, DRAWN), reduction(cut))
    np.testing.assert_array_equal(first_tokens(reduction, 6)(MASK, DRAWN), reduction(MASK))


@pytest.mark.parametrize(("share", "count"), [(1.0, 10), (0.5, 5), (0.3, 3), (0.01, 1)])
def test_most_uncertain_keeps_that_share(share, count):
    """The tokens of the mask with most entropy, so many of them, and no others."""
    weights = np.asarray(most_uncertain(token_mean, share)(MASK, DRAWN))
    inside = np.sort(np.asarray(ENTROPY)[np.asarray(MASK)])
    kept = np.asarray(ENTROPY)[weights > 0]
    np.testing.assert_array_equal(np.sort(kept), inside[len(inside) - count :])


def test_most_uncertain_of_nothing():
    """Without a trained token all weights are 0; ties are kept together."""
    nothing = most_uncertain(token_mean, 0.5)(jnp.zeros((4, 6), bool), DRAWN)
    np.testing.assert_array_equal(nothing, 0)
    flat = DRAWN._replace(entropy_bt=jnp.ones((4, 6)))
    np.testing.assert_array_equal(most_uncertain(token_mean, 0.1)(MASK, flat), token_mean(MASK))


def test_they_nest_and_read_back():
    """A reduction of a reduction, from its own text."""
    nested = first_tokens(most_uncertain(sequence_mean, 0.5), 3)
    again = parse(describe(nested), REDUCTIONS)
    np.testing.assert_array_equal(again(MASK, DRAWN), nested(MASK, DRAWN))
    inner = most_uncertain(sequence_mean, 0.5)(MASK & (jnp.arange(6)[None] < 3), DRAWN)
    np.testing.assert_array_equal(nested(MASK, DRAWN), inner)


def test_what_cannot_be():
    """Named in one line: an unknown entropy, a limit of 0, a share of 0, a fraction of a token."""
    with pytest.raises(ConfigError, match="use prefix student"):
        most_uncertain(token_mean, 0.5)(MASK, DRAWN._replace(entropy_bt=None))
    with pytest.raises(ConfigError, match="limit must be at least 1, got 0"):
        first_tokens(token_mean, 0)
    with pytest.raises(ConfigError, match=r"share must be in \(0, 1\], got 0"):
        most_uncertain(token_mean, 0)
    with pytest.raises(ConfigError, match="limit must be a whole number"):
        parse("first_tokens(token_mean, 1.5)", REDUCTIONS)
