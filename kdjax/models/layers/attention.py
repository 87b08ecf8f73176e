"""Causal attention: of full sequences, behind one function, and over a KV cache."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from kdjax.errors import ConfigError
from kdjax.models.layers.cache import Int8, Keep, Slots, Window
from kdjax.models.layers.kernels import KERNELS, PREFERRED, Rows, sharded_kernel
from kdjax.runtime.console import announce

QUERY_CHUNK = 512
"""The most queries whose scores `chunked` holds at a time; rows no longer than this take `xla`."""


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None = None,
    *,
    impl: str = "chunked",
    window: int | None = None,
    scale: float | None = None,
    mesh: Mesh | None = None,
    platform: str | None = None,
) -> jax.Array:
    """Causal grouped-query attention, softmax in float32 of scale * q . k -> [B, T, H, D].

    Args:
        q: [B, T, H, D].
        k, v: [B, T, K, D]; K divides H.
        segment_ids: int [B, T]; a position sees those of its own segment alone. None: one segment.
        impl: `xla`, `chunked`, `cudnn`, `splash`, or `auto` (the one that `choose` returns).
        window: a position sees this many, the last ones and itself; None: all before it.
        scale: of the scores; None: 1 / sqrt(D).
        mesh: what a kernel's arrays are sharded over.
        platform: what is compiled for; by default the mesh's, or this process's.

    Errors: ConfigError of one line naming an unknown impl, or why a kernel can't do it.

    >>> x = jnp.ones((1, 4, 2, 8))
    >>> attention(x, x, x, impl="xla").shape
    (1, 4, 2, 8)
    """
    platform = platform or _platform(mesh)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if impl == "auto":
        impl = choose(platform, q.shape[1], q.shape[3], q.dtype, segment_ids is not None)
        announce(f"attention: {impl} on {platform}")
    if impl in KERNELS:
        return sharded_kernel(impl, q, k, v, segment_ids, window, scale, platform, mesh)
    if impl not in PORTABLE:
        raise ConfigError(
            f"attention: unknown impl {impl!r}; there are {['auto', *PORTABLE, *KERNELS]}"
        )
    return PORTABLE[impl](q, k, v, segment_ids, window, scale)


def choose(platform: str, length: int, head_dim: int, dtype: DTypeLike, segment_ids: bool) -> str:
    """The impl that `auto` stands for: `xla` for short rows; for long ones the platform's own
    kernel where it accepts them, else `chunked`.

    Args:
        platform: cpu, gpu or cuda, tpu.
        length, head_dim: T and D of the queries.
        dtype: theirs.
        segment_ids: whether there are some.

    >>> choose("tpu", 4096, 128, jnp.bfloat16, False), choose("cpu", 4096, 128, jnp.float32, False)
    ('splash', 'chunked')
    """
    if length <= QUERY_CHUNK:
        return "xla"
    kernel = PREFERRED.get(platform)
    rows = Rows(platform, length, head_dim, jnp.dtype(dtype), segment_ids)
    return kernel if kernel and KERNELS[kernel].refusal(rows) is None else "chunked"


def _platform(mesh: Mesh | None) -> str:
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def _xla(q, k, v, segment_ids, window, scale):
    """All scores at once: fastest for short rows, quadratic memory. Arguments as in `attention`."""
    slot = jnp.arange(q.shape[1])
    seen = seen_slots(slot, slot, segment_ids, segment_ids, window)
    return grouped_attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), seen, scale)


def _chunked(q, k, v, segment_ids, window, scale):
    """A chunk of queries at a time, recomputed in the backward pass: portable, linear memory.

    Chunks are equal, so queries are padded to a multiple (of a few positions), never scores.
    """
    b, length, heads, head_dim = q.shape
    chunks = -(-length // QUERY_CHUNK)
    if chunks == 1:
        return _xla(q, k, v, segment_ids, window, scale)
    chunk = 8 * -(-length // (8 * chunks))
    padding = chunks * chunk - length
    keys, values = k.swapaxes(1, 2), v.swapaxes(1, 2)
    slot = jnp.arange(length)

    def in_chunks(x):
        padded = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(b, chunks, chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def one(piece):
        first, queries, own = piece
        seen = seen_slots(first + jnp.arange(chunk), slot, own, segment_ids, window)
        return grouped_attention(queries, keys, values, seen, scale)

    own = None if segment_ids is None else in_chunks(segment_ids)
    out = jax.lax.map(one, (jnp.arange(0, chunks * chunk, chunk), in_chunks(q), own))
    return jnp.moveaxis(out, 0, 1).reshape(b, -1, heads, head_dim)[:, :length]


PORTABLE: dict[str, Callable] = {"xla": _xla, "chunked": _chunked}


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


def seen_slots(query_slot, key_slot, query_segments, key_segments, window) -> jax.Array:
    """The attention mask, bool [B or 1, T, S]: True where a query sees a key.

    Args:
        query_slot: int [T].
        key_slot: int [S].
        query_segments, key_segments: int [B, T] and [B, S], or None.
        window: as in `attention`.
    """
    distance = query_slot[:, None] - key_slot[None]
    seen = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    if query_segments is None:
        return seen[None]
    return seen[None] & (query_segments[:, :, None] == key_segments[:, None])


def grouped_attention(
    q: jax.Array,
    keys_bksd: jax.Array,
    values_bksd: jax.Array,
    seen_bts: jax.Array,
    scale: float,
    scales_bks: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Grouped-query attention over S slots, softmax in float32 -> [B, T, H, D].

    The queries of a group are rows of one matrix, so keys and values are never repeated.

    Args:
        q: [B, T, H, D].
        keys_bksd, values_bksd: [B, K, S, D], of q's dtype or int8.
        seen_bts: bool [B or 1, T, S], True where a query sees a slot.
        scale: of the scores.
        scales_bks: of int8 keys and of values, float32 [B, K, S]. They multiply scores and weights,
            so that int8 is converted inside the products alone.
    """
    b, t, heads, head_dim = q.shape
    kv_heads = keys_bksd.shape[1]
    grouped = (
        q.reshape(b, t, kv_heads, -1, head_dim)
        .transpose(0, 2, 3, 1, 4)
        .reshape(b, kv_heads, -1, head_dim)
    )
    keys, values = keys_bksd.astype(q.dtype), values_bksd.astype(q.dtype)
    logits = jnp.einsum("bkqd,bksd->bkqs", grouped, keys, preferred_element_type=jnp.float32)
    if scales_bks is not None:
        logits = logits * scales_bks[0][:, :, None]
    seen = jnp.tile(seen_bts, (1, heads // kv_heads, 1))[:, None]
    weights = jax.nn.softmax(jnp.where(seen, logits * scale, -1e30), axis=-1)
    if scales_bks is not None:
        weights = weights * scales_bks[1][:, :, None]
    out = jnp.einsum("bkqs,bksd->bkqd", weights.astype(q.dtype), values)
    return (
        out.reshape(b, kv_heads, -1, t, head_dim)
        .transpose(0, 3, 1, 2, 4)
        .reshape(b, t, heads, head_dim)
    )
