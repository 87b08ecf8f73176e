"""The decoder of every supported family, as pure functions of its parameters.

Layers are Flax NNX modules (models/layers/layer.py), split once: callers get functions over a
nested dict of arrays. Training scans over repeating blocks of layer kinds (compile time must not
grow with depth); decoding unrolls the layers with one cache each (models/layers/cache.py), which
XLA updates in place.
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

from kdjax.base import Model, Params
from kdjax.errors import ConfigError
from kdjax.models.layers.cache import CACHES
from kdjax.models.layers.context import Context, Next, Settings, Whole
from kdjax.models.layers.layer import MIXERS, Layer
from kdjax.models.layers.linear import LoRA
from kdjax.models.parameters import logical_axes
from kdjax.models.quantized import is_quantized, used, with_barrier
from kdjax.models.shape import DecoderConfig, LayerKind, layer_kinds, runs
from kdjax.numerics import LMHead
from kdjax.sharding import BATCH, constrain, lookup

LAYERS_A_ROUND = 4
"""Layers unrolled, at most, in each iteration of the scan without remat (a block of more kinds than
that is one iteration): compile time still does not grow with depth, and a backward pass on CPU
takes 0.83 of its time layer by layer (fewer copies into stacked residuals)."""

POLICIES = jax.checkpoint_policies
REMAT: dict[str, Any] = {
    "none": None,
    "dots": POLICIES.dots_with_no_batch_dims_saveable,
    "full": POLICIES.nothing_saveable,
}
"""What a layer saves for its backward pass: everything, its matrix products, or its input alone."""

RunLayer = Callable[[Params, jax.Array, Context], tuple[jax.Array, Any]]
"""(a layer's parameters, x, context) -> (x, what decoding needs of the layer or None)."""


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
        impl: its attention of full sequences (models/layers/attention.py).
        remat: what a layer saves for its backward pass (REMAT).
        lora: the adapters that its parameters have, if any.
        mesh: what parameters and activations are sharded over, by the rules of sharding.py.
        platform: what is compiled for, if not the mesh's or this process's.
        kv_cache: how decoding stores keys and values (CACHES in models/layers/cache.py).

    Errors: ConfigError naming an unknown remat or cache.
    """
    if remat not in REMAT:
        raise ConfigError(f"unknown remat {remat!r}; there are {list(REMAT)}")
    if kv_cache not in CACHES:
        raise ConfigError(f"unknown kv_cache {kv_cache!r}; there are {list(CACHES)}")
    settings = Settings(config, dtype, lora, mesh, impl, platform, CACHES[kv_cache])
    decoder = _Decoder(
        settings, {kind: layer_function(settings, kind) for kind in layer_kinds(config)}
    )
    return Model(
        config,
        functools.partial(_hidden, decoder, remat),
        functools.partial(_head, config),
        functools.partial(_init_cache, settings),
        functools.partial(_prefill, decoder),
        functools.partial(_extend, decoder),
    )


class _Decoder(NamedTuple):
    """What a decoder's functions share: the layers' settings, and how each kind of layer is run."""

    settings: Settings
    run: dict[LayerKind, RunLayer]

    def embed(self, params: Params, tokens: jax.Array) -> jax.Array:
        config, mesh, dtype = self.settings.config, self.settings.mesh, self.settings.dtype
        rows = lookup(mesh, params["embed"], tokens, dtype)
        if config.scale_embedding:
            rows = rows * jnp.asarray(config.hidden_size**0.5, dtype)
        return constrain(mesh, rows, BATCH, None, None)

    def final_norm(self, params: Params, x: jax.Array) -> jax.Array:
        config, wide = self.settings.config, x.astype(jnp.float32)
        variance = jnp.mean(wide * wide, axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(variance + config.rms_norm_eps)
        factor = params["norm"] + config.unit_offset if config.unit_offset else params["norm"]
        return (normed * factor[None, None]).astype(self.settings.dtype)


def _hidden(
    decoder: _Decoder, remat: str, params: Params, tokens_bs: jax.Array, segment_ids=None
) -> jax.Array:
    """`Model.hidden`."""
    positions = jnp.broadcast_to(jnp.arange(tokens_bs.shape[1]), tokens_bs.shape)
    context, policy = Whole(positions, segment_ids), REMAT[remat]

    def layer(kind: LayerKind):
        def run(x, layer_params):
            return decoder.run[kind](layer_params, x, context)[0]

        return run if policy is None else jax.checkpoint(run, policy=policy, prevent_cse=False)

    def block_of(kinds: tuple[LayerKind, ...]):
        layers = [layer(kind) for kind in kinds]

        def block(x, block_params):
            for run, layer_params in zip(layers, block_params, strict=True):
                x = run(x, layer_params)
            return x, None

        return block

    x = decoder.embed(params, tokens_bs)
    for run in runs(decoder.settings.config):
        stacks = [params["layers"][str(run.first + j)] for j in range(len(run.block))]
        unroll = _unrolled(run.repeats, len(run.block)) if policy is None else 1
        x, _ = jax.lax.scan(block_of(run.block), x, stacks, unroll=unroll)
    return decoder.final_norm(params, x)


def _unrolled(repeats: int, layers: int) -> int:
    """Blocks of so many layers that an iteration of the scan unrolls. They divide the repeats: of a
    scan with a remainder XLA slices the others off, a copy of nearly all weights at each pass.

    >>> _unrolled(28, 1), _unrolled(30, 1), _unrolled(3, 1), _unrolled(6, 2)
    (4, 3, 3, 2)
    """
    most = -(-LAYERS_A_ROUND // layers)
    return max(n for n in range(1, most + 1) if repeats % n == 0)


def _head(config: DecoderConfig, params: Params) -> LMHead:
    return LMHead(params["embed" if config.tie_word_embeddings else "head"])


def _init_cache(settings: Settings, batch: int, slots: int):
    """`Model.init_cache`."""
    kinds = layer_kinds(settings.config)
    return [MIXERS[kind.mixer].empty(settings, kind, batch, slots) for kind in kinds]


def _prefill(decoder: _Decoder, params: Params, tokens_bs: jax.Array, length_b: jax.Array):
    """`Model.prefill`."""
    positions = jnp.broadcast_to(jnp.arange(tokens_bs.shape[1]), tokens_bs.shape)
    context = Whole(positions, length_b=length_b)
    x, cache = decoder.embed(params, tokens_bs), []
    for kind, own in zip(layer_kinds(decoder.settings.config), params["layers"], strict=True):
        x, kept = decoder.run[kind](own, x, context)
        cache.append(kept)
    return decoder.final_norm(params, x), cache


def _extend(decoder: _Decoder, params: Params, token_b, cache, pointer, start_b):
    """`Model.extend`."""
    positions = jnp.maximum(pointer - start_b, 0)[:, None]
    kinds = layer_kinds(decoder.settings.config)
    x, new_cache = decoder.embed(params, token_b[:, None]), []
    for kind, own, kept in zip(kinds, params["layers"], cache, strict=True):
        x, kept = decoder.run[kind](own, x, Next(positions, pointer, start_b, kept))
        new_cache.append(kept)
    return decoder.final_norm(params, x)[:, 0], new_cache


def layer_function(settings: Settings, kind: LayerKind) -> RunLayer:
    """How a layer of a kind is run; parameters are cast and gathered where the layer uses them."""
    abstract = nnx.eval_shape(lambda: Layer(settings, kind, rngs=nnx.Rngs(0)))
    layer_def, layer_state = nnx.split(abstract, nnx.Param)
    axes = logical_axes({"layers": {"0": nnx.to_pure_dict(layer_state)}})["layers"]["0"]
    mesh, dtype = settings.mesh, settings.dtype

    def run(params: Params, x: jax.Array, context: Context):
        params, x = with_barrier(params, x)
        whole = jax.tree.map(
            lambda w, axes: used(mesh, w, dtype, axes), params, axes, is_leaf=is_quantized
        )
        return nnx.merge(layer_def, nnx.State(whole))(x, context)

    return run
