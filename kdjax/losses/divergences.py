"""Token losses beyond the two KLs: other ways to compare next-token distributions, in nats.

q is the student's distribution, p the teacher's. Each function here returns a `TokenLoss`, or is
one, and is differentiated automatically through the logits of a chunk (kdjax/step/head.py). Entries
that both exclude (padding) add nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kdjax.base import TokenLoss
from kdjax.losses.composition import Number, composed, require
from kdjax.losses.kl import forward_kl, reverse_kl
from kdjax.losses.topk import buckets, top_k
from kdjax.numerics import nucleus


def jensen_shannon(beta: Number) -> TokenLoss:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q: [..., V] twice ->
    [...]. Symmetric at 0.5; divided by beta it is forward KL for beta -> 0, divided by 1 - beta
    reverse KL for beta -> 1 (GKD, arXiv 2306.13649).

    >>> p, q = jnp.log(jnp.array([[0.9, 0.1], [0.2, 0.8]]))
    >>> bool(jnp.isclose(jensen_shannon(0.5)(q, p), jensen_shannon(0.5)(p, q)))
    True
    """
    require("jensen_shannon: beta", beta, lambda b: 0 < b < 1, "in (0, 1)")

    def loss(student_logp: jax.Array, teacher_logp: jax.Array) -> jax.Array:
        middle = _mixture(teacher_logp, student_logp, beta)
        return beta * forward_kl(middle, teacher_logp) + (1 - beta) * forward_kl(
            middle, student_logp
        )

    return composed(loss, jensen_shannon, numbers=(beta,))


def skew_forward_kl(alpha: Number) -> TokenLoss:
    """KL(p || alpha p + (1 - alpha) q): forward KL with a bounded gradient, itself at alpha 0
    (DistiLLM, arXiv 2402.03898).

    >>> skew_forward_kl(0.1).__name__
    'skew_forward_kl(0.1)'
    """
    require("skew_forward_kl: alpha", alpha, lambda a: 0 <= a < 1, "in [0, 1)")

    def loss(student_logp: jax.Array, teacher_logp: jax.Array) -> jax.Array:
        return forward_kl(_mixture(teacher_logp, student_logp, alpha), teacher_logp)

    return composed(loss, skew_forward_kl, numbers=(alpha,))


def skew_reverse_kl(alpha: Number) -> TokenLoss:
    """KL(q || alpha q + (1 - alpha) p): reverse KL with a bound, itself at alpha 0 (DistiLLM, arXiv
    2402.03898).

    >>> skew_reverse_kl(0.1).__name__
    'skew_reverse_kl(0.1)'
    """
    require("skew_reverse_kl: alpha", alpha, lambda a: 0 <= a < 1, "in [0, 1)")

    def loss(student_logp: jax.Array, teacher_logp: jax.Array) -> jax.Array:
        return reverse_kl(student_logp, _mixture(student_logp, teacher_logp, alpha))

    return composed(loss, skew_reverse_kl, numbers=(alpha,))


def total_variation(student_logp: jax.Array, teacher_logp: jax.Array) -> jax.Array:
    """sum |p - q| / 2, in [0, 1]: the bounded, symmetric one (f-distill, arXiv 2307.15190).

    >>> float(total_variation(jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([1.0, 0.0]))))
    0.5
    """
    return 0.5 * jnp.abs(jnp.exp(teacher_logp) - jnp.exp(student_logp)).sum(-1)


def alpha_divergence(alpha: Number) -> TokenLoss:
    """(1 - sum p^a q^(1-a)) / (a (1 - a)), a in (0, 1): reverse KL for a -> 0, forward KL for
    a -> 1, four times the squared Hellinger distance at 0.5 (Amari).

    >>> far = jnp.log(jnp.array([1.0, 0.0])), jnp.log(jnp.array([0.0, 1.0]))
    >>> float(alpha_divergence(0.5)(*far))
    4.0
    """
    require("alpha_divergence: alpha", alpha, lambda a: 0 < a < 1, "in (0, 1)")

    def loss(student_logp: jax.Array, teacher_logp: jax.Array) -> jax.Array:
        q, p = jnp.exp(student_logp), jnp.exp(teacher_logp)
        possible = q >= jnp.finfo(q.dtype).tiny
        ratio = jnp.where(possible, teacher_logp - student_logp, 0.0)
        # a p + (1 - a) q - p^a q^(1-a), entry by entry: at least 0, exactly 0 where p = q
        terms = alpha * (p - q) - jnp.where(possible, q * jnp.expm1(alpha * ratio), -q)
        return terms.sum(-1) / (alpha * (1 - alpha))

    return composed(loss, alpha_divergence, numbers=(alpha,))


def adaptive_kl(head_mass: float) -> TokenLoss:
    """Forward and reverse KL, weighed by where p and q are apart: with g the sum of |p - q| over
    the head (the fewest tokens that hold head_mass of p; of equal ones the first) and h over the
    tail, (g forward + h reverse) / (g + h). Weights are constants (AKL, arXiv 2404.02657, with
    head_mass 0.5).

    >>> adaptive_kl(0.5).__name__
    'adaptive_kl(0.5)'
    """
    require("adaptive_kl: head_mass", head_mass, lambda m: 0 < m < 1, "in (0, 1)")

    def loss(student_logp: jax.Array, teacher_logp: jax.Array) -> jax.Array:
        q, p = (jax.lax.stop_gradient(jnp.exp(x)) for x in (student_logp, teacher_logp))
        apart = jnp.abs(p - q)
        head = jnp.where(_head(p, head_mass), apart, 0.0).sum(-1)
        total = apart.sum(-1)
        weight = jnp.where(total > 0, head / jnp.where(total > 0, total, 1.0), 0.5)
        forward, reverse = (f(student_logp, teacher_logp) for f in (forward_kl, reverse_kl))
        return weight * forward + (1 - weight) * reverse

    return composed(loss, adaptive_kl, numbers=(head_mass,))


def token_wise_kl(sharpness: Number) -> TokenLoss:
    """sum_v w p (log p - log q) + (1 - w) q (log q - log p) with w = sigmoid(sharpness (log p -
    log q)), a constant, at each entry of the vocabulary: forward KL lifts what the student gives
    too little, reverse KL lowers what it gives too much (ToDi, arXiv 2505.16297, sharpness 1).

    >>> token_wise_kl(1.0).__name__
    'token_wise_kl(1.0)'
    """
    require("token_wise_kl: sharpness", sharpness, lambda s: s >= 0, "at least 0")

    def loss(student_logp: jax.Array, teacher_logp: jax.Array) -> jax.Array:
        tiny = jnp.finfo(student_logp.dtype).tiny
        q, p = jnp.exp(student_logp), jnp.exp(teacher_logp)
        either = (q >= tiny) | (p >= tiny)
        ratio = jnp.where(either, teacher_logp - student_logp, 0.0)
        weight = jax.nn.sigmoid(sharpness * jax.lax.stop_gradient(ratio))
        forward = weight * p * jnp.where(p >= tiny, ratio, 0.0)
        reverse = (1 - weight) * q * jnp.where(q >= tiny, ratio, 0.0)
        return (forward - reverse).sum(-1)

    return composed(loss, token_wise_kl, numbers=(sharpness,))


def at_top_k(loss: TokenLoss, k: int) -> TokenLoss:
    """The loss between the teacher's k most probable tokens and a tail bucket of all others: exact
    at k = V, and of a KL never more than the whole (kdjax/losses/topk.py).

    >>> describe_it = at_top_k(forward_kl, 64)
    >>> describe_it.__name__
    'at_top_k(forward_kl, 64)'
    """
    require("at_top_k: k", k, lambda k: k >= 1, "at least 1")

    def coarse(student_logp: jax.Array, teacher_logp: jax.Array) -> jax.Array:
        size = min(k, teacher_logp.shape[-1])
        return loss(*buckets(student_logp, top_k(jax.lax.stop_gradient(teacher_logp), size)))

    return composed(coarse, at_top_k, loss, numbers=(k,))


def _head(p: jax.Array, mass: float) -> jax.Array:
    """Where the fewest tokens are that hold so much of p: [..., V] -> bool [..., V]."""
    least = nucleus(p, mass)[..., None]
    above, level = p > least, p == least
    missing = mass * p.sum(-1, keepdims=True) - jnp.where(above, p, 0.0).sum(-1, keepdims=True)
    before = jnp.cumsum(level, axis=-1) - level  # how many of the equal ones stand further ahead
    return above | (level & (before * least < missing))


def _mixture(first_logp: jax.Array, second_logp: jax.Array, weight: Number) -> jax.Array:
    """log(weight * first + (1 - weight) * second); -inf, with gradient 0, where both exclude."""
    first, second = first_logp + jnp.log(weight), second_logp + jnp.log1p(-weight)
    possible = jnp.isfinite(first) | jnp.isfinite(second)
    mixed = jnp.logaddexp(jnp.where(possible, first, 0.0), jnp.where(possible, second, 0.0))
    return jnp.where(possible, mixed, -jnp.inf)


TOKEN_LOSSES: tuple[TokenLoss, ...] = (total_variation,)
TOKEN_LOSS_MAKERS: tuple[Callable, ...] = (
    jensen_shannon,
    skew_forward_kl,
    skew_reverse_kl,
    alpha_divergence,
    adaptive_kl,
    token_wise_kl,
    at_top_k,
)
