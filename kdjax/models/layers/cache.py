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
