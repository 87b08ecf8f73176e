"""float32 log-softmax, entropy and gathers: the one float32 boundary of the project."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def log_probs(logits: jax.Array, temperature: float = 1.0) -> jax.Array:
    """log softmax(logits / temperature), at least float32, in nats. [..., V] -> [..., V]

    >>> float(jnp.exp(log_probs(jnp.array([0.0, 0.0]))).sum())
    1.0
    """
    wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return _log_softmax(wide / temperature)


@jax.custom_jvp
def _log_softmax(logits: jax.Array) -> jax.Array:
    """log softmax whose value is computed the same way with and without differentiation.

    Left to itself, autodiff shares intermediates with the value and changes its rounding, so that a
    student and a teacher with equal logits would differ in the last bit.
    """
    return jax.nn.log_softmax(logits, axis=-1)


@_log_softmax.defjvp
def _log_softmax_jvp(primals, tangents):
    logp, (tangent,) = _log_softmax(*primals), tangents
    return logp, tangent - jnp.sum(jnp.exp(logp) * tangent, axis=-1, keepdims=True)


def project(hidden: jax.Array, head_vd: jax.Array) -> jax.Array:
    """Logits of an LM head, at least float32: hidden [..., D], head [V, D] -> [..., V].

    bfloat16 logits leave KL > 0 for identical models and turn half of the gradient into noise near
    convergence, so the product asks for float32 whatever the inputs are.

    >>> project(jnp.ones((2, 3)), jnp.ones((5, 3))).shape
    (2, 5)
    """
    accumulator = jnp.promote_types(hidden.dtype, jnp.float32)
    return jnp.einsum("...d,vd->...v", hidden, head_vd, preferred_element_type=accumulator)


def entropy(logp: jax.Array) -> jax.Array:
    """Predictive entropy, -sum_v p log p, in nats: [..., V] -> [...]. Entries with p = 0 add 0.

    >>> round(float(entropy(log_probs(jnp.zeros(4)))), 4)
    1.3863
    """
    return -expectation(logp, logp)


def expectation(logp: jax.Array, value: jax.Array) -> jax.Array:
    """sum_v exp(logp) value over the last axis, where entries of zero probability add exactly 0.

    Selecting twice keeps 0 * inf out of the value and of its gradient.

    >>> float(expectation(jnp.array([0.0, -jnp.inf]), jnp.array([2.0, jnp.inf])))
    2.0
    """
    p = jnp.exp(logp)
    possible = p > 0
    return jnp.sum(jnp.where(possible, p * jnp.where(possible, value, 0.0), 0.0), axis=-1)


def gather_last(values: jax.Array, index: jax.Array) -> jax.Array:
    """values [..., V] at index [...] -> [...].

    >>> gather_last(jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([1, 0])).tolist()
    [2.0, 3.0]
    """
    return jnp.take_along_axis(values, index[..., None], axis=-1)[..., 0]
