"""The programs of decoding: prefill, decode, keep. One KV cache, written in place.

Every row of a batch is equally old: its response began at the same slot, so that one pointer writes
the cache of all rows in place, and the window that each token reads is no wider than the oldest
needs. Prompts lie to the left of it, padded on their left.

Rows are dealt over the mesh's data axes in equal blocks. A program sees them as [n, rows / n, ...],
n devices, and moves rows only inside a device's own block.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from kdjax.base import Key, Model, Params, Sampling
from kdjax.numerics import project
from kdjax.rollouts.choose import choose, uniforms
from kdjax.sharding import BATCH, KV_HEADS, data_size, spec


class Decoding(NamedTuple):
    """Rows on their way, on the device.

    hidden_bd: the last hidden state, which says what the next token is. start_b: the first slot of
    the row's prompt. row_b: its row number.
    """

    hidden_bd: jax.Array
    cache: Any
    start_b: jax.Array
    row_b: jax.Array


class Prompts(NamedTuple):
    """Prefixes of the rows at `at`, at + 1, ... of every device's block.

    Distinct prefixes [n * u, W], right-padded, and which of its device's u each row [n * r] begins
    with: the samples of a prompt share one prefill.
    """

    tokens_uw: Any
    length_u: Any
    which_r: Any
    row_r: Any


class Decoder(NamedTuple):
    """Jitted functions; those that take a Decoding and give one of its size reuse its memory.

    - empty(params, rows, slots) -> Decoding.
    - prefill(params, state, prompts, at, width) -> Decoding; the prompts end at slot width - 1.
    - decode(params, state, key, pointer, position, steps) -> (Decoding, Choice of [B, steps]):
      the tokens of response positions position .. position + steps - 1, kept at slots pointer ...
    - keep(rows, which_r) -> these rows of each device's block, of any arrays.
    """

    empty: Any
    prefill: Any
    decode: Any
    keep: Any


@functools.lru_cache(maxsize=16)  # programs compiled for one sampler serve the next
def decoder(
    model: Model, sampling: Sampling, vocabulary: int | None = None, mesh: Mesh | None = None
) -> Decoder:
    """The programs that draw from a model's first `vocabulary` logits, rows dealt over a mesh."""
    devices = 1 if mesh is None else data_size(mesh)

    def dealt(x: jax.Array) -> jax.Array:
        return x.reshape(devices, -1, *x.shape[1:])

    def placed(x: jax.Array) -> jax.Array:
        if mesh is None:
            return x
        axes = (BATCH, KV_HEADS, None, None) if x.ndim == 4 else (BATCH, None)[: x.ndim]
        place = NamedSharding(mesh, spec(mesh, x.shape, axes))
        return jax.lax.with_sharding_constraint(x, place)  # one device too: it may not be here

    def joined(x: jax.Array) -> jax.Array:
        return placed(x.reshape(-1, *x.shape[2:]))

    def rows_of(x: jax.Array, which_r: jax.Array) -> jax.Array:
        return joined(jax.vmap(lambda own, which: own[which])(dealt(x), dealt(which_r)))

    def put(old: jax.Array, new: jax.Array, at: jax.Array, slot: int = 0) -> jax.Array:
        starts = (0, at, 0, slot, 0)[: old.ndim + 1]
        return joined(jax.lax.dynamic_update_slice(dealt(old), dealt(new), starts))

    def empty(params: Params, rows: int, slots: int) -> Decoding:
        token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        hidden = jax.eval_shape(model.prefill, params, token)[0]
        states, numbers = (
            jnp.zeros((rows, hidden.shape[-1]), hidden.dtype),
            jnp.zeros(rows, jnp.int32),
        )
        made = Decoding(states, model.init_cache(rows, slots), numbers, numbers)
        return jax.tree.map(placed, made)

    def prefill(params: Params, state: Decoding, prompts: Prompts, at, width: int) -> Decoding:
        hidden, cache = model.prefill(params, prompts.tokens_uw)
        length_u, which_r, wide = prompts.length_u, prompts.which_r, prompts.tokens_uw.shape[1]
        last = jnp.take_along_axis(hidden, (length_u - 1)[:, None, None], axis=1)[:, 0]
        # prompts move to the right end of their slots; what wraps around is padding, never seen
        source = (jnp.arange(wide)[None] + length_u[:, None]) % wide

        def put_slots(old, new):
            moved = jnp.take_along_axis(new, source[:, None, :, None], axis=2)
            return put(old, rows_of(moved, which_r), at, width - wide)

        return Decoding(
            put(state.hidden_bd, rows_of(last, which_r), at),
            jax.tree.map(put_slots, state.cache, cache),
            put(state.start_b, rows_of(width - length_u, which_r), at),
            put(state.row_b, prompts.row_r, at),
        )

    def decode(params: Params, state: Decoding, key: Key, pointer, position, steps: int):
        head = model.head(params)

        def step(state: Decoding, number):
            logits = project(state.hidden_bd, head)[:, :vocabulary]
            drawn = choose(logits, uniforms(key, state.row_b, position + number), sampling)
            hidden, cache = model.extend(
                params, drawn.token_b[:, None], state.cache, pointer + number, state.start_b
            )
            return state._replace(hidden_bd=hidden[:, 0], cache=cache), drawn

        state, drawn = jax.lax.scan(step, state, jnp.arange(steps))
        return state, jax.tree.map(jnp.transpose, drawn)

    def keep(rows: Any, which_r: jax.Array) -> Any:
        return jax.tree.map(lambda x: rows_of(x, which_r), rows)

    return Decoder(
        jax.jit(empty, static_argnums=(1, 2)),
        jax.jit(prefill, static_argnums=4, donate_argnums=1),
        jax.jit(decode, static_argnums=5, donate_argnums=1),
        jax.jit(keep),
    )


def kept(programs: Decoder, state: Decoding, which_r: Any) -> Decoding:
    """These rows of each device's block, a layer after the other: each gives back the memory of
    its old cache before the next one asks for new."""
    for number, layer in enumerate(state.cache):
        state.cache[number] = programs.keep(layer, which_r)
        del layer
    rest = programs.keep(state._replace(cache=None), which_r)
    return rest._replace(cache=state.cache)
