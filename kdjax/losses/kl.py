"""Token losses: how two next-token distributions are compared, in nats.

The argument order is (student, teacher) everywhere; q is the student's distribution, p the
teacher's.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kdjax.base import TokenLoss


def forward_kl(student_logp: jax.Array, teacher_logp: jax.Array) -> jax.Array:
    """KL(teacher || student) = sum_v p (log p - log q), in nats. [..., V], [..., V] -> [...]

    Its gradient with respect to the student's logits is q - p: cross-entropy with the teacher's
    soft targets (arXiv 2605.16826, the forward-KL column of the 2x2). It asks the student to cover
    every mode of the teacher. Zero-probability teacher entries (padded vocabulary) add exactly 0.

    >>> import jax.numpy as jnp
    >>> uniform, certain = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([1.0, 0.0]))
    >>> round(float(forward_kl(uniform, certain)), 4)
    0.6931
    """
    return _divergence(teacher_logp, student_logp)


def reverse_kl(student_logp: jax.Array, teacher_logp: jax.Array) -> jax.Array:
    """KL(student || teacher) = sum_v q (log q - log p), in nats. [..., V], [..., V] -> [...]

    Its gradient with respect to the student's logits is q_i ((log q_i - log p_i) - KL): REINFORCE
    with the dense reward log p - log q, summed over the vocabulary (arXiv 2605.16826, the
    reverse-KL column). It asks the student to put its mass where the teacher has some. Infinite
    where the student has mass on an entry that the teacher excludes.

    >>> import jax.numpy as jnp
    >>> uniform, skewed = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.75, 0.25]))
    >>> round(float(reverse_kl(uniform, skewed)), 4)
    0.1438
    """
    return _divergence(student_logp, teacher_logp)


@jax.custom_jvp
def _divergence(first_logp: jax.Array, second_logp: jax.Array) -> jax.Array:
    """KL(first || second) as sum_v a (log a - log b) - a + b: no term is below 0. [..., V] -> [...]

    The sums of a and of b are both 1, so they add nothing to the value; but they take the rounding
    of the log-softmax out of it, entry by entry. The derivatives are a (log a - log b) by log a and
    b - a by log b: identical inputs give exactly 0 in value and in gradient, where the plain sum
    leaves p (1 - sum p), noise that Adam scales up to whole steps near convergence.
    """
    return jnp.sum(sum(_terms(first_logp, second_logp)), axis=-1)


def _terms(first_logp: jax.Array, second_logp: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(a (log a - log b), b - a). Entries where a is 0 or subnormal (padding, underflow): (0, b).

    b - a comes from the log-ratio, since the compiler may round two exponentials of one number
    differently.
    """
    first = jnp.exp(first_logp)
    possible = first >= jnp.finfo(first.dtype).tiny
    log_ratio = jnp.where(possible, first_logp - second_logp, 0.0)
    difference = jnp.where(possible, first * jnp.expm1(-log_ratio), jnp.exp(second_logp))
    return first * log_ratio, difference


@_divergence.defjvp
def _divergence_jvp(primals, tangents):
    by_first, by_second = _terms(*primals)
    value = jnp.sum(by_first + by_second, axis=-1)
    return value, jnp.sum(by_first * tangents[0] + by_second * tangents[1], axis=-1)


TOKEN_LOSSES: tuple[TokenLoss, ...] = (forward_kl, reverse_kl)
