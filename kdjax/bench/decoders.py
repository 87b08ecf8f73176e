"""Decoding as it is usually written, for comparison: layers under scan, and static batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.base import PLAIN, Batch, Key, Model, Params
from kdjax.models import DecoderConfig
from kdjax.models.rope import rotate
from kdjax.numerics import project
from kdjax.rollouts.decoding import Prompts, decoder

STEPS = 16  # tokens between two looks of the host, in static batches


def scanned_decode(
    model: Model, params: Params, rows: int, slots: int, steps: int
) -> tuple[Callable[[Any], Any], Any]:
    """(decode, its first argument): greedy tokens at the end of the window, as a function of
    decode's own result. Layers run under `scan`, which takes and gives the whole cache,
    [layers, batch, slots, kv heads, head dim]. Qwen3's dense layers only.

    The result is (next token [B], keys, values, tokens [B, steps]).
    """
    config, dtype = model.config, params["embed"].dtype
    shape = (config.num_hidden_layers, rows, slots, config.num_key_value_heads, config.head_dim)
    head = model.head(params)

    def one(carry, number):
        token, keys, values = carry
        at = slots - steps - 1 + number
        positions = jnp.full((rows, 1), at)

        def layer(x, pieces):
            own, k_cache, v_cache = pieces
            q, k, v = _projected(config, own, x, positions)
            k_cache = jax.lax.dynamic_update_slice(k_cache, k, (0, at, 0, 0))
            v_cache = jax.lax.dynamic_update_slice(v_cache, v, (0, at, 0, 0))
            seen = jnp.arange(slots) <= at
            x = x + _attended(config, q, k_cache, v_cache, seen) @ own["o_proj"]["kernel"]
            y = _norm(config, x, own["mlp_norm"])
            gate = jax.nn.silu(y @ own["gate_proj"]["kernel"])
            return x + (gate * (y @ own["up_proj"]["kernel"])) @ own["down_proj"]["kernel"], (
                k_cache,
                v_cache,
            )

        x = params["embed"][token][:, None]
        x, (keys, values) = jax.lax.scan(layer, x, (params["layers"], keys, values))
        x = _norm(config, x[:, 0], {"scale": params["norm"]})
        token = jnp.argmax(project(x, head), axis=-1).astype(jnp.int32)
        return (token, keys, values), token

    @jax.jit
    def decode(state):
        (token, keys, values), tokens = jax.lax.scan(one, state[:3], jnp.arange(steps))
        return token, keys, values, tokens.T

    zeros = jnp.zeros(shape, dtype)
    start = jnp.zeros(rows, jnp.int32), zeros, zeros, jnp.zeros((rows, steps), jnp.int32)
    return decode, start


def _norm(config: DecoderConfig, x: jax.Array, own: Params) -> jax.Array:
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + config.rms_norm_eps)
    return (wide * scale * own["scale"][(None,) * (x.ndim - 1)]).astype(x.dtype)


def _projected(config: DecoderConfig, own: Params, x: jax.Array, positions: jax.Array):
    y, rows = _norm(config, x, own["attention_norm"]), x.shape[0]

    def heads(name: str, count: int) -> jax.Array:
        return (y @ own[name]["kernel"]).reshape(rows, 1, count, config.head_dim)

    q = _norm(config, heads("q_proj", config.num_attention_heads), own["q_norm"])
    k = _norm(config, heads("k_proj", config.num_key_value_heads), own["k_norm"])
    v = heads("v_proj", config.num_key_value_heads)
    return rotate(q, positions, config), rotate(k, positions, config), v


def _attended(config: DecoderConfig, q, k_cache, v_cache, seen) -> jax.Array:
    rows, groups = q.shape[0], config.num_key_value_heads
    q = q.reshape(rows, groups, -1, config.head_dim)
    scores = jnp.einsum("bkgd,bskd->bkgs", q, k_cache, preferred_element_type=jnp.float32)
    scores = jnp.where(seen, scores * config.head_dim**-0.5, -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_cache.dtype)
    return jnp.einsum("bkgs,bskd->bkgd", weights, v_cache).reshape(rows, 1, -1)


def static_batches(
    model: Model,
    params: Params,
    batch: Batch,
    key: Key,
    limit: int,
    stop_ids: Sequence[int],
    size: int,
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [B, limit], lengths): `size` rows at a time, each until the last of them has stopped,
    in a cache of the full length. Our own decode step: the schedule alone differs."""
    programs = decoder(model, PLAIN)
    prompts, lengths_b = np.asarray(batch.prompt_bp), np.asarray(batch.prompt_length_b)
    row_b = np.asarray(batch.row_b)
    rows, width = prompts.shape
    tokens, length = np.zeros((rows, limit), np.int32), np.full(rows, limit, np.int32)
    for first in range(0, rows, size):
        own = slice(first, first + size)
        state = programs.empty(params, size, width + -(-limit // STEPS) * STEPS)
        pieces = Prompts(prompts[own], lengths_b[own], np.arange(size, dtype=np.int32), row_b[own])
        state = programs.prefill(params, state, pieces, np.int32(0), width)
        stopped = np.zeros(size, bool)
        for at in range(0, limit, STEPS):
            state, drawn = programs.decode(
                params, state, key, np.int32(width + at), np.int32(at), STEPS
            )
            new = np.asarray(drawn.token_b)[:, : limit - at]
            ends = np.isin(new, np.asarray(stop_ids))
            count = np.where(ends.any(axis=1), ends.argmax(axis=1) + 1, new.shape[1])
            count = np.where(stopped, 0, count)
            real = np.arange(new.shape[1])[None] < count[:, None]
            tokens[own, at : at + new.shape[1]] = np.where(real, new, 0)
            ended = ends.any(axis=1) & ~stopped
            length[own] = np.where(ended, at + count, length[own])
            stopped |= ended
            if stopped.all():
                break
    return tokens, length
