"""A teacher known by its k most probable tokens: k buckets of one token and a tail of the rest."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kdjax.base import TopK

BY_TOP_K = ("divergence", "forward_kl", "reverse_kl", "top1_agreement", "teacher_top1")
"""The `Scores` of a teacher that are known from its top k."""

BY_SAMPLED = (*BY_TOP_K, "teacher_logp", "residual")
"""Those that are known where it also says the sampled token's log-probability."""

TAIL_FLOOR = 1e-6
"""The least mass of a tail that is 1 - sum(p), as engines say no tail: less is their rounding, and
of a tail of 0 reverse KL would be infinite."""


def top_k(logp: jax.Array, k: int) -> TopK:
    """The k most probable tokens of log-probabilities [..., V].

    >>> top_k(jnp.log(jnp.array([0.2, 0.7, 0.1])), 2).ids.tolist()
    [1, 0]
    """
    values, ids = jax.lax.top_k(logp, k)
    return TopK(ids, values, _log_sum_without(logp, ids))


def residual(student_logits: jax.Array, teacher: TopK, targets: jax.Array) -> jax.Array:
    """What the sampled token says of the difference that the tail's one bucket hides: log q - log p
    of it, each among the tail's tokens alone; 0 of a named token. [..., V], [...] -> [...] in nats.

    Its mean over tokens drawn from q is the reverse KL of the vocabulary less that of the buckets,
    and the mean of it times the gradient of log q(token) is the difference of their gradients,
    whatever the tail's mass is said to be (`objectives.tail_residual`).

    >>> teacher = top_k(jnp.log(jnp.array([0.5, 0.4, 0.1])), 1)._replace(sampled_logp=jnp.log(0.1))
    >>> round(float(residual(jnp.zeros(3), teacher, jnp.array(2))), 3)  # log 1/2 - log 1/5
    0.916
    """
    named = (teacher.ids == targets[..., None]).any(-1)
    assert teacher.sampled_logp is not None
    tail = _log_sum_without(student_logits, teacher.ids)
    own = jnp.take_along_axis(student_logits, targets[..., None], axis=-1)[..., 0]
    return jnp.where(named, 0.0, (own - tail) - (teacher.sampled_logp - teacher.tail_logp))


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
