"""A teacher known by its k most probable tokens: k buckets of one token and a tail of the rest."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class TopK(NamedTuple):
    """ids int [..., k], distinct, and their log-probabilities [..., k] over the whole vocabulary.

    The rest of the mass is one tail bucket. Merging tokens never raises a divergence: KLs between
    the k + 1 buckets are at most those over the vocabulary, and equal at k = V.
    """

    ids: jax.Array
    logp: jax.Array


def top_k(logp: jax.Array, k: int) -> TopK:
    """The k most probable tokens of log-probabilities [..., V].

    >>> top_k(jnp.log(jnp.array([0.2, 0.7, 0.1])), 2).ids.tolist()
    [1, 0]
    """
    values, ids = jax.lax.top_k(logp, k)
    return TopK(ids, values)


def buckets(student_logits: jax.Array, teacher: TopK) -> tuple[jax.Array, jax.Array]:
    """Both models' logits over the k + 1 buckets: [..., V], [..., k] -> [..., k + 1] twice.

    >>> student, teacher = buckets(jnp.zeros(4), TopK(jnp.array([2]), jnp.log(jnp.array([0.75]))))
    >>> (jax.nn.softmax(student).round(2).tolist(), jax.nn.softmax(teacher).round(2).tolist())
    ([0.25, 0.75], [0.75, 0.25])
    """
    named = jnp.take_along_axis(student_logits, teacher.ids, axis=-1)
    rest = jnp.put_along_axis(student_logits, teacher.ids, -jnp.inf, axis=-1, inplace=False)
    tail = _log_sum(rest)
    teacher_tail = jnp.log(jnp.maximum(1.0 - jnp.exp(teacher.logp).sum(-1, keepdims=True), 0.0))
    some_left = jnp.isfinite(tail)
    teacher_tail = jnp.where(some_left, teacher_tail, -jnp.inf)  # no tail at k = V, only rounding
    return jnp.concatenate([named, tail], -1), jnp.concatenate([teacher.logp, teacher_tail], -1)


def _log_sum(logits: jax.Array) -> jax.Array:
    """logsumexp over the last axis, kept; -inf with gradient 0 where nothing is left."""
    left = jnp.isfinite(logits).any(-1, keepdims=True)
    total = jax.nn.logsumexp(jnp.where(left, logits, 0.0), axis=-1, keepdims=True)
    return jnp.where(left, total, -jnp.inf)
