"""What decoding keeps of a layer, by its kind: keys and values of all slots, those of a window, or
a recurrent state.

Slots are the positions of a batch, [batch, kv heads, slots, head dim], written at one shared
pointer; prompts are left-padded. Every leaf of a layer's cache begins with the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kdjax.models.attention import grouped_attention


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


class Slots(NamedTuple):
    """Keys and values of all slots, each [B, K, S, D] as `Keep` stores them."""

    keys: Any
    values: Any


class Window(NamedTuple):
    """Keys and values of the last W slots, each [B, K, W, D]: slot s is at s mod W."""

    keys: Any
    values: Any


class Recurrent(NamedTuple):
    """The state [B, H, Dk, Dv] of linear attention, float32, and the last inputs of its
    convolution [B, width - 1, C]."""

    state: jax.Array
    tail: jax.Array


def empty(zeros_bksd: jax.Array, window: int | None, keep: Keep) -> Slots | Window:
    """An attention layer's cache without a token: of as many slots as zeros_bksd, or of its window
    where that is shorter."""
    if window is None or zeros_bksd.shape[2] <= window:
        return Slots(keep(zeros_bksd), keep(zeros_bksd))
    zeros_bksd = zeros_bksd[:, :, :window]
    return Window(keep(zeros_bksd), keep(zeros_bksd))


def attend_next(
    cache: Slots | Window,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    pointer: jax.Array,
    start_b: jax.Array,
    window: int | None,
    scale: float,
    keep: Keep,
) -> tuple[jax.Array, Slots | Window]:
    """Write a token's key and value at the pointer, then attend to the slots from start_b on ->
    ([B, 1, H, D], the new cache).

    Args:
        cache: of a layer.
        q, k, v: of one token, [B, 1, H, D] and twice [B, 1, K, D].
        pointer: int scalar, the token's slot.
        start_b: int [B], each row's first slot that is not padding.
        window: as in `attention`.
        scale: of the scores.
        keep: one of CACHES.
    """
    place = jnp.arange(jax.tree.leaves(cache)[0].shape[2])
    at, slot = pointer, place
    if isinstance(cache, Window):  # what stands there was written at the last slot of its place
        at = pointer % len(place)
        slot = pointer - (pointer - place) % len(place)

    def write(old, new):
        return jax.tree.map(
            lambda o, n: jax.lax.dynamic_update_slice(o, n, (0, 0, at, 0)),
            old,
            keep(new.swapaxes(1, 2)),
        )

    kept = type(cache)(write(cache.keys, k), write(cache.values, v))
    near = slot <= pointer if window is None else (slot <= pointer) & (slot > pointer - window)
    seen = near[None, None] & (slot[None, None] >= start_b[:, None, None])
    keys, values = kept
    if isinstance(keys, Int8):
        scales = keys.scale[..., 0], values.scale[..., 0]
        return grouped_attention(q, keys.values, values.values, seen, scale, scales), kept
    return grouped_attention(q, keys, values, seen, scale), kept


def aligned(old: Any, fresh: Any, length_b: jax.Array, end: int) -> tuple[Any, int]:
    """(a layer's cache of right-padded prompts moved to the slots before `end`, the first slot that
    it fills in a cache like `old`).

    Args:
        old: the cache that it is to be written to.
        fresh: of the prompts: Slots of their width, or Recurrent.
        length_b: int32 [B], tokens of the prompts.
        end: the slot after their last token.
    """
    if isinstance(old, Recurrent):
        return fresh, 0
    wide = jax.tree.leaves(fresh)[0].shape[2]
    slot, first = end - wide + jnp.arange(wide), end - wide
    if isinstance(old, Window):
        places = jnp.arange(jax.tree.leaves(old)[0].shape[2])
        slot, first = end - 1 - (end - 1 - places) % len(places), 0
    # what is not a prompt's own slot wraps around, or is cut: padding, which is never attended to
    source = (slot[None] - (end - length_b[:, None])) % wide
    moved = jax.tree.map(lambda x: jnp.take_along_axis(x, source[:, None, :, None], axis=2), fresh)
    return type(old)(*moved), first
