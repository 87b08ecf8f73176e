"""The draw of the next token: a distribution from logits, and a token of it, on the device."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kdjax.base import PLAIN, Sampling, check_key
from kdjax.errors import ConfigError
from kdjax.numerics import gather_last, nucleus

BLOCK = 128
"""Entries that are reduced first: two short reductions instead of one over a long row."""


COLDEST = 1e-30
"""The least temperature over 0: float32 has no number for one under 1e-37, and 0 / 0 is NaN."""


class Choice(NamedTuple):
    """The token of each row [B], its log-probability under the model's own distribution and under
    the one it was drawn from, and the entropy of the model's own, in nats."""

    token_b: jax.Array
    logp_b: jax.Array
    sampler_logp_b: jax.Array
    entropy_b: jax.Array


def choose(logits_bv: jax.Array, uniform_b: jax.Array, sampling: Sampling = PLAIN) -> Choice:
    """Draw a token a row from float32 logits by the inverse of the cumulative distribution: the
    first token at which it exceeds the row's uniform number in [0, 1).

    Entries of -inf are never drawn. Truncation is exact, without a sort: a nucleus is found by
    bisection over the float32 numbers themselves (tokens tied with its last are in it).

    >>> logits = jnp.log(jnp.array([[0.5, 0.3, 0.2]]))
    >>> choose(logits, jnp.array([0.6])).token_b.tolist()
    [1]
    >>> choose(logits, jnp.array([0.6]), Sampling(top_p=0.4)).token_b.tolist()
    [0]
    """
    top_b = logits_bv.max(axis=-1)
    below_bv = top_b[:, None] - logits_bv  # how far an entry is below the best
    exp_bv = jnp.exp(-below_bv)
    sum_b = exp_bv.sum(axis=-1)
    weighed = jnp.where(exp_bv > 0, exp_bv * below_bv, 0.0)
    entropy_b = jnp.log(sum_b) + weighed.sum(axis=-1) / sum_b
    if sampling.temperature == 0:
        token_b = jnp.argmax(logits_bv, axis=-1).astype(jnp.int32)
        return Choice(token_b, -jnp.log(sum_b), jnp.zeros_like(sum_b), entropy_b)

    tempered, ids = below_bv, None
    if 0 < sampling.top_k < logits_bv.shape[-1]:
        best, ids = _top_k(-below_bv, sampling.top_k)
        tempered = -best
    weights = _cut(jnp.exp(-tempered / sampling.temperature), sampling)
    place_b = _inverse_cdf(weights, uniform_b)
    drawn_b = jnp.log(gather_last(weights, place_b) / weights.sum(axis=-1))
    token_b = place_b if ids is None else gather_last(ids, place_b)
    logp_b = -gather_last(below_bv, token_b) - jnp.log(sum_b)
    return Choice(token_b.astype(jnp.int32), logp_b, drawn_b, entropy_b)


def uniforms(key: jax.Array, row_b: jax.Array, position: jax.Array) -> jax.Array:
    """One number in [0, 1) a row, from (key, row number, position) alone. Errors: ConfigError for a
    key of another kind (`base.KEYS`)."""
    check_key(key)

    def one(row):
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, row), position))

    return jax.vmap(one)(row_b)


def check_sampling(sampling: Sampling, prefix: str = "") -> None:
    """Errors: ConfigError naming a value that no distribution has.

    >>> check_sampling(Sampling(top_p=0.9))
    """
    for name, good, wanted in (
        ("temperature", sampling.temperature >= 0, "at least 0"),
        ("temperature", sampling.temperature == 0 or COLDEST <= sampling.temperature < math.inf,
         f"0 (greedy), or finite and at least {COLDEST}"),
        ("top_p", 0 < sampling.top_p <= 1, "in (0, 1]"),
        ("top_k", sampling.top_k >= 0, "at least 0 (0 is no limit)"),
        ("min_p", 0 <= sampling.min_p < 1, "in [0, 1)"),
    ):  # fmt: skip
        if not good:
            got = getattr(sampling, name)
            raise ConfigError(f"{prefix}{name} must be {wanted}, got {got}")


def _top_k(values_bv: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """`jax.lax.top_k` by blocks: the k largest are in the k blocks with the largest maxima, so two
    short rows are sorted, where on a GPU `jax.lax.top_k` sorts the full row."""
    rows, size = values_bv.shape
    count = -(-size // BLOCK)
    if k > count:
        return jax.lax.top_k(values_bv, k)
    padded = jnp.pad(values_bv, ((0, 0), (0, -size % BLOCK)), constant_values=-jnp.inf)
    blocks = padded.reshape(rows, count, BLOCK)
    _, best = jax.lax.top_k(blocks.max(axis=-1), k)
    chosen = jnp.take_along_axis(blocks, best[..., None], axis=1).reshape(rows, -1)
    values, place = jax.lax.top_k(chosen, k)
    return values, jnp.take_along_axis(best, place // BLOCK, axis=1) * BLOCK + place % BLOCK


def _cut(weights: jax.Array, sampling: Sampling) -> jax.Array:
    """Weights, the largest of which is 1, set to 0 outside the nucleus and under min_p."""
    least = jnp.full(weights.shape[0], sampling.min_p, jnp.float32)
    if sampling.top_p < 1:
        least = jnp.maximum(least, nucleus(weights, sampling.top_p))
    return jnp.where(weights >= least[:, None], weights, 0)


def _inverse_cdf(weights_bv: jax.Array, uniform_b: jax.Array) -> jax.Array:
    """The index at which the running sum of weights exceeds uniform * total; never of weight 0."""
    rows, size = weights_bv.shape
    padded = jnp.pad(weights_bv, ((0, 0), (0, -size % BLOCK)))
    blocks = padded.reshape(rows, -1, BLOCK)
    sums = jnp.cumsum(blocks.sum(axis=-1), axis=-1)
    target = uniform_b * sums[:, -1]
    block = _first_over(sums, target)
    before = jnp.where(block > 0, gather_last(sums, jnp.maximum(block - 1, 0)), 0.0)
    own = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    inside = _first_over(jnp.cumsum(own, axis=-1), target - before)
    last = BLOCK - 1 - jnp.argmax((own > 0)[:, ::-1], axis=-1)  # rounding may step over the end
    return block * BLOCK + jnp.minimum(inside, last)


def _first_over(sums: jax.Array, target: jax.Array) -> jax.Array:
    """The first index whose running sum is over the target, or else the last that adds to it."""
    over = sums > target[:, None]
    return jnp.where(over.any(axis=-1), jnp.argmax(over, axis=-1), jnp.argmax(sums, axis=-1))
