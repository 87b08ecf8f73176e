"""The programs of decoding: prefill, decode, keep. One KV cache, written in place.

Every row of a batch is equally old: its response began at the same slot, so that one pointer writes
the cache of all rows in place, and the window that each token reads is no wider than the oldest
needs. Prompts lie to the left of it, padded on their left.

Rows are sharded over the mesh's data axes in equal blocks. A program sees them as [n, rows / n,
...], n devices, and moves rows only inside a device's own block.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from kdjax.base import Key, Model, Params, Sampling
from kdjax.numerics import project
from kdjax.rollouts.choose import Choice, choose, uniforms
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


class _Blocks(NamedTuple):
    """Rows in equal blocks, one on each device of the mesh's data axes."""

    mesh: Mesh | None

    def split(self, x: jax.Array) -> jax.Array:
        """[rows, ...] as [devices, rows of a block, ...]."""
        devices = 1 if self.mesh is None else data_size(self.mesh)
        return x.reshape(devices, -1, *x.shape[1:])

    def placed(self, x: jax.Array) -> jax.Array:
        """Rows where they belong."""
        if self.mesh is None:
            return x
        axes = (BATCH, KV_HEADS, None, None) if x.ndim == 4 else (BATCH, None)[: x.ndim]
        place = NamedSharding(self.mesh, spec(self.mesh, x.shape, axes))
        return jax.lax.with_sharding_constraint(x, place)  # one device too: it may not be here

    def joined(self, x: jax.Array) -> jax.Array:
        """The inverse of `split`."""
        return self.placed(x.reshape(-1, *x.shape[2:]))

    def rows_of(self, x: jax.Array, which_r: jax.Array) -> jax.Array:
        """These rows of each block."""
        chosen = jax.vmap(lambda own, which: own[which])(self.split(x), self.split(which_r))
        return self.joined(chosen)

    def put(self, old: jax.Array, new: jax.Array, at: jax.Array, slot: int = 0) -> jax.Array:
        """Rows of every block from `at` on, of a cache from a slot on, replaced."""
        starts = (0, at, 0, slot, 0)[: old.ndim + 1]
        return self.joined(jax.lax.dynamic_update_slice(self.split(old), self.split(new), starts))


@functools.lru_cache(maxsize=16)  # programs compiled for one sampler serve the next
def decoder(
    model: Model, sampling: Sampling, vocabulary: int | None = None, mesh: Mesh | None = None
) -> Decoder:
    """The programs that draw from a model's first `vocabulary` logits, rows sharded over a mesh."""
    blocks = _Blocks(mesh)
    empty, prefill = (functools.partial(made, model, blocks) for made in (_empty, _prefill))
    decode = functools.partial(_decode, model, sampling, vocabulary)
    return Decoder(
        jax.jit(empty, static_argnums=(1, 2)),
        jax.jit(prefill, static_argnums=4, donate_argnums=1),
        jax.jit(decode, static_argnums=5, donate_argnums=1),
        jax.jit(functools.partial(_keep, blocks)),
    )


def _empty(model: Model, blocks: _Blocks, params: Params, rows: int, slots: int) -> Decoding:
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    hidden = jax.eval_shape(model.prefill, params, token)[0]
    states = jnp.zeros((rows, hidden.shape[-1]), hidden.dtype)
    numbers = jnp.zeros(rows, jnp.int32)
    made = Decoding(states, model.init_cache(rows, slots), numbers, numbers)
    return jax.tree.map(blocks.placed, made)


def _prefill(
    model: Model,
    blocks: _Blocks,
    params: Params,
    state: Decoding,
    prompts: Prompts,
    at: jax.Array,
    width: int,
) -> Decoding:
    hidden, cache = model.prefill(params, prompts.tokens_uw)
    length_u, which_r, wide = prompts.length_u, prompts.which_r, prompts.tokens_uw.shape[1]
    last = jnp.take_along_axis(hidden, (length_u - 1)[:, None, None], axis=1)[:, 0]
    # prompts move to the right end of their slots; what wraps around is padding, never seen
    source = (jnp.arange(wide)[None] + length_u[:, None]) % wide

    def put_slots(old, new):
        moved = jnp.take_along_axis(new, source[:, None, :, None], axis=2)
        return blocks.put(old, blocks.rows_of(moved, which_r), at, width - wide)

    return Decoding(
        blocks.put(state.hidden_bd, blocks.rows_of(last, which_r), at),
        jax.tree.map(put_slots, state.cache, cache),
        blocks.put(state.start_b, blocks.rows_of(width - length_u, which_r), at),
        blocks.put(state.row_b, prompts.row_r, at),
    )


def _decode(
    model: Model,
    sampling: Sampling,
    vocabulary: int | None,
    params: Params,
    state: Decoding,
    key: Key,
    pointer: jax.Array,
    position: jax.Array,
    steps: int,
) -> tuple[Decoding, Choice]:
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


def _keep(blocks: _Blocks, rows: Any, which_r: jax.Array) -> Any:
    return jax.tree.map(lambda x: blocks.rows_of(x, which_r), rows)


def kept(programs: Decoder, state: Decoding, which_r: Any) -> Decoding:
    """These rows of each device's block, a layer after the other: each gives back the memory of
    its old cache before the next one asks for new."""
    for number, layer in enumerate(state.cache):
        state.cache[number] = programs.keep(layer, which_r)
        del layer
    rest = programs.keep(state._replace(cache=None), which_r)
    return rest._replace(cache=state.cache)
