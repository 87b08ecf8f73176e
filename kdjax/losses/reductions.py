"""Reductions: how tokens are weighed before totals are divided, and where masks meet a loss.

A `Reduction` knows the mask, and of the rollout whatever was known before the loss: position,
sampler's entropy. One that takes a third argument is given the `Scores` too, of a pass of their own
(kdjax/losses/selection.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kdjax.base import Objective, Reduction, Rollout, Scores, WeightedSum
from kdjax.errors import ConfigError
from kdjax.losses.composition import composed, composition_of


def sequence_mean(mask: jax.Array, rollout: Rollout | None = None) -> jax.Array:
    """The paper's: the mean over sequences of each one's token mean. [B, T] -> [B, T]

    Rows without a trained token weigh nothing and are not counted.

    >>> sequence_mean(jnp.array([[True, True], [True, False], [False, False]])).tolist()
    [[0.5, 0.5], [1.0, 0.0], [0.0, 0.0]]
    """
    del rollout
    length = jnp.sum(mask, axis=-1, keepdims=True)
    return jnp.where(mask, 1.0 / jnp.maximum(length, 1), 0.0)


def token_mean(mask: jax.Array, rollout: Rollout | None = None) -> jax.Array:
    """The mean over all trained tokens of the global batch. [B, T] -> [B, T]

    >>> token_mean(jnp.array([[True, True], [True, False]])).tolist()
    [[1.0, 1.0], [1.0, 0.0]]
    """
    del rollout
    return jnp.where(mask, 1.0, 0.0)


def reduce(loss_bt: jax.Array, mask_bt: jax.Array, weights_bt: jax.Array) -> WeightedSum:
    """sum of weights * loss over the mask, with the weights' sum: where masks meet a loss.

    It selects before it multiplies: NaN times 0 is NaN.

    >>> mask = jnp.array([[True, False]])
    >>> float(reduce(jnp.array([[2.0, jnp.nan]]), mask, token_mean(mask)).mean())
    2.0
    """
    return WeightedSum(jnp.sum(jnp.where(mask_bt, loss_bt, 0.0) * weights_bt), jnp.sum(weights_bt))


def reads_scores(reduction: Reduction) -> bool:
    """Whether a reduction, or one that it is composed of, has an argument `scores`: it weighs by
    what both models say of the tokens.

    >>> reads_scores(token_mean), reads_scores(lambda mask, rollout, scores: mask * scores.mask)
    (False, True)
    """
    composition = composition_of(reduction)
    if composition is not None:
        inner, *quantities = composition.functions
        return bool(quantities) or reads_scores(inner)
    try:
        return "scores" in inspect.signature(reduction).parameters
    except (TypeError, ValueError):  # of what was not written in Python
        return False


def ranked_by(reduction: Reduction) -> tuple[Reduction, list[Objective]]:
    """The innermost reduction of a composition, and the quantities that the others rank by.

    >>> ranked_by(first_tokens(token_mean, 1)) == (token_mean, [])
    True
    """
    composition = composition_of(reduction)
    if composition is None:
        return reduction, []
    inner, *quantities = composition.functions
    innermost, others = ranked_by(inner)
    return innermost, [*quantities, *others]


def weigh_by(
    reduction: Reduction, mask: jax.Array, rollout: Rollout | None, scores: Scores | None = None
) -> jax.Array:
    """The reduction's weights [B, T], given the scores where it reads them.

    >>> weigh_by(token_mean, jnp.array([[True, False]]), None).tolist()
    [[1.0, 0.0]]
    """
    return reduction(mask, rollout, scores) if reads_scores(reduction) else reduction(mask, rollout)


def require_share(name: str, share: float) -> None:
    """Errors: ConfigError, in the name of a maker, for a share of tokens outside (0, 1]."""
    if not 0 < share <= 1:
        raise ConfigError(f"{name}: share must be in (0, 1], got {share}")


def first_tokens(reduction: Reduction, limit: int) -> Reduction:
    """The reduction over response tokens 0 .. limit - 1 of each sequence: a loss on prefixes of
    what was drawn.

    >>> first_tokens(token_mean, 1)(jnp.array([[True, True]]), None).tolist()
    [[1.0, 0.0]]
    """
    if limit < 1:
        raise ConfigError(f"first_tokens: limit must be at least 1, got {limit}")

    def weigh(mask: jax.Array, rollout: Rollout | None = None, scores=None) -> jax.Array:
        return weigh_by(
            reduction, mask & (jnp.arange(mask.shape[1])[None] < limit), rollout, scores
        )

    return composed(weigh, first_tokens, reduction, numbers=(limit,))


def most_uncertain(reduction: Reduction, share: float) -> Reduction:
    """The reduction over the share of a batch's tokens where the student, as it drew them, had most
    entropy (TIP keeps a half). Ties at the border are kept; of micro-batches, each its own share.

    Errors: ConfigError for responses that the student did not draw, whose entropy is not known.

    >>> describe_it = most_uncertain(sequence_mean, 0.5)
    >>> describe_it.__name__
    'most_uncertain(sequence_mean, 0.5)'
    """
    require_share("most_uncertain", share)

    def weigh(mask: jax.Array, rollout: Rollout | None = None, scores=None) -> jax.Array:
        if rollout is None or rollout.entropy_bt is None:
            raise ConfigError(
                "most_uncertain: the entropy of who drew the responses is not known;"
                " use prefix student, drawn by this process"
            )
        entropy = jnp.where(mask, rollout.entropy_bt, -jnp.inf)
        ordered = jnp.sort(entropy, axis=None)[::-1]
        wanted = jnp.ceil(share * mask.sum()).astype(jnp.int32)
        least = ordered[jnp.maximum(wanted - 1, 0)]
        return weigh_by(reduction, mask & (entropy >= least), rollout, scores)

    return composed(weigh, most_uncertain, reduction, numbers=(share,))


def finished_only(reduction: Reduction) -> Reduction:
    """The reduction over responses that ended by themselves: those that the limit cut are masked
    (overlong filtering, arXiv 2503.14476).

    >>> finished_only(token_mean).__name__
    'finished_only(token_mean)'
    """

    def weigh(mask: jax.Array, rollout: Rollout, scores=None) -> jax.Array:
        return weigh_by(reduction, mask & ~rollout.truncated_b[:, None], rollout, scores)

    return composed(weigh, finished_only, reduction)


def except_stop(reduction: Reduction) -> Reduction:
    """The reduction without the stop token that ended a response: where student and teacher end
    differently, or a rank within the response should not be of how it ends.

    >>> except_stop(token_mean).__name__
    'except_stop(token_mean)'
    """

    def weigh(mask: jax.Array, rollout: Rollout, scores=None) -> jax.Array:
        last = jnp.arange(mask.shape[1])[None] == rollout.response_length_b[:, None] - 1
        stop = last & ~rollout.truncated_b[:, None]
        return weigh_by(reduction, mask & ~stop, rollout, scores)

    return composed(weigh, except_stop, reduction)


def with_signal(reduction: Reduction) -> Reduction:
    """The reduction over responses of groups whose rewards differ: the others are masked, and not
    counted in the mean either (DAPO's dynamic sampling, arXiv 2503.14476, for what redraws leave).

    >>> with_signal(token_mean).__name__
    'with_signal(token_mean)'
    """

    def weigh(mask: jax.Array, rollout: Rollout | None = None, scores=None) -> jax.Array:
        signal = None if rollout is None else rollout.signal_b
        if signal is None:
            raise ConfigError("with_signal: rewards need rl.group_size over 1, and prefix student")
        return weigh_by(reduction, mask & signal[:, None], rollout, scores)

    return composed(weigh, with_signal, reduction)


def paced(reduction: Reduction, power: float) -> Reduction:
    """The reduction's weights times (4 p (1 - p))^power, p the pass rate of the row's problem in
    its group: most where the student is neither sure of it nor without a chance (PACED).

    >>> paced(token_mean, 1.0).__name__
    'paced(token_mean, 1.0)'
    """
    if not power >= 0:
        raise ConfigError(f"paced: power must be at least 0, got {power}")

    def weigh(mask: jax.Array, rollout: Rollout, scores=None) -> jax.Array:
        rate = rollout.pass_rate_b
        if rate is None:
            raise ConfigError("paced: pass rates need rl.group_size over 1, and prefix student")
        return (
            weigh_by(reduction, mask, rollout, scores) * ((4 * rate * (1 - rate)) ** power)[:, None]
        )

    return composed(weigh, paced, reduction, numbers=(power,))


REDUCTIONS: tuple[Reduction, ...] = (sequence_mean, token_mean)
REDUCTION_MAKERS: tuple[Callable, ...] = (
    first_tokens,
    most_uncertain,
    finished_only,
    except_stop,
    with_signal,
    paced,
)
