"""The attention of a layer, full or in a window: grouped queries, rotary positions, q/k norms, an
output gate."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kdjax.models.layers import cache
from kdjax.models.layers.attention import attend_next, attention
from kdjax.models.layers.context import Context, Next, Settings
from kdjax.models.layers.rope import rotate
from kdjax.models.shape import LayerKind
from kdjax.sharding import BATCH, EMBED, HEADS, KV_HEADS, constrain

AXES: dict[str, tuple[str | None, ...]] = {
    "q_proj": (EMBED, HEADS),
    "k_proj": (EMBED, KV_HEADS),
    "v_proj": (EMBED, KV_HEADS),
    "o_proj": (HEADS, EMBED),
}
"""Logical axes (input, output) of each projection's kernel."""

NAMES = {
    "self_attn.q_proj.weight": ("q_proj", "kernel"),
    "self_attn.k_proj.weight": ("k_proj", "kernel"),
    "self_attn.v_proj.weight": ("v_proj", "kernel"),
    "self_attn.o_proj.weight": ("o_proj", "kernel"),
    "self_attn.q_proj.bias": ("q_proj", "bias"),
    "self_attn.k_proj.bias": ("k_proj", "bias"),
    "self_attn.v_proj.bias": ("v_proj", "bias"),
    "self_attn.o_proj.bias": ("o_proj", "bias"),
    "self_attn.q_norm.weight": ("q_norm", "scale"),
    "self_attn.k_norm.weight": ("k_norm", "scale"),
}
"""Name in a checkpoint -> path in a layer's parameters, where it has one."""


class SelfAttention(nnx.Module):
    """y [B, T, D] -> ([B, T, D], the layer's cache, None where none is kept)."""

    def __init__(self, settings: Settings, kind: LayerKind, *, rngs: nnx.Rngs):
        config, linear = settings.config, functools.partial(settings.linear, rngs=rngs)
        self.settings, self.kind = settings, kind
        d, query = config.hidden_size, config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        if config.qk_norm != "none":
            by_head = config.qk_norm == "head"
            self.q_norm = settings.norm(config.head_dim if by_head else query, rngs=rngs)
            self.k_norm = settings.norm(config.head_dim if by_head else keys, rngs=rngs)
        self.q_proj = linear("q_proj", d, query * (1 + config.output_gate), config.qkv_bias)
        self.k_proj = linear("k_proj", d, keys, config.qkv_bias)
        self.v_proj = linear("v_proj", d, keys, config.qkv_bias)
        self.o_proj = linear("o_proj", query, d, config.output_bias)

    def __call__(self, y: jax.Array, context: Context) -> tuple[jax.Array, Any]:
        config, place = self.settings.config, functools.partial(constrain, self.settings.mesh)
        q, gate = self._queries(y)
        k = self._keys(y)
        v = self._heads(self.v_proj(y))
        rope = self.kind.rope
        if rope is not None:
            q, k = (rotate(x, context.positions_bt, rope) for x in (q, k))
        q = place(q, BATCH, None, HEADS, None)
        k, v = (place(x, BATCH, None, KV_HEADS, None) for x in (k, v))
        attended, kept = self._attend(q, k, v, context)
        if gate is not None:
            attended = attended * jax.nn.sigmoid(gate)
        width = config.num_attention_heads * config.head_dim
        return self.o_proj(attended.reshape(*y.shape[:2], width)), kept

    def _queries(self, y: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """(queries, the gate of the output), both [B, T, H, D]."""
        config, q, gate = self.settings.config, self.q_proj(y), None
        if config.qk_norm == "width":
            q = self.q_norm(q)
        if config.output_gate:
            pairs = q.reshape(*q.shape[:2], -1, 2 * config.head_dim)
            q, gate = jnp.split(pairs, 2, axis=-1)
        else:
            q = self._heads(q)
        return (self.q_norm(q) if config.qk_norm == "head" else q), gate

    def _keys(self, y: jax.Array) -> jax.Array:
        """[B, T, K, D]."""
        norm, k = self.settings.config.qk_norm, self.k_proj(y)
        if norm == "width":
            k = self.k_norm(k)
        k = self._heads(k)
        return self.k_norm(k) if norm == "head" else k

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], -1, self.settings.config.head_dim)

    def _attend(self, q, k, v, context: Context) -> tuple[jax.Array, Any]:
        settings, window = self.settings, self.kind.window
        scale = score_scale(settings)
        if isinstance(context, Next):
            return attend_next(
                context.cache, q, k, v, pointer=context.pointer, start_b=context.start_b,
                window=window, scale=scale, keep=settings.keep,
            )  # fmt: skip
        attended = attention(
            q, k, v, context.segment_ids, impl=settings.impl, window=window, scale=scale,
            mesh=settings.mesh, platform=settings.platform,
        )  # fmt: skip
        if context.length_b is None:
            return attended, None
        return attended, cache.Slots(*(settings.keep(x.swapaxes(1, 2)) for x in (k, v)))

    @staticmethod
    def empty(settings: Settings, kind: LayerKind, batch: int, slots: int) -> Any:
        """The cache of a layer without a token."""
        config = settings.config
        shape = (batch, config.num_key_value_heads, slots, config.head_dim)
        zeros = constrain(
            settings.mesh, jnp.zeros(shape, settings.dtype), BATCH, KV_HEADS, None, None
        )
        return cache.empty(zeros, kind.window, settings.keep)


def score_scale(settings: Settings) -> float:
    """The factor of q . k."""
    scalar = settings.config.query_pre_attn_scalar
    return (settings.config.head_dim if scalar is None else scalar) ** -0.5
