"""Causal attention of whole sequences behind one function, and attention over a KV cache."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kdjax.base import ConfigError

QUERY_CHUNK = 512
"""Queries whose scores are alive at a time in `chunked`."""


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None = None,
    *,
    impl: str = "chunked",
    window: int | None = None,
    mesh: Mesh | None = None,
) -> jax.Array:
    """Causal grouped-query attention: q [B, T, H, D], k and v [B, T, K, D] -> [B, T, H, D].

    Position t sees positions s <= t of its own segment (segment_ids [B, T], None: one segment), and
    of the last `window` positions, its own included, if a window is given. Softmax in float32.
    Errors: ConfigError naming an unknown impl.

    >>> x = jnp.ones((1, 4, 2, 8))
    >>> attention(x, x, x, impl="xla").shape
    (1, 4, 2, 8)
    """
    if impl not in IMPLEMENTATIONS:
        raise ConfigError(f"attention: unknown impl {impl!r}; there are {list(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[impl](q, k, v, segment_ids, window)


def _xla(q, k, v, segment_ids, window):
    """All scores at once: fastest for short rows, quadratic memory."""
    slot = jnp.arange(q.shape[1])
    seen = _seen(slot, slot, segment_ids, segment_ids, window)
    return grouped_attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), seen)


def _chunked(q, k, v, segment_ids, window):
    """A chunk of queries at a time, recomputed in the backward pass: portable, linear memory."""
    length = q.shape[1]
    chunk = math.gcd(length, QUERY_CHUNK)
    if chunk == length:
        return _xla(q, k, v, segment_ids, window)
    keys, values = k.swapaxes(1, 2), v.swapaxes(1, 2)
    slot = jnp.arange(length)

    @jax.checkpoint
    def one(first):
        here = first + jnp.arange(chunk)
        own = None
        if segment_ids is not None:
            own = jax.lax.dynamic_slice_in_dim(segment_ids, first, chunk, axis=1)
        rows = jax.lax.dynamic_slice_in_dim(q, first, chunk, axis=1)
        return grouped_attention(rows, keys, values, _seen(here, slot, own, segment_ids, window))

    out = jax.lax.map(one, jnp.arange(0, length, chunk))
    return jnp.moveaxis(out, 0, 1).reshape(q.shape)


IMPLEMENTATIONS: dict[str, Callable] = {"xla": _xla, "chunked": _chunked}


def _seen(query_slot, key_slot, query_segments, key_segments, window) -> jax.Array:
    """[B or 1, T, S]: True where a query may look."""
    distance = query_slot[:, None] - key_slot[None]
    seen = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    if query_segments is None:
        return seen[None]
    return seen[None] & (query_segments[:, :, None] == key_segments[:, None])


def grouped_attention(
    q: jax.Array, keys_bksd: jax.Array, values_bksd: jax.Array, seen_bts: jax.Array
) -> jax.Array:
    """Grouped-query attention, softmax in float32: q [B, T, H, D] over S slots -> [B, T, H, D].

    The queries of a group are rows of one matrix, so keys and values are never repeated. `seen` is
    [B or 1, T, S], True where a query may look.
    """
    b, t, heads, head_dim = q.shape
    kv_heads = keys_bksd.shape[1]
    grouped = (
        q.reshape(b, t, kv_heads, -1, head_dim)
        .transpose(0, 2, 3, 1, 4)
        .reshape(b, kv_heads, -1, head_dim)
    )
    logits = jnp.einsum("bkqd,bksd->bkqs", grouped, keys_bksd, preferred_element_type=jnp.float32)
    seen = jnp.tile(seen_bts, (1, heads // kv_heads, 1))[:, None]
    weights = jax.nn.softmax(jnp.where(seen, logits * head_dim**-0.5, -1e30), axis=-1).astype(
        values_bksd.dtype
    )
    out = jnp.einsum("bkqs,bksd->bkqd", weights, values_bksd)
    return (
        out.reshape(b, kv_heads, -1, t, head_dim)
        .transpose(0, 3, 1, 2, 4)
        .reshape(b, t, heads, head_dim)
    )


Cache = tuple[jax.Array, jax.Array]
"""A layer's keys and values, [B, kv heads, slots, head dim]."""


def cached_attention(
    cache: Cache, pointer: jax.Array, start_b: jax.Array, window: int | None
) -> Callable[..., tuple[jax.Array, Cache]]:
    """Attention over slots start_b .. the query's own, after writing k and v at the pointer."""

    def attend(q, k, v):
        keys, values = (
            jax.lax.dynamic_update_slice(old, new.swapaxes(1, 2), (0, 0, pointer, 0))
            for old, new in zip(cache, (k, v), strict=True)
        )
        slot, own = jnp.arange(keys.shape[2]), pointer + jnp.arange(q.shape[1])
        seen = _seen(own, slot, None, None, window) & (slot[None, None] >= start_b[:, None, None])
        return grouped_attention(q, keys, values, seen), (keys, values)

    return attend
