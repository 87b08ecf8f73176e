"""The teacher's dense reward at a sampled token, and the objective that follows it.

An advantage is a function Scores -> [B, T], like an objective: the same combinators serve it. The
policy gradient of `log_ratio` is, in expectation over tokens that the student draws, the gradient
of reverse KL (arXiv 2605.16826): sampled-token on-policy distillation.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kdjax.base import Objective, Scores
from kdjax.errors import ConfigError
from kdjax.losses.composition import (
    Number,
    composed,
    require,
)


def divergence(scores: Scores) -> jax.Array:
    """The objective of distillation: the token loss itself, [B, T] in nats (arXiv 2605.16826)."""
    return scores.known("divergence")


def negative_log_likelihood(scores: Scores) -> jax.Array:
    """The objective of plain SFT: -log q(token), [B, T] in nats; forward KL to a one-hot target."""
    return -scores.student_logp


def forward_divergence(scores: Scores) -> jax.Array:
    """KL(teacher || student), [B, T] in nats, whatever the token loss is."""
    return scores.known("forward_kl")


def reverse_divergence(scores: Scores) -> jax.Array:
    """KL(student || teacher), [B, T] in nats, whatever the token loss is."""
    return scores.known("reverse_kl")


def tail_residual(scores: Scores) -> jax.Array:
    """What makes reverse KL to a teacher's top k that of the vocabulary, in expectation over tokens
    that the student draws, in value and gradient (ResOPD, arXiv 2610.04882):

        add(reverse_divergence, tail_residual)

    r (1 + log q(token) - its present value), r the constant `Scores.residual`: 0 of tokens among
    the k, and against a teacher whose whole vocabulary is known. Of rollouts that others drew:
    `importance(tail_residual, 2.0)`. Source: docs/methods.md has the derivation.

    >>> one = jnp.zeros(1)
    >>> float(tail_residual(Scores(one, one, one, one > 0, residual=one + 0.5))[0])
    0.5
    """
    if scores.residual is None and scores.teacher_entropy is not None:
        return jnp.zeros_like(scores.student_logp)
    moved = scores.student_logp - jax.lax.stop_gradient(scores.student_logp)
    return jax.lax.stop_gradient(scores.known("residual")) * (1 + moved)


def where_teacher_unsure(objective: Objective, entropy_nats: Number) -> Objective:
    """The objective at tokens where the teacher's entropy is at least so many nats, 0 elsewhere.

    EOPD, entropy-aware on-policy distillation, is reverse KL and beside it forward KL where the
    teacher has several continuations in mind:
    `add(reverse_divergence, where_teacher_unsure(forward_divergence, 0.5))`.

    >>> where_teacher_unsure(forward_divergence, 0.5).__name__
    'where_teacher_unsure(forward_divergence, 0.5)'
    """
    require("where_teacher_unsure: entropy_nats", entropy_nats, lambda h: h >= 0, "at least 0")

    def selected(scores: Scores) -> jax.Array:
        unsure = scores.known("teacher_entropy") >= entropy_nats
        return jnp.where(unsure, objective(scores), 0.0)

    return composed(selected, where_teacher_unsure, objective, numbers=(entropy_nats,))


def policy_gradient(advantage: Objective) -> Objective:
    """- advantage * log q(token), the advantage as a constant: REINFORCE at each sampled token.

    Tokens must be drawn from the student itself; `importance(policy_gradient(a), 2.0)` corrects
    what was drawn from elsewhere.

    >>> scores = Scores(*jnp.log(jnp.array([[0.5], [1.0], [1.0]])), mask=None,
    ...                 teacher_logp=jnp.log(jnp.array([0.25])))
    >>> round(float(policy_gradient(log_ratio)(scores)[0]), 3)
    -0.48
    """

    def followed(scores: Scores) -> jax.Array:
        return -jax.lax.stop_gradient(advantage(scores)) * scores.student_logp

    return composed(followed, policy_gradient, advantage)


def log_ratio(scores: Scores) -> jax.Array:
    """log p - log q of the sampled token, in nats: the reward of on-policy distillation."""
    return scores.known("teacher_logp") - scores.student_logp


def reference_log_ratio(scores: Scores) -> jax.Array:
    """log ref - log q of the sampled token, in nats: `policy_gradient(reference_log_ratio)` has the
    gradient of KL(student || reference) in expectation, which the k3 estimator has not."""
    return scores.known("reference_logp") - scores.student_logp


def student_entropy(scores: Scores) -> jax.Array:
    """The student's predictive entropy, [B, T] in nats: to rank tokens by; minimised, it makes the
    student surer of everything."""
    return scores.student_entropy


def disagreement(scores: Scores) -> jax.Array:
    """(p - q) (log p - log q) of the sampled token, at least 0: its term of Jeffreys' divergence,
    large where both the log-ratio and the probability that it is about are."""
    gap = jnp.exp(scores.known("teacher_logp")) - jnp.exp(scores.student_logp)
    return gap * log_ratio(scores)


def magnitude(advantage: Objective) -> Objective:
    """|a|: how far from 0 an advantage is, whichever way.

    >>> magnitude(log_ratio).__name__
    'magnitude(log_ratio)'
    """
    return composed(lambda scores: jnp.abs(advantage(scores)), magnitude, advantage)


def power_difference(exponent: Number) -> Objective:
    """p^a - q^a of the sampled token, bounded by 1 for every a > 0, where the log-ratio has no
    bound (PowerOPD); divided by a it is the log-ratio in the limit a -> 0.

    >>> power_difference(0.5).__name__
    'power_difference(0.5)'
    """
    require("power_difference: exponent", exponent, lambda a: a > 0, "above 0")

    def difference(scores: Scores) -> jax.Array:
        teacher = jnp.exp(exponent * scores.known("teacher_logp"))
        return teacher - jnp.exp(exponent * scores.student_logp)

    return composed(difference, power_difference, numbers=(exponent,))


def extrapolated(scale: Number) -> Objective:
    """scale (log p - log ref) - (log q - log ref) of the sampled token: the reward that the teacher
    has learnt over a reference, amplified (G-OPD). At scale 1 the reference drops out: log_ratio.

    >>> extrapolated(1.25).__name__
    'extrapolated(1.25)'
    """
    require("extrapolated: scale", scale, lambda s: s >= 0, "at least 0")

    def reward(scores: Scores) -> jax.Array:
        gained = scores.known("teacher_logp") - scores.known("reference_logp")
        return log_ratio(scores) + (scale - 1) * gained

    return composed(reward, extrapolated, numbers=(scale,))


def log_compressed(advantage: Objective) -> Objective:
    """sign(a) log(1 + |a|): the order of advantages stays, their tails do not.

    >>> log_compressed(log_ratio).__name__
    'log_compressed(log_ratio)'
    """

    def compressed(scores: Scores) -> jax.Array:
        value = advantage(scores)
        return jnp.sign(value) * jnp.log1p(jnp.abs(value))

    return composed(compressed, log_compressed, advantage)


def bounded(advantage: Objective, low: Number, high: Number) -> Objective:
    """The advantage, at least low and at most high.

    >>> bounded(log_ratio, -2.0, 2.0).__name__
    'bounded(log_ratio, -2.0, 2.0)'
    """

    if isinstance(low, int | float) and isinstance(high, int | float) and not low < high:
        raise ConfigError(f"bounded: low must be below high, got {low} and {high}")

    def between(scores: Scores) -> jax.Array:
        return jnp.clip(advantage(scores), low, high)

    return composed(between, bounded, advantage, numbers=(low, high))


OBJECTIVES: tuple[Objective, ...] = (
    divergence,
    negative_log_likelihood,
    forward_divergence,
    reverse_divergence,
    tail_residual,
    log_ratio,
    reference_log_ratio,
    student_entropy,
    disagreement,
)
OBJECTIVE_MAKERS: tuple[Callable, ...] = (
    where_teacher_unsure,
    policy_gradient,
    magnitude,
    power_difference,
    extrapolated,
    log_compressed,
    bounded,
)
