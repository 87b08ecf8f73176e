"""Qwen3: a dense decoder with grouped-query attention, q/k norm, rotary positions and SwiGLU.

Layers are Flax NNX modules, split once: what leaves this file are pure functions over a nested dict
of arrays. Training sees the layers stacked under `scan` (compile time must not grow with depth);
decoding unrolls them with one cache a layer, laid out [batch, kv heads, slots, head dim], written
at one shared pointer, which XLA updates in place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kdjax.base import Key, Model, Params
from kdjax.models.config import DecoderConfig
from kdjax.numerics import LMHead

Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]
"""(q [B,T,H,D], k [B,T,K,D], v [B,T,K,D]) -> (attended [B,T,H,D], what is kept of k and v)."""

LAYERS_A_ROUND = 4
"""Layers unrolled in each turn of the scan: compile time still does not grow with depth, and a
backward pass on CPU takes 0.83 of the time that it takes layer by layer (fewer copies into stacked
residuals)."""

# A layer's checkpoint name -> path in the parameters; kernels are stored transposed there.
LAYER_NAMES = {
    "input_layernorm.weight": ("attention_norm", "scale"),
    "post_attention_layernorm.weight": ("mlp_norm", "scale"),
    "self_attn.q_norm.weight": ("q_norm", "scale"),
    "self_attn.k_norm.weight": ("k_norm", "scale"),
    "self_attn.q_proj.weight": ("q_proj", "kernel"),
    "self_attn.k_proj.weight": ("k_proj", "kernel"),
    "self_attn.v_proj.weight": ("v_proj", "kernel"),
    "self_attn.o_proj.weight": ("o_proj", "kernel"),
    "mlp.gate_proj.weight": ("gate_proj", "kernel"),
    "mlp.up_proj.weight": ("up_proj", "kernel"),
    "mlp.down_proj.weight": ("down_proj", "kernel"),
}


class Layer(nnx.Module):
    """One decoder layer. What is kept of keys and values, and seen, is the caller's `attend`."""

    def __init__(self, config: DecoderConfig, dtype, *, rngs: nnx.Rngs):
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.theta = config.head_dim, config.rope_theta

        def linear(width_in: int, width_out: int) -> nnx.Linear:
            init = nnx.initializers.normal(0.02)
            return nnx.Linear(
                width_in, width_out, use_bias=False, dtype=dtype, kernel_init=init, rngs=rngs
            )

        def norm(width: int) -> nnx.RMSNorm:
            return nnx.RMSNorm(width, epsilon=config.rms_norm_eps, dtype=dtype, rngs=rngs)

        d, query, keys = (
            config.hidden_size,
            self.heads * self.head_dim,
            self.kv_heads * self.head_dim,
        )
        self.attention_norm, self.mlp_norm = norm(d), norm(d)
        self.q_norm, self.k_norm = norm(self.head_dim), norm(self.head_dim)
        self.q_proj, self.k_proj, self.v_proj = linear(d, query), linear(d, keys), linear(d, keys)
        self.o_proj = linear(query, d)
        self.gate_proj, self.up_proj = (
            linear(d, config.intermediate_size),
            linear(d, config.intermediate_size),
        )
        self.down_proj = linear(config.intermediate_size, d)

    def __call__(
        self, x: jax.Array, positions_bt: jax.Array, attend: Attend
    ) -> tuple[jax.Array, Any]:
        b, t, _ = x.shape
        y = self.attention_norm(x)
        q = self.q_norm(self.q_proj(y).reshape(b, t, self.heads, self.head_dim))
        k = self.k_norm(self.k_proj(y).reshape(b, t, self.kv_heads, self.head_dim))
        v = self.v_proj(y).reshape(b, t, self.kv_heads, self.head_dim)
        attended, kept = attend(
            rotate(q, positions_bt, self.theta), rotate(k, positions_bt, self.theta), v
        )
        x = x + self.o_proj(attended.reshape(b, t, -1))
        y = self.mlp_norm(x)
        return x + self.down_proj(nnx.silu(self.gate_proj(y)) * self.up_proj(y)), kept


def rotate(x: jax.Array, positions_bt: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding in float32, halves rotated as in Qwen3: x [B, T, H, D] -> same."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions_bt[..., None, None].astype(jnp.float32) * frequency[None, None, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def init_params(config: DecoderConfig, key: Key, dtype=jnp.float32) -> Params:
    """Random parameters (normal, deviation 0.02), layers stacked on axis 0."""
    embed_key, head_key, layer_key = jax.random.split(key, 3)

    def layer(key: Key):
        return nnx.to_pure_dict(nnx.state(Layer(config, dtype, rngs=nnx.Rngs(key)), nnx.Param))

    table = (config.vocab_size, config.hidden_size)
    params = {
        "embed": 0.02 * jax.random.normal(embed_key, table),
        "layers": jax.vmap(layer)(jax.random.split(layer_key, config.num_hidden_layers)),
        "norm": jnp.ones(config.hidden_size),
    }
    if not config.tie_word_embeddings:
        params["head"] = 0.02 * jax.random.normal(head_key, table)
    return params


@functools.lru_cache(maxsize=16)  # one Model a config, so that programs compiled for it are reused
def build(config: DecoderConfig, dtype=jnp.float32) -> Model:
    """The pure functions of a Qwen3 decoder that computes in `dtype` (parameters may be wider)."""
    abstract = nnx.eval_shape(lambda: Layer(config, dtype, rngs=nnx.Rngs(0)))
    layer_def, _ = nnx.split(abstract, nnx.Param)

    def run_layer(params: Params, x, positions_bt, attend: Attend):
        return nnx.merge(layer_def, nnx.State(params))(x, positions_bt, attend)

    def embed(params: Params, tokens):
        return params["embed"].astype(dtype)[tokens]

    def final_norm(params: Params, x):
        wide = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + config.rms_norm_eps)
        return (wide * scale * params["norm"][None, None]).astype(dtype)

    def hidden(params: Params, tokens_bs: jax.Array) -> jax.Array:
        positions = jnp.broadcast_to(jnp.arange(tokens_bs.shape[1]), tokens_bs.shape)

        attend = _causal_attention(tokens_bs.shape[1])

        def body(x, layer_params):
            return run_layer(layer_params, x, positions, attend)

        x, _ = jax.lax.scan(body, embed(params, tokens_bs), params["layers"], unroll=LAYERS_A_ROUND)
        return final_norm(params, x)

    def head(params: Params) -> LMHead:
        return LMHead(params["embed" if config.tie_word_embeddings else "head"])

    def init_cache(batch: int, slots: int):
        shape = (batch, config.num_key_value_heads, slots, config.head_dim)
        zeros = jnp.zeros(shape, dtype)
        return [(zeros, zeros) for _ in range(config.num_hidden_layers)]

    def extend(params: Params, tokens_bt, cache, pointer, start_b):
        slot = pointer + jnp.arange(tokens_bt.shape[1])
        positions = jnp.maximum(slot[None] - start_b[:, None], 0)
        x, new_cache = embed(params, tokens_bt), []
        for number, kept in enumerate(cache):
            layer_params = jax.tree.map(lambda w, n=number: w[n], params["layers"])
            x, kept = run_layer(
                layer_params, x, positions, _cached_attention(kept, pointer, start_b)
            )
            new_cache.append(kept)
        return final_norm(params, x), new_cache

    return Model(config, hidden, head, init_cache, extend)


def attention(
    q: jax.Array, keys_bksd: jax.Array, values_bksd: jax.Array, seen_bts: jax.Array
) -> jax.Array:
    """Grouped-query attention, softmax in float32: q [B, T, H, D] over S slots -> [B, T, H, D].

    The queries of a group are rows of one matrix, so keys and values are never repeated. `seen` is
    [B or 1, T, S], True where a query may look.
    """
    b, t, heads, head_dim = q.shape
    kv_heads = keys_bksd.shape[1]
    grouped = (
        q.reshape(b, t, kv_heads, -1, head_dim)
        .transpose(0, 2, 3, 1, 4)
        .reshape(b, kv_heads, -1, head_dim)
    )
    logits = jnp.einsum("bkqd,bksd->bkqs", grouped, keys_bksd, preferred_element_type=jnp.float32)
    seen = jnp.tile(seen_bts, (1, heads // kv_heads, 1))[:, None]
    weights = jax.nn.softmax(jnp.where(seen, logits * head_dim**-0.5, -1e30), axis=-1).astype(
        values_bksd.dtype
    )
    out = jnp.einsum("bkqs,bksd->bkqd", weights, values_bksd)
    return (
        out.reshape(b, kv_heads, -1, t, head_dim)
        .transpose(0, 3, 1, 2, 4)
        .reshape(b, t, heads, head_dim)
    )


def _causal_attention(length: int) -> Attend:
    """Attention of a whole sequence over itself; nothing is kept."""
    seen = jnp.tril(jnp.ones((1, length, length), bool))
    return lambda q, k, v: (attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), seen), None)


def _cached_attention(
    cache: tuple[jax.Array, jax.Array], pointer: jax.Array, start_b: jax.Array
) -> Attend:
    """Attention over slots start_b .. the query's own, after writing k and v at the pointer."""

    def attend(q, k, v):
        keys, values = (
            jax.lax.dynamic_update_slice(old, new.swapaxes(1, 2), (0, 0, pointer, 0))
            for old, new in zip(cache, (k, v), strict=True)
        )
        slot, own = jnp.arange(keys.shape[2]), pointer + jnp.arange(q.shape[1])
        seen = (slot[None] <= own[:, None])[None] & (slot[None, None] >= start_b[:, None, None])
        return attention(q, keys, values, seen), (keys, values)

    return attend
