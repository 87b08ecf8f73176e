"""GRPO as pieces: rewards of a group become advantages, and a clipped surrogate follows them.

arXiv 2402.03300. The surrogate is an objective like any other, over the same `Scores`: it mixes
with divergences to a teacher, and is trained by the same step.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.base import Objective, Scores
from kdjax.losses.composition import Number, composed, composition_of, require, walk

GroupAdvantage = Callable[[np.ndarray], np.ndarray]
"""Rewards [groups, samples] -> advantages of the same shape, that sum to 0 in each group; 0 in a
group without signal (`have_signal`)."""

ROUNDING = 1e-6  # of the largest reward: some units in the last place of a float32


def have_signal(rewards_gs: np.ndarray) -> np.ndarray:
    """Which groups have rewards that differ by more than rounding: [groups, samples] -> [groups].
    Sums of parts that are equal but for their last bits are equal.

    >>> have_signal(np.array([[1.0, 0.0, 0.0], [0.1 + 0.2, 0.3, 0.3]])).tolist()
    [True, False]
    """
    rewards = np.asarray(rewards_gs, np.float64)
    return np.ptp(rewards, axis=1) > ROUNDING * np.abs(rewards).max(axis=1)


def standardized(reward_gs: np.ndarray) -> np.ndarray:
    """(r - mean) / deviation of each group (GRPO). The deviation is that of the group itself
    (division by G, not by G - 1, which makes advantages sqrt((G - 1) / G) smaller).

    >>> standardized(np.array([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])).tolist()
    [[1.0, -1.0, -1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]
    """
    rewards = centered(reward_gs)
    deviation = rewards.std(axis=1, keepdims=True)
    return np.divide(rewards, deviation, out=np.zeros_like(rewards), where=deviation > 0)


def centered(reward_gs: np.ndarray) -> np.ndarray:
    """r - mean of each group: without the division a group of rare success does not weigh more
    (Dr. GRPO, arXiv 2503.20783).

    >>> centered(np.array([[1.0, 0.0]])).tolist()
    [[0.5, -0.5]]
    """
    rewards = np.asarray(reward_gs, np.float64)
    differ = have_signal(rewards)[:, None]
    return np.where(differ, rewards - rewards.mean(axis=1, keepdims=True), 0.0)


def leave_one_out(reward_gs: np.ndarray) -> np.ndarray:
    """r - the mean of the group's other samples: an unbiased baseline (RLOO, arXiv 2402.14740).

    >>> leave_one_out(np.array([[1.0, 0.0, 0.0]])).tolist()
    [[1.0, -0.5, -0.5]]
    """
    samples = np.shape(reward_gs)[1]
    return centered(reward_gs) * samples / (samples - 1)


def clipped_surrogate(low: Number, high: Number | None = None) -> Objective:
    """- min(r A, clip(r, 1 - low, 1 + high) A) with r = q(token) / q_old(token), A the advantage;
    high is low unless it is given (asymmetric: DAPO's clip-higher, arXiv 2503.14476).

    q_old is the student that drew the responses; where a rollout is trained on once and at once it
    is the student itself, r is 1, and the gradient is that of REINFORCE with A.

    >>> clipped_surrogate(0.2, 0.28).__name__
    'clipped_surrogate(0.2, 0.28)'
    """
    upper = low if high is None else high
    require("clipped_surrogate: low", low, lambda x: 0 <= x <= 1, "in [0, 1]")
    require("clipped_surrogate: high", upper, lambda x: x >= 0, "at least 0")

    def surrogate(scores: Scores) -> jax.Array:
        advantage = group_advantage(scores)
        old = jax.lax.stop_gradient(scores.student_logp)
        old = old if scores.old_logp is None else scores.old_logp
        ratio = jnp.exp(scores.student_logp - old)
        return -jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - low, 1 + upper) * advantage)

    numbers = (low,) if high is None else (low, high)
    return composed(surrogate, clipped_surrogate, numbers=numbers)


def importance(objective: Objective, maximum: Number) -> Objective:
    """min(ratio, maximum) * objective, ratio = q(token) / sampler(token) as a constant: what was
    drawn by older weights, by another program, or from a cut or tempered distribution, weighs as if
    the student had drawn it (truncated importance sampling, Ionides 2008).

    Around a `clipped_surrogate`, whose own ratio is to the student that drew, q is that student.

    >>> from kdjax.losses.objectives import divergence
    >>> importance(divergence, 2.0).__name__
    'importance(divergence, 2.0)'
    """
    require("importance: maximum", maximum, lambda m: m > 0, "above 0")
    made = (composition_of(one) for one in walk(objective))
    of_old = any(c is not None and c.combinator is clipped_surrogate for c in made)

    def weighed(scores: Scores) -> jax.Array:
        known = scores.old_logp if of_old else None
        own = jax.lax.stop_gradient(scores.student_logp) if known is None else known
        return jnp.minimum(jnp.exp(own - scores.sampler_logp), maximum) * objective(scores)

    return composed(weighed, importance, objective, numbers=(maximum,))


def group_advantage(scores: Scores) -> jax.Array:
    """The advantage of a token's response in its group, [B, T]: an advantage to compose, such as
    `policy_gradient(add(group_advantage, scale(log_ratio, 0.1)))`."""
    return scores.known("advantage")


def negative_entropy(scores: Scores) -> jax.Array:
    """- the student's predictive entropy, [B, T] in nats: `scale(negative_entropy, 0.01)` is an
    entropy bonus, exact over the vocabulary."""
    return -scores.student_entropy


OBJECTIVES: tuple[Objective, ...] = (group_advantage, negative_entropy)
OBJECTIVE_MAKERS: tuple[Callable, ...] = (clipped_surrogate, importance)
GROUP_ADVANTAGES: tuple[GroupAdvantage, ...] = (standardized, centered, leave_one_out)
