"""Causal attention of whole sequences behind one function, and attention over a KV cache."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kdjax.errors import ConfigError
from kdjax.models.kernels import KERNELS, PREFERRED, Rows, sharded_kernel
from kdjax.runtime.console import announce

QUERY_CHUNK = 512
"""Queries, at most, whose scores are alive at a time in `chunked`; rows of no more take `xla`."""


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None = None,
    *,
    impl: str = "chunked",
    window: int | None = None,
    mesh: Mesh | None = None,
    platform: str | None = None,
) -> jax.Array:
    """Causal grouped-query attention: q [B, T, H, D], k and v [B, T, K, D] -> [B, T, H, D].

    Position t sees positions s <= t of its own segment (segment_ids [B, T], None: one segment), and
    of the last `window` positions, its own included, if a window is given. Softmax in float32 of
    q . k / sqrt(D). impl: `xla`, `chunked`, `cudnn`, `splash`, or `auto` (what `choose` says).
    platform: what is compiled for; that of the mesh, or of this process, if it is not given.
    Errors: ConfigError of one line naming an unknown impl, or why a kernel can't do it.

    >>> x = jnp.ones((1, 4, 2, 8))
    >>> attention(x, x, x, impl="xla").shape
    (1, 4, 2, 8)
    """
    platform = platform or _platform(mesh)
    if impl == "auto":
        impl = choose(platform, q.shape[1], q.shape[3], q.dtype, segment_ids is not None)
        announce(f"attention: {impl} on {platform}")
    if impl in KERNELS:
        return sharded_kernel(impl, q, k, v, segment_ids, window, platform, mesh)
    if impl not in PORTABLE:
        raise ConfigError(
            f"attention: unknown impl {impl!r}; there are {['auto', *PORTABLE, *KERNELS]}"
        )
    return PORTABLE[impl](q, k, v, segment_ids, window)


def choose(platform: str, length: int, head_dim: int, dtype, segment_ids: bool) -> str:
    """What `auto` means for rows of `length` on a platform (cpu, gpu or cuda, tpu).

    Short rows: `xla`. Long ones: the platform's own kernel where it takes them, else `chunked`.

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


def _xla(q, k, v, segment_ids, window):
    """All scores at once: fastest for short rows, quadratic memory."""
    slot = jnp.arange(q.shape[1])
    seen = seen_slots(slot, slot, segment_ids, segment_ids, window)
    return grouped_attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), seen)


def _chunked(q, k, v, segment_ids, window):
    """A chunk of queries at a time, recomputed in the backward pass: portable, linear memory.

    Chunks are equal, so queries are padded to a multiple (of a few positions), never scores.
    """
    b, length, heads, head_dim = q.shape
    chunks = -(-length // QUERY_CHUNK)
    if chunks == 1:
        return _xla(q, k, v, segment_ids, window)
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
        return grouped_attention(queries, keys, values, seen)

    own = None if segment_ids is None else in_chunks(segment_ids)
    out = jax.lax.map(one, (jnp.arange(0, chunks * chunk, chunk), in_chunks(q), own))
    return jnp.moveaxis(out, 0, 1).reshape(b, -1, heads, head_dim)[:, :length]


PORTABLE: dict[str, Callable] = {"xla": _xla, "chunked": _chunked}


def seen_slots(query_slot, key_slot, query_segments, key_segments, window) -> jax.Array:
    """[B or 1, T, S]: True where a query may look."""
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
    scales_bks: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Grouped-query attention, softmax in float32: q [B, T, H, D] over S slots -> [B, T, H, D].

    The queries of a group are rows of one matrix, so keys and values are never repeated. `seen` is
    [B or 1, T, S], True where a query may look. Keys and values of a narrower kind count times
    their scales: those multiply scores and weights, and nothing is widened outside the products.
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
    weights = jax.nn.softmax(jnp.where(seen, logits * head_dim**-0.5, -1e30), axis=-1)
    if scales_bks is not None:
        weights = weights * scales_bks[1][:, :, None]
    out = jnp.einsum("bkqs,bksd->bkqd", weights.astype(q.dtype), values)
    return (
        out.reshape(b, kv_heads, -1, t, head_dim)
        .transpose(0, 3, 1, 2, 4)
        .reshape(b, t, heads, head_dim)
    )
