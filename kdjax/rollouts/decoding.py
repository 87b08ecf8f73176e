"""The programs of decoding: prefill, decode, keep. One KV cache, written in place.

The responses of a batch all began at the same slot, so that one pointer writes the cache of all
rows in place, and no row attends over more slots than the longest needs. Prompts are left-padded,
in the slots before it.

Rows are sharded over the mesh's data axes in equal blocks. A program sees them as [n, rows / n,
...] on n devices, and moves rows only within a device's block.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from kdjax.base import Key, Model, Params, Sampling
from kdjax.models.layers.cache import aligned
from kdjax.numerics import project
from kdjax.rollouts.choose import Choice, choose, uniforms
from kdjax.sharding import BATCH, KV_HEADS, data_size, spec


class Decoding(NamedTuple):
    """The state of rows that are being decoded, on the device.

    hidden_bd: the last hidden state, which gives the next token's logits. start_b: int32, the first
    slot of the row's prompt. row_b: int32, its row number.
    """

    hidden_bd: jax.Array
    cache: Any
    start_b: jax.Array
    row_b: jax.Array


class Prompts(NamedTuple):
    """Prefixes to prefill, of r rows on each of n devices; samples of a prompt share one.

    tokens_uw: int32 [n * u, W], the distinct prefixes, right-padded. length_u: int32, their tokens.
    which_r: int32 [n * r], which of its device's u prefixes a row begins with. row_r: row numbers.
    """

    tokens_uw: Any
    length_u: Any
    which_r: Any
    row_r: Any


class Decoder(NamedTuple):
    """Jitted functions; prefill and decode reuse the memory of the Decoding that they take.

    - empty(params, rows, slots) -> Decoding.
    - prefill(params, state, prompts, at, width) -> Decoding: fills the rows of each device's block
      from row `at` on; the prompts end at slot width - 1.
    - decode(params, state, key, pointer, position, steps) -> (Decoding, Choice of [B, steps]):
      draws response positions position .. position + steps - 1, cached at slots pointer ...
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
        return x.reshape(devices, x.shape[0] // devices, *x.shape[1:])

    def placed(self, x: jax.Array) -> jax.Array:
        """Rows (or a leaf of a cache, [B, heads, ...] where it has four axes) with their
        sharding."""
        if self.mesh is None:
            return x
        axes = (BATCH, KV_HEADS if x.ndim == 4 else None, None, None)[: x.ndim]
        place = NamedSharding(self.mesh, spec(self.mesh, x.shape, axes))
        # of one device too, which may not be the default one
        return jax.lax.with_sharding_constraint(x, place)

    def joined(self, x: jax.Array) -> jax.Array:
        """The inverse of `split`."""
        return self.placed(x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]))

    def rows_of(self, x: jax.Array, which_r: jax.Array) -> jax.Array:
        """These rows of each block."""
        chosen = jax.vmap(lambda own, which: own[which])(self.split(x), self.split(which_r))
        return self.joined(chosen)

    def put(self, old: jax.Array, new: jax.Array, at: jax.Array, slot: int = 0) -> jax.Array:
        """`old` with `new` in the rows of every block from `at` on; of a cache, from a slot on."""
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
    """`Decoder.empty`: no prompt yet, a cache of so many slots."""
    token, length = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1, 1), (1,)))
    hidden = jax.eval_shape(model.prefill, params, token, length)[0]
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
    """`Decoder.prefill`.

    Args:
        model, blocks: of this decoder.
        params: the model's, unstacked.
        state: before; its memory is reused.
        prompts: of r rows on each device.
        at: int32 scalar, the first of those rows in its block.
        width: the slot after the prompts' last one.
    """
    length_u, which_r = prompts.length_u, prompts.which_r
    hidden, fresh = model.prefill(params, prompts.tokens_uw, length_u)
    last = jnp.take_along_axis(hidden, (length_u - 1)[:, None, None], axis=1)[:, 0]

    def put_layer(old, new):
        moved, slot = aligned(old, new, length_u, width)
        return jax.tree.map(
            lambda o, n: blocks.put(o, blocks.rows_of(n, which_r), at, slot), old, moved
        )

    return Decoding(
        blocks.put(state.hidden_bd, blocks.rows_of(last, which_r), at),
        [put_layer(old, new) for old, new in zip(state.cache, fresh, strict=True)],
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
    """`Decoder.decode`.

    Args:
        model, sampling, vocabulary: of this decoder.
        params: the model's, unstacked.
        state: before; its memory is reused.
        key: of the draw.
        pointer: int32 scalar, the slot of the first token.
        position: int32 scalar, its response position, which its uniform number depends on.
        steps: tokens.
    """
    head = model.head(params)

    def step(state: Decoding, number):
        logits = project(state.hidden_bd, head)[:, :vocabulary]
        drawn = choose(logits, uniforms(key, state.row_b, position + number), sampling)
        hidden, cache = model.extend(
            params, drawn.token_b, state.cache, pointer + number, state.start_b
        )
        return state._replace(hidden_bd=hidden, cache=cache), drawn

    state, drawn = jax.lax.scan(step, state, jnp.arange(steps))
    return state, jax.tree.map(jnp.transpose, drawn)


def _keep(blocks: _Blocks, rows: Any, which_r: jax.Array) -> Any:
    return jax.tree.map(lambda x: blocks.rows_of(x, which_r), rows)


def kept(programs: Decoder, state: Decoding, which_r: Any) -> Decoding:
    """These rows of each device's block, layer by layer: a layer's old cache is freed before the
    next layer's new one is allocated."""
    for number, layer in enumerate(state.cache):
        state.cache[number] = programs.keep(layer, which_r)
        del layer
    rest = programs.keep(state._replace(cache=None), which_r)
    return rest._replace(cache=state.cache)
