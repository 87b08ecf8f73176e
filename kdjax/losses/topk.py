"""A teacher known by its k most probable tokens: k buckets of one token and a tail of the rest."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kdjax.base import TopK


def top_k(logp: jax.Array, k: int) -> TopK:
    """The k most probable tokens of log-probabilities [..., V].

    >>> top_k(jnp.log(jnp.array([0.2, 0.7, 0.1])), 2).ids.tolist()
    [1, 0]
    """
    values, ids = jax.lax.top_k(logp, k)
    return TopK(ids, values, _log_sum_without(logp, ids))


def buckets(student_logits: jax.Array, teacher: TopK) -> tuple[jax.Array, jax.Array]:
    """Both models' logits over the k + 1 buckets: [..., V], [..., k] -> [..., k + 1] twice.

    >>> student, teacher = buckets(jnp.zeros(4), top_k(jnp.log(jnp.array([0.0, 0.25, 0.75])), 1))
    >>> (jax.nn.softmax(student).round(2).tolist(), jax.nn.softmax(teacher).round(2).tolist())
    ([0.25, 0.75], [0.75, 0.25])
    """
    named = jnp.take_along_axis(student_logits, teacher.ids, axis=-1)
    tail = _log_sum_without(student_logits, teacher.ids)
    both = (named, tail), (teacher.logp, teacher.tail_logp)
    student, theirs = (jnp.concatenate([k, rest[..., None]], axis=-1) for k, rest in both)
    return student, theirs


def _log_sum_without(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """logsumexp of logits [..., V] at other places than ids; -inf, with gradient 0, if none."""
    rest = jnp.put_along_axis(logits, ids, -jnp.inf, axis=-1, inplace=False)
    left = jnp.isfinite(rest).any(-1)
    total = jax.nn.logsumexp(jnp.where(left[..., None], rest, 0.0), axis=-1)
    return jnp.where(left, total, -jnp.inf)
