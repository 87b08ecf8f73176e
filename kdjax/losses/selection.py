"""Reductions that rank the tokens of a response by what both models say of them.

They are called with the `Scores` of a first pass, which makes no gradient; the second pass, which
does, then reads the LM heads for the chosen tokens alone (`kdjax.step.score.scored_loss`). A rank
is within a response, so weights do not depend on how a batch is split.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kdjax.base import Objective, Reduction, Rollout, Scores
from kdjax.errors import ConfigError
from kdjax.losses.composition import composed
from kdjax.losses.reductions import require_share, weigh_by


def top_share(reduction: Reduction, by: Objective, share: float) -> Reduction:
    """The reduction over the share of each response's tokens (rounded up) where a quantity of the
    scores is largest; of equal ones the earlier.

    `top_share(sequence_mean, disagreement, 0.4)` ranks as DIAL-OPD (arXiv 2610.11659) does, by
    log-ratio and probability gap.

    >>> from kdjax.losses.objectives import student_entropy
    >>> from kdjax.losses.reductions import token_mean
    >>> mask, entropy = jnp.ones((1, 4), bool), jnp.array([[0.1, 0.9, 0.2, 0.9]])
    >>> scores = Scores(entropy, student_entropy=entropy, sampler_logp=entropy, mask=mask)
    >>> top_share(token_mean, student_entropy, 0.25)(mask, None, scores).tolist()
    [[0.0, 1.0, 0.0, 0.0]]
    """
    require_share("top_share", share)

    def weigh(mask: jax.Array, rollout: Rollout | None, scores: Scores) -> jax.Array:
        chosen = _first_ranks(by(scores), mask, jnp.ceil(share * mask.sum(-1, keepdims=True)))
        return weigh_by(reduction, chosen, rollout, scores)

    return composed(weigh, top_share, reduction, by, numbers=(share,))


def top_tokens(reduction: Reduction, by: Objective, count: int) -> Reduction:
    """The reduction over so many tokens of each response where a quantity of the scores is largest:
    its decisive tokens (arXiv 2609.04565 keeps one or two). Of equal ones the earlier.

    >>> from kdjax.losses.objectives import log_ratio, magnitude
    >>> from kdjax.losses.reductions import token_mean
    >>> top_tokens(token_mean, magnitude(log_ratio), 2).__name__
    'top_tokens(token_mean, magnitude(log_ratio), 2)'
    """
    if count < 1:
        raise ConfigError(f"top_tokens: count must be at least 1, got {count}")

    def weigh(mask: jax.Array, rollout: Rollout | None, scores: Scores) -> jax.Array:
        return weigh_by(reduction, _first_ranks(by(scores), mask, count), rollout, scores)

    return composed(weigh, top_tokens, reduction, by, numbers=(count,))


def top_either(
    reduction: Reduction, first: Objective, second: Objective, share: float
) -> Reduction:
    """The reduction over the share of each response's tokens where one quantity or the other is
    large: the largest a + b - a b, of both scaled to [0, 1] within the response.

    TIP (arXiv 2604.14084) keeps tokens where the student is unsure, and those where it is sure and
    far from the teacher: `top_either(sequence_mean, student_entropy, reverse_divergence, 0.5)`. Its
    scale is the batch's, which would depend on micro-batches.

    >>> from kdjax.losses.objectives import reverse_divergence, student_entropy
    >>> from kdjax.losses.reductions import token_mean
    >>> top_either(token_mean, student_entropy, reverse_divergence, 0.5).__name__
    'top_either(token_mean, student_entropy, reverse_divergence, 0.5)'
    """
    require_share("top_either", share)

    def weigh(mask: jax.Array, rollout: Rollout | None, scores: Scores) -> jax.Array:
        a, b = (_scaled(quantity(scores), mask) for quantity in (first, second))
        wanted = jnp.ceil(share * mask.sum(-1, keepdims=True))
        return weigh_by(reduction, _first_ranks(a + b - a * b, mask, wanted), rollout, scores)

    return composed(weigh, top_either, reduction, first, second, numbers=(share,))


def _first_ranks(value: jax.Array, mask: jax.Array, count) -> jax.Array:
    """The mask [B, T] of the `count` largest values of each row's mask; NaN comes last."""
    value = jnp.where(mask & ~jnp.isnan(value), value, -jnp.inf)
    # those outside the mask come after all inside it, whatever their value
    order = jnp.lexsort((-value, ~mask), axis=-1)
    rank = jnp.argsort(order, axis=-1)
    return mask & (rank < count)


def _scaled(value: jax.Array, mask: jax.Array) -> jax.Array:
    """Values of each row's mask from 0, its smallest, to 1, its largest; 0 where all are equal."""
    low = jnp.where(mask, value, jnp.inf).min(-1, keepdims=True)
    high = jnp.where(mask, value, -jnp.inf).max(-1, keepdims=True)
    width = jnp.where(high > low, high - low, 1.0)
    return jnp.where(mask, (value - low) / width, 0.0)


REDUCTION_MAKERS: tuple[Callable, ...] = (top_share, top_tokens, top_either)
