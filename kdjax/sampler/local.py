"""Sampling: prefill and decode with a KV cache, tokens with their log-probabilities.

Rows are left-padded, so that one shared pointer writes the cache of every row in place. A row's
tokens depend on (key, row number, position) alone, never on the batch that it sat in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kdjax.base import Batch, ConfigError, Key, Model, Params, Samples
from kdjax.numerics import entropy, gather_last, log_probs, project

STEPS_A_ROUND = 16
"""Decoding runs in scans of this many tokens; between them it ends if every row has stopped."""


class _Decoding(NamedTuple):
    logits_bv: jax.Array
    cache: list
    position: jax.Array
    live_b: jax.Array
    out: Samples


def generate(
    model: Model,
    params: Params,
    batch: Batch,
    key: Key,
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    temperature: float = 1.0,
    vocabulary: int | None = None,
) -> Samples:
    """Draw a response a row from softmax(logits / temperature); greedy at 0. Pure: jit it.

    Logits past the first `vocabulary` (all by default) are padding, and never drawn.
    Errors (at trace): ConfigError without a stop id, or for a negative temperature or length limit.
    """
    if not stop_ids:
        raise ConfigError("generate: stop_ids is empty; a response needs a token that ends it")
    if temperature < 0 or max_new_tokens < 1:
        raise ConfigError("generate: temperature must be at least 0 and max_new_tokens at least 1")
    rows, width = batch.prompt_bp.shape
    rounds = -(-max_new_tokens // STEPS_A_ROUND)
    slots = width + rounds * STEPS_A_ROUND
    start_b = width - batch.prompt_length_b
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch.row_b)

    hidden, cache = model.extend(
        params, _left_padded(batch), model.init_cache(rows, slots), 0, start_b
    )
    head = model.head(params)

    def next_logits(hidden_bd):
        return project(hidden_bd, head)[:, :vocabulary]

    def step(state: _Decoding, _):
        token, drawn_logp = _draw(state.logits_bv, row_keys, state.position, temperature)
        logp = log_probs(state.logits_bv)
        emitted = (token, gather_last(logp, token), drawn_logp, entropy(logp), state.live_b)
        hidden, cache = model.extend(
            params, token[:, None], state.cache, width + state.position, start_b
        )
        stopped = jnp.isin(token, jnp.asarray(stop_ids))
        return state._replace(
            logits_bv=next_logits(hidden[:, 0]),
            cache=cache,
            position=state.position + 1,
            live_b=state.live_b & ~stopped & (state.position + 1 < max_new_tokens),
        ), (*emitted, jnp.where(state.live_b & stopped, token, -1))

    def one_round(state: _Decoding) -> _Decoding:
        first = state.position
        state, emitted = jax.lax.scan(step, state, length=STEPS_A_ROUND)
        token, logp, drawn_logp, ent, was_live, stopped = (x.T for x in emitted)

        def put(old, new):
            new = jnp.where(was_live, new, 0).astype(old.dtype)
            return jax.lax.dynamic_update_slice(old, new, (0, first))

        out = state.out
        return state._replace(
            out=Samples(
                tokens_bt=put(out.tokens_bt, token),
                length_b=out.length_b + was_live.sum(axis=1, dtype=jnp.int32),
                logp_bt=put(out.logp_bt, logp),
                sampler_logp_bt=put(out.sampler_logp_bt, drawn_logp),
                entropy_bt=put(out.entropy_bt, ent),
                stop_b=jnp.maximum(out.stop_b, stopped.max(axis=1)),
            )
        )

    def unfinished(state: _Decoding):
        return jnp.any(state.live_b)

    zeros = jnp.zeros((rows, rounds * STEPS_A_ROUND), jnp.float32)
    empty = Samples(
        zeros.astype(jnp.int32),
        jnp.zeros(rows, jnp.int32),
        zeros,
        zeros,
        zeros,
        jnp.full(rows, -1, jnp.int32),
    )
    state = _Decoding(next_logits(hidden[:, -1]), cache, jnp.int32(0), jnp.ones(rows, bool), empty)
    out = jax.lax.while_loop(unfinished, one_round, state).out
    return jax.tree.map(lambda x: x[:, :max_new_tokens] if x.ndim == 2 else x, out)


def _left_padded(batch: Batch) -> jax.Array:
    width = batch.prompt_bp.shape[1]
    shift = jnp.arange(width)[None] - (width - batch.prompt_length_b)[:, None]
    return jnp.take_along_axis(batch.prompt_bp, jnp.maximum(shift, 0), axis=1)


def _draw(logits_bv: jax.Array, row_keys: Key, position: jax.Array, temperature: float):
    """(token, its log-probability as drawn): inverse CDF, one uniform a row and position."""
    if temperature == 0:
        return jnp.argmax(logits_bv, axis=-1).astype(jnp.int32), jnp.zeros(
            logits_bv.shape[0], jnp.float32
        )
    logp = log_probs(logits_bv, temperature)
    uniform = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, position)))(row_keys)
    cumulative = jnp.cumsum(jnp.exp(logp), axis=-1)
    below = cumulative <= uniform[:, None] * cumulative[:, -1:]
    token = jnp.minimum(below.sum(axis=-1), logits_bv.shape[-1] - 1).astype(jnp.int32)
    return token, gather_last(logp, token)
