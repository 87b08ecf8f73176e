"""The decoder of every supported family: grouped-query attention, rotary positions, SwiGLU or
experts.

Layers are Flax NNX modules, split once: callers get pure functions over a nested dict of arrays.
Training scans over stacked layers (compile time must not grow with depth); decoding unrolls them
with one cache a layer, [batch, kv heads, slots, head dim], written at one shared pointer, which XLA
updates in place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from kdjax.base import Key, Model, Params, random_key
from kdjax.errors import ConfigError
from kdjax.models.attention import attention
from kdjax.models.cache import CACHES, Keep, cached_attention
from kdjax.models.experts import Experts
from kdjax.models.linear import Linear, LoRA
from kdjax.models.quantized import Hold, held_by, is_quantized, scale_axes, used, with_barrier
from kdjax.models.rope import rotate
from kdjax.models.shape import DecoderConfig
from kdjax.numerics import LMHead
from kdjax.sharding import BATCH, EMBED, HEADS, KV_HEADS, MLP, VOCAB, constrain, lookup, shardings

Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]
"""(q [B,T,H,D], k [B,T,K,D], v [B,T,K,D]) -> (attended [B,T,H,D], the layer's cache or None)."""

LAYERS_A_ROUND = 4
"""Layers unrolled in each iteration of the scan without remat: compile time still does not grow
with depth, and a backward pass on CPU takes 0.83 of its time layer by layer (fewer copies into
stacked residuals)."""

POLICIES = jax.checkpoint_policies
REMAT: dict[str, Any] = {
    "none": None,
    "dots": POLICIES.dots_with_no_batch_dims_saveable,
    "full": POLICIES.nothing_saveable,
}
"""What a layer saves for its backward pass: everything, its matrix products, or its input alone."""

AXES: dict[str, tuple[str | None, ...]] = {
    "q_proj": (EMBED, HEADS),
    "k_proj": (EMBED, KV_HEADS),
    "v_proj": (EMBED, KV_HEADS),
    "o_proj": (HEADS, EMBED),
    "gate_proj": (EMBED, MLP),
    "up_proj": (EMBED, MLP),
    "down_proj": (MLP, EMBED),
    "router": (EMBED, None),
}
"""Logical axes (input, output) of each projection's kernel; experts' kernels have one axis more,
in front."""


class Layer(nnx.Module):
    """One decoder layer; the caller's `attend` decides what is seen, and what is cached."""

    def __init__(
        self, config: DecoderConfig, dtype, lora: LoRA | None, mesh: Mesh | None, *, rngs: nnx.Rngs
    ):
        self.config, self.mesh = config, mesh

        def linear(name: str, width_in: int, width_out: int, bias: bool = False) -> Linear:
            rank = lora.rank if lora is not None and name in lora.targets else 0
            scale = lora.alpha / lora.rank if lora is not None and rank else 0.0
            return Linear(width_in, width_out, bias, rank, scale, dtype, rngs=rngs)

        def norm(width: int) -> nnx.RMSNorm:
            return nnx.RMSNorm(width, epsilon=config.rms_norm_eps, dtype=dtype, rngs=rngs)

        d, m = config.hidden_size, config.intermediate_size
        query = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.attention_norm, self.mlp_norm = norm(d), norm(d)
        if config.qk_norm:
            self.q_norm, self.k_norm = norm(config.head_dim), norm(config.head_dim)
        self.q_proj = linear("q_proj", d, query, config.qkv_bias)
        self.k_proj = linear("k_proj", d, keys, config.qkv_bias)
        self.v_proj = linear("v_proj", d, keys, config.qkv_bias)
        self.o_proj = linear("o_proj", query, d, config.output_bias)
        if config.num_experts:
            self.experts = Experts(config, dtype, mesh, rngs=rngs)
        else:
            self.gate_proj, self.up_proj = linear("gate_proj", d, m), linear("up_proj", d, m)
            self.down_proj = linear("down_proj", m, d)

    def __call__(
        self, x: jax.Array, positions_bt: jax.Array, attend: Attend
    ) -> tuple[jax.Array, Any]:
        b, t, _ = x.shape
        config, place = self.config, functools.partial(constrain, self.mesh)
        y = self.attention_norm(x)
        q = self.q_proj(y).reshape(b, t, config.num_attention_heads, config.head_dim)
        k = self.k_proj(y).reshape(b, t, config.num_key_value_heads, config.head_dim)
        v = self.v_proj(y).reshape(b, t, config.num_key_value_heads, config.head_dim)
        if config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        attended, kept = attend(
            place(rotate(q, positions_bt, config), BATCH, None, HEADS, None),
            place(rotate(k, positions_bt, config), BATCH, None, KV_HEADS, None),
            place(v, BATCH, None, KV_HEADS, None),
        )
        x = place(x + self.o_proj(attended.reshape(b, t, -1)), BATCH, None, None)
        y = self.mlp_norm(x)
        out = self.experts(y) if config.num_experts else self._mlp(y)
        return place(x + out, BATCH, None, None), kept

    def _mlp(self, y: jax.Array) -> jax.Array:
        return self.down_proj(nnx.silu(self.gate_proj(y)) * self.up_proj(y))


def init_params(config: DecoderConfig, key: Key, lora: LoRA | None = None) -> Params:
    """Random parameters (normal, standard deviation 0.02), layers stacked on axis 0."""
    embed_key, head_key, layer_key = jax.random.split(key, 3)

    def layer(key: Key):
        made = Layer(config, jnp.float32, lora, None, rngs=nnx.Rngs(key))
        return nnx.to_pure_dict(nnx.state(made, nnx.Param))

    table = (config.vocab_size, config.hidden_size)
    params = {
        "embed": 0.02 * jax.random.normal(embed_key, table),
        "layers": jax.vmap(layer)(jax.random.split(layer_key, config.num_hidden_layers)),
        "norm": jnp.ones(config.hidden_size),
    }
    if not config.tie_word_embeddings:
        params["head"] = 0.02 * jax.random.normal(head_key, table)
    return params


def logical_axes(params: Params) -> Params:
    """The logical axis of every dimension of every parameter, as a tree of tuples."""

    def of(path, leaf) -> tuple[str | None, ...]:
        names = [p.key for p in path]
        if names[0] in ("embed", "head"):
            return (VOCAB, EMBED)
        if names[0] == "norm" or names[1] not in (*AXES, "experts"):
            return (None,) * leaf.ndim
        last = "kernel" if names[-1] in ("qvalue", "scale") else names[-1]
        module = names[names.index(last) - 1] if names[1] == "experts" else names[1]
        first, second = AXES[module]
        kinds = {"bias": (second,), "lora_a": (first, None), "lora_b": (None, second)}
        axes = kinds.get(last, (first, second))
        axes = scale_axes(axes) if names[-1] == "scale" else axes
        return (*(None,) * (leaf.ndim - len(axes)), *axes)

    return jax.tree_util.tree_map_with_path(of, params)


def abstract_params(
    config: DecoderConfig,
    dtype: DTypeLike,
    mesh: Mesh | None = None,
    lora: LoRA | None = None,
    hold: Hold | None = None,
) -> Params:
    """The parameters' shapes, a tree of ShapeDtypeStruct, layers stacked on axis 0.

    Args:
        config: the decoder's.
        dtype: that of kernels and tables; norms and biases, which `narrow` leaves alone, too, are
            float32 where it is narrower.
        mesh: gives each its sharding, by the rules of sharding.py.
        lora: adds the adapters' parameters.
        hold: int8 kernels where it quantises (models/quantized.py).
    """
    shapes = jax.eval_shape(lambda key: init_params(config, key, lora), random_key(0))
    wide = jnp.promote_types(dtype, jnp.float32)
    shapes = jax.tree.map(
        lambda s, axes: jax.ShapeDtypeStruct(s.shape, dtype if EMBED in axes else wide),
        shapes,
        logical_axes(shapes),
    )
    if hold is not None:
        shapes = jax.eval_shape(functools.partial(held_by, hold), shapes)
    if mesh is None:
        return shapes
    places = shardings(mesh, shapes, logical_axes(shapes))
    return jax.tree.map(
        lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, places
    )


def unstacked(params: Params) -> Params:
    """Parameters as decoding reads them: a list of layers, so that none is sliced from the stack at
    each token."""
    depth = jax.tree.leaves(params["layers"])[0].shape[0]
    apart = [jax.tree.map(lambda w, n=n: w[n], params["layers"]) for n in range(depth)]
    return {**params, "layers": apart}


def unstacked_axes(params: Params) -> Params:
    """`logical_axes` of `unstacked`, from the stacked parameters."""
    axes, depth = logical_axes(params), jax.tree.leaves(params["layers"])[0].shape[0]
    layer = jax.tree.map(lambda a: a[1:], axes["layers"], is_leaf=lambda a: isinstance(a, tuple))
    return {**axes, "layers": [layer] * depth}


def narrow(params: Params, dtype: DTypeLike) -> Params:
    """Kernels and tables cast to the compute `dtype`, in which they are read; norms and quantised
    kernels stay. The model's results are the same."""
    return jax.tree.map(
        lambda w, axes: w.astype(dtype) if not is_quantized(w) and EMBED in axes else w,
        params,
        logical_axes(params),
        is_leaf=is_quantized,
    )


@functools.lru_cache(maxsize=64)  # one Model a config, so that programs compiled for it are reused
def build(
    config: DecoderConfig,
    dtype: DTypeLike = jnp.float32,
    *,
    impl: str = "xla",
    remat: str = "none",
    lora: LoRA | None = None,
    mesh: Mesh | None = None,
    platform: str | None = None,
    kv_cache: str = "compute",
) -> Model:
    """A decoder as pure functions.

    Args:
        config: its shapes and options.
        dtype: what it computes in (parameters may be wider).
        impl: its attention of full sequences (models/attention.py).
        remat: what a layer saves for its backward pass (REMAT).
        lora: the adapters that its parameters have, if any.
        mesh: what parameters and activations are sharded over, by the rules of sharding.py.
        platform: what is compiled for, if not the mesh's or this process's.
        kv_cache: how decoding stores keys and values (CACHES in models/cache.py).

    Errors: ConfigError naming an unknown remat or cache.
    """
    if remat not in REMAT:
        raise ConfigError(f"unknown remat {remat!r}; there are {list(REMAT)}")
    if kv_cache not in CACHES:
        raise ConfigError(f"unknown kv_cache {kv_cache!r}; there are {list(CACHES)}")
    decoder = _Decoder(
        config,
        dtype,
        mesh,
        CACHES[kv_cache],
        layer_function(config, dtype, lora, mesh),
        functools.partial(
            attention, impl=impl, window=config.sliding_window, mesh=mesh, platform=platform
        ),
    )
    return Model(
        config,
        functools.partial(_hidden, decoder, remat),
        functools.partial(_head, config),
        functools.partial(_init_cache, decoder),
        functools.partial(_prefill, decoder),
        functools.partial(_extend, decoder),
    )


class _Decoder(NamedTuple):
    """The settings that a decoder's functions share: keep is how its cache stores keys and values,
    run_layer is made by `layer_function`, attention is that of full sequences."""

    config: DecoderConfig
    dtype: Any
    mesh: Mesh | None
    keep: Keep
    run_layer: Callable[..., Any]
    attention: Callable[..., jax.Array]

    def embed(self, params: Params, tokens: jax.Array) -> jax.Array:
        rows = lookup(self.mesh, params["embed"], tokens, self.dtype)
        return constrain(self.mesh, rows, BATCH, None, None)

    def final_norm(self, params: Params, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        variance = jnp.mean(wide * wide, axis=-1, keepdims=True)
        scale = jax.lax.rsqrt(variance + self.config.rms_norm_eps)
        return (wide * scale * params["norm"][None, None]).astype(self.dtype)


def _hidden(
    decoder: _Decoder, remat: str, params: Params, tokens_bs: jax.Array, segment_ids=None
) -> jax.Array:
    """`Model.hidden`."""
    positions = jnp.broadcast_to(jnp.arange(tokens_bs.shape[1]), tokens_bs.shape)

    def attend(q, k, v):
        return decoder.attention(q, k, v, segment_ids), None

    def body(x, layer_params):
        return decoder.run_layer(layer_params, x, positions, attend)

    if REMAT[remat] is not None:
        body = jax.checkpoint(body, policy=REMAT[remat], prevent_cse=False)
    unroll = LAYERS_A_ROUND if REMAT[remat] is None else 1
    x, _ = jax.lax.scan(body, decoder.embed(params, tokens_bs), params["layers"], unroll=unroll)
    return decoder.final_norm(params, x)


def _head(config: DecoderConfig, params: Params) -> LMHead:
    return LMHead(params["embed" if config.tie_word_embeddings else "head"])


def _init_cache(decoder: _Decoder, batch: int, slots: int):
    config, keep = decoder.config, decoder.keep
    shape = (batch, config.num_key_value_heads, slots, config.head_dim)
    zeros = jnp.zeros(shape, decoder.dtype)
    zeros = constrain(decoder.mesh, zeros, BATCH, KV_HEADS, None, None)
    return [(keep(zeros), keep(zeros)) for _ in range(config.num_hidden_layers)]


def _prefill(decoder: _Decoder, params: Params, tokens_bs: jax.Array):
    """`Model.prefill`."""
    positions, keep = (
        jnp.broadcast_to(jnp.arange(tokens_bs.shape[1]), tokens_bs.shape),
        decoder.keep,
    )

    def attend(q, k, v):
        return decoder.attention(q, k, v), tuple(keep(x.swapaxes(1, 2)) for x in (k, v))

    x, cache = decoder.embed(params, tokens_bs), []
    for layer_params in params["layers"]:
        x, kept = decoder.run_layer(layer_params, x, positions, attend)
        cache.append(kept)
    return decoder.final_norm(params, x), cache


def _extend(decoder: _Decoder, params: Params, tokens_bt, cache, pointer, start_b):
    """`Model.extend`."""
    slot = pointer + jnp.arange(tokens_bt.shape[1])
    positions = jnp.maximum(slot[None] - start_b[:, None], 0)
    window, keep = decoder.config.sliding_window, decoder.keep
    x, new_cache = decoder.embed(params, tokens_bt), []
    for layer_params, kept in zip(params["layers"], cache, strict=True):
        attend = cached_attention(kept, pointer, start_b, window, keep)
        x, kept = decoder.run_layer(layer_params, x, positions, attend)
        new_cache.append(kept)
    return decoder.final_norm(params, x), new_cache


def layer_function(config: DecoderConfig, dtype, lora: LoRA | None, mesh: Mesh | None):
    """run(a layer's parameters, x, positions_bt, attend) -> (x, the layer's cache or None);
    parameters are cast and gathered where the layer uses them."""
    abstract = nnx.eval_shape(lambda: Layer(config, dtype, lora, mesh, rngs=nnx.Rngs(0)))
    layer_def, layer_state = nnx.split(abstract, nnx.Param)
    layer_axes = logical_axes({"layers": nnx.to_pure_dict(layer_state)})["layers"]

    def run(params: Params, x, positions_bt, attend: Attend):
        params, x = with_barrier(params, x)
        whole = jax.tree.map(
            lambda w, axes: used(mesh, w, dtype, axes), params, layer_axes, is_leaf=is_quantized
        )
        return nnx.merge(layer_def, nnx.State(whole))(x, positions_bt, attend)

    return run
