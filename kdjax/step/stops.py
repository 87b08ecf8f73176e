"""The stop-token policy: how the loss treats two models that end a response differently.

A base student stops with `<|endoftext|>`, its chat teacher with `<|im_end|>`: compared token by
token, the student is pushed away from its own stop token (arXiv 2605.16826 does not say which
policy it used). A policy changes the loss and its statistics; what merge makes one event also ends
what the student draws (`kdjax.training.parts.roles`).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.base import TopK
from kdjax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Stops:
    """A policy and the stop ids of student and teacher together.

    - raw: stop tokens count like any other token.
    - mask: response tokens that are one of the ids are left out of the loss and every statistic.
    - merge: the ids are one event, "stop": its probability is the sum of theirs, in both models.
    """

    policy: Literal["raw", "mask", "merge"] = "raw"
    ids: tuple[int, ...] = ()

    def __post_init__(self):
        if self.policy not in ("raw", "mask", "merge"):
            raise ConfigError(f"stops must be raw, mask or merge, got {self.policy!r}")
        if self.policy != "raw" and not self.ids:
            raise ConfigError(f"stops {self.policy} needs at least one stop id, got none")
        if min(self.ids, default=0) < 0 or len({*self.ids}) < len(self.ids):
            raise ConfigError(f"stop ids must be distinct and at least 0, got {self.ids}")


RAW = Stops()


def kept(stops: Stops, targets: jax.Array, mask: jax.Array) -> jax.Array:
    """The mask [...]; under policy mask, without the tokens that are a stop id.

    >>> kept(Stops("mask", (2, 5)), jnp.array([1, 2, 5]), jnp.array([True, True, True])).tolist()
    [True, False, False]
    """
    return mask & ~_is_one(stops.ids, targets) if stops.policy == "mask" else mask


def merged(stops: Stops, student, teacher, targets, axis: str | None = None):
    """(student logits, teacher logits, targets), under policy merge with all stop ids as one, the
    first of them (`merge_columns`).

    Logits are those of temperature 1, so stop's probability is a sum of probabilities; a token
    loss's own temperature comes after. sampler_logp stays that of the token drawn. The user's own
    token losses must accept log-probabilities of -inf on both sides, as `kl`'s do.

    Args:
        stops: the policy.
        student: logits [..., V].
        teacher: logits [..., V], a `TopK` or None.
        targets: int [...].
        axis: the vocabulary's mesh axis inside `shard_map`, if it is sharded.

    Errors: ConfigError for a `TopK` teacher, which does not know each stop id's probability.
    """
    if stops.policy != "merge" or len(stops.ids) < 2:
        return student, teacher, targets
    if isinstance(teacher, TopK):
        raise ConfigError(
            "stops merge needs the teacher's whole vocabulary, got a top-k teacher;"
            " use stops raw or mask, or the teacher's logits"
        )
    student, teacher = (
        None if logits is None else merge_columns(logits, stops.ids, axis)
        for logits in (student, teacher)
    )
    return student, teacher, jnp.where(_is_one(stops.ids, targets), stops.ids[0], targets)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def merge_columns(logits: jax.Array, ids: tuple[int, ...], axis: str | None = None) -> jax.Array:
    """Logits [..., V] whose column ids[0] is the logsumexp of all ids' columns, the others -inf.

    With s the softmax among the ids' logits, the gradient of column ids[i] is s_i times the merged
    column's. `axis` as in `compare`: inside `shard_map`, logits are this device's columns and ids
    count over all; the collectives are one pmax [..., n], and one psum [...] in the gradient.
    Errors: ConfigError for an id outside the vocabulary.

    >>> jnp.exp(merge_columns(jnp.log(jnp.array([0.5, 0.2, 0.3])), (1, 2))).round(3).tolist()
    [0.5, 0.5, 0.0]
    """
    return _merge(logits, ids, axis)[0]


def _merge(logits: jax.Array, ids: tuple[int, ...], axis: str | None):
    """(the merged logits, the share of each id in the merged probability [..., n])."""
    width = logits.shape[-1]
    columns = width if axis is None else width * jax.lax.axis_size(axis)
    if max(ids) >= columns:
        raise ConfigError(f"stop ids must be below the vocabulary's {columns}, got {ids}")
    own = _columns(logits, ids, axis, -jnp.inf)
    own = own if axis is None else jax.lax.pmax(own, axis)
    top = own.max(-1, keepdims=True)
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    total = jnp.log(jnp.exp(own - top).sum(-1, keepdims=True)) + top
    share = jnp.where(jnp.isfinite(total), jnp.exp(own - total), 0.0)
    here = _numbers(logits, axis)
    rest = jnp.where(_is_one(ids[1:], here), -jnp.inf, logits)
    return jnp.where(here == ids[0], total, rest), share


def _merge_fwd(logits, ids, axis):
    return _merge(logits, ids, axis)


def _merge_bwd(ids, axis, share, cotangent):
    by_first = _columns(cotangent, ids[:1], axis, 0.0)
    by_first = by_first if axis is None else jax.lax.psum(by_first, axis)
    here, gradient = _numbers(cotangent, axis), cotangent
    for place, number in enumerate(ids):
        gradient = jnp.where(here == number, by_first * share[..., place : place + 1], gradient)
    return (gradient,)


merge_columns.defvjp(_merge_fwd, _merge_bwd)


def _columns(x: jax.Array, ids: tuple[int, ...], axis: str | None, elsewhere: float) -> jax.Array:
    """Columns ids of [..., V] -> [..., n]; `elsewhere` for those that another shard has."""
    if axis is None:
        return x[..., np.array(ids)]
    index = np.array(ids) - jax.lax.axis_index(axis) * x.shape[-1]
    found = jnp.take(x, jnp.clip(index, 0, x.shape[-1] - 1), axis=-1)
    has = (index >= 0) & (index < x.shape[-1])
    return jnp.where(jnp.broadcast_to(has, found.shape), found, elsewhere)


def _numbers(x: jax.Array, axis: str | None) -> jax.Array:
    """Each entry's column over the full vocabulary, [..., V]; fused by XLA, so no array."""
    here = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    return here if axis is None else here + jax.lax.axis_index(axis) * x.shape[-1]


def _is_one(ids: tuple[int, ...], numbers: jax.Array) -> jax.Array:
    found = jnp.zeros(numbers.shape, bool)
    for number in ids:
        found |= numbers == number
    return found
