"""The KV cache of a layer, [batch, kv heads, slots, head dim], written at one shared pointer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kdjax.models.attention import grouped_attention, seen_slots


class Int8(NamedTuple):
    """x = values * scale: int8 [B, K, S, D] times float32 [B, K, S, 1]."""

    values: jax.Array
    scale: jax.Array


def int8(x_bksd: jax.Array) -> Int8:
    """Keys or values, each slot rounded to 127ths of its largest magnitude.

    >>> int8(jnp.array([[[[1.0, -0.5]]]])).values.tolist()
    [[[[127, -64]]]]
    """
    wide = x_bksd.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=-1, keepdims=True) / 127
    steps = jnp.round(wide / jnp.where(scale == 0, 1, scale))
    return Int8(steps.astype(jnp.int8), scale)


Keep = Callable[[jax.Array], Any]
CACHES: dict[str, Keep] = {"compute": lambda x: x, "int8": int8}
"""How a cache stores keys and values: as they are computed, or in half of bfloat16's memory."""


def cached_attention(
    cache: tuple[Any, Any], pointer: jax.Array, start_b: jax.Array, window: int | None, keep: Keep
) -> Callable[..., tuple[jax.Array, tuple[Any, Any]]]:
    """attend(q, k, v) -> ([B, T, H, D], the new cache): writes k and v at the pointer, then attends
    to the slots from start_b to the query's own.

    Args:
        cache: a layer's (keys, values), each [B, K, S, D] as `keep` stores them.
        pointer: int scalar, the slot of the first of T tokens.
        start_b: int [B], each row's first slot that is not padding.
        window: as in `attention`.
        keep: one of CACHES.
    """

    def write(old, new):
        return jax.tree.map(
            lambda o, n: jax.lax.dynamic_update_slice(o, n, (0, 0, pointer, 0)),
            old,
            keep(new.swapaxes(1, 2)),
        )

    def attend(q, k, v):
        kept = tuple(write(old, new) for old, new in zip(cache, (k, v), strict=True))
        keys, values = kept
        slot = jnp.arange(jax.tree.leaves(keys)[0].shape[2])
        seen = seen_slots(pointer + jnp.arange(q.shape[1]), slot, None, None, window)
        seen = seen & (slot[None, None] >= start_b[:, None, None])
        if isinstance(keys, Int8):
            scales = keys.scale[..., 0], values.scale[..., 0]
            return grouped_attention(q, keys.values, values.values, seen, scales), kept
        return grouped_attention(q, keys, values, seen), kept

    return attend
