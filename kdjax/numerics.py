"""LM heads, float32 log-softmax, entropy and gathers: the one float32 boundary of the project."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LMHead:
    """How hidden states become logits: softcap tanh(scale h W^T / softcap), without softcap
    scale h W^T. The weight is [V, D]; scale and softcap are what a model family fixes."""

    weight_vd: jax.Array
    scale: float = dataclasses.field(default=1.0, metadata=dict(static=True))
    softcap: float | None = dataclasses.field(default=None, metadata=dict(static=True))


def project(hidden: jax.Array, head: LMHead) -> jax.Array:
    """Logits of an LM head, at least float32: hidden [..., D] -> [..., V].

    >>> project(jnp.ones((2, 3)), LMHead(jnp.ones((5, 3)), scale=0.5))[0, 0].item()
    1.5
    """
    return shape_logits(product(hidden, head.weight_vd.astype(hidden.dtype)), head)


def product(hidden: jax.Array, weight_vd: jax.Array) -> jax.Array:
    """h W^T, at least float32: hidden [..., D], weight [V, D] -> [..., V].

    bfloat16 logits leave KL > 0 for identical models and turn half of the gradient into noise near
    convergence, so the product asks for float32 whatever the inputs are.
    """
    accumulator = jnp.promote_types(hidden.dtype, jnp.float32)
    return jnp.einsum("...d,vd->...v", hidden, weight_vd, preferred_element_type=accumulator)


def shape_logits(logits: jax.Array, head: LMHead) -> jax.Array:
    """The head's scale and softcap on h W^T: [..., V] -> [..., V].

    >>> shape_logits(jnp.array([1e9]), LMHead(jnp.ones((1, 1)), softcap=30.0)).item()
    30.0
    """
    scaled = logits if head.scale == 1.0 else logits * head.scale
    return scaled if head.softcap is None else head.softcap * jnp.tanh(scaled / head.softcap)


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


def primal_values(primals):
    """The values among what a `custom_vjp` rule with symbolic zeros is given, a pytree."""
    return jax.tree.map(lambda p: p.value, primals, is_leaf=lambda x: hasattr(x, "perturbed"))


def is_perturbed(primals) -> bool:
    """Whether a `custom_vjp` rule with symbolic zeros is asked for the gradient of any leaf."""
    leaves = jax.tree.leaves(primals, is_leaf=lambda x: hasattr(x, "perturbed"))
    return any(leaf.perturbed for leaf in leaves)


def nucleus(weights: jax.Array, share: float) -> jax.Array:
    """The largest number such that the weights of at least it hold `share` of all: float32 weights
    [..., V] of at most 1, sum at least 1 -> [...]. No sort.

    Float32 numbers from 0 on are ordered as their bits are, so halving the bits finds it exactly.
    It is at most 1 and at least (1 - share) / V: all below that together are too light to matter.

    >>> float(nucleus(jnp.array([0.25, 0.5, 0.25]), 0.4))
    0.5
    """
    wanted = share * weights.sum(axis=-1)
    least = np.float32((1 - share) / weights.shape[-1] / 2).view(np.int32)
    most = np.float32(1).view(np.int32)

    def halve(_, between):
        low, high = between  # enough weighs at least low, too little at least high
        middle = low + (high - low) // 2
        at = jax.lax.bitcast_convert_type(middle, jnp.float32)
        enough = jnp.where(weights >= at[..., None], weights, 0).sum(axis=-1) >= wanted
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    rows = weights.shape[:-1]
    between = jnp.full(rows, least, jnp.int32), jnp.full(rows, most + 1, jnp.int32)
    halvings = int(most + 1 - least).bit_length()
    bits = jax.lax.fori_loop(0, halvings, halve, between)[0]
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
