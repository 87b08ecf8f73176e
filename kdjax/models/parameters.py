"""The parameters of a decoder: a nested dict of arrays, made, shaped, sharded and unstacked.

    {"embed": [V, D], "layers": {"0": {...}, ...}, "norm": [D], "head": [V, D] where untied}

Layers of one place in a repeating block (shape.runs) are stacked on axis 0 under the number of the
first of them: {"0": all layers} where all are of one kind, {"0": .., "1": .., "2": .., "3": ..} for
three sliding layers and a full one, repeated.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from kdjax.base import Key, Params, random_key
from kdjax.models.layers.context import Settings
from kdjax.models.layers.layer import AXES, Layer
from kdjax.models.layers.linear import LoRA
from kdjax.models.quantized import Hold, held_by, is_quantized, scale_axes
from kdjax.models.shape import DecoderConfig, runs
from kdjax.sharding import EMBED, VOCAB, shardings


class LayerPlace(NamedTuple):
    """Where a layer's parameters are: params["layers"][stack], this one of axis 0."""

    stack: str
    repeat: int


@functools.lru_cache(maxsize=256)
def layer_places(config: DecoderConfig) -> tuple[LayerPlace, ...]:
    """The place of every layer, in order.

    >>> layer_places(DecoderConfig(10, 4, 8, 2, 2, 1, 2))[1]
    LayerPlace(stack='0', repeat=1)
    """
    return tuple(
        LayerPlace(str(run.first + position), repeat)
        for run in runs(config)
        for repeat in range(run.repeats)
        for position in range(len(run.block))
    )


def init_params(config: DecoderConfig, key: Key, lora: LoRA | None = None) -> Params:
    """Random parameters: normal, standard deviation 0.02; norms that change nothing."""
    embed_key, head_key, layer_key = jax.random.split(key, 3)
    keys, settings = (
        jax.random.split(layer_key, config.num_hidden_layers),
        Settings(config, jnp.float32, lora),
    )

    def layer(kind, key: Key):
        made = Layer(settings, kind, rngs=nnx.Rngs(key))
        return nnx.to_pure_dict(nnx.state(made, nnx.Param))

    table = (config.vocab_size, config.hidden_size)
    params = {
        "embed": 0.02 * jax.random.normal(embed_key, table),
        "layers": {
            str(run.first + position): jax.vmap(functools.partial(layer, kind))(
                keys[run.first : run.first + run.layers][position :: len(run.block)]
            )
            for run in runs(config)
            for position, kind in enumerate(run.block)
        },
        "norm": jnp.full(config.hidden_size, 1.0 - config.unit_offset),
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
        last = "kernel" if names[-1] in ("qvalue", "scale") and "kernel" in names else names[-1]
        module = names[names.index(last) - 1]
        if module not in AXES:
            return (None,) * leaf.ndim
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
    """The parameters' shapes, a tree of ShapeDtypeStruct.

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
    """Parameters as decoding reads them: a list of layers, so that none is sliced from a stack at
    each token."""
    layers = params["layers"]
    return {
        **params,
        "layers": [jax.tree.map(lambda w, n=n: w[n], layers[stack]) for stack, n in _order(layers)],
    }


def unstacked_axes(params: Params) -> Params:
    """`logical_axes` of `unstacked`, from the stacked parameters."""
    axes = logical_axes(params)
    layer = jax.tree.map(lambda a: a[1:], axes["layers"], is_leaf=lambda a: isinstance(a, tuple))
    return {**axes, "layers": [layer[stack] for stack, _ in _order(params["layers"])]}


def restacked(layers: Sequence[Params], config: DecoderConfig) -> Params:
    """The stacks of a config's layers, from a list of them: the inverse of `unstacked`."""
    stacks: dict[str, list[Params]] = {}
    for layer, place in zip(layers, layer_places(config), strict=True):
        stacks.setdefault(place.stack, []).append(layer)
    return {
        name: jax.tree.map(lambda *ws: jnp.stack(ws), *members) for name, members in stacks.items()
    }


def _order(layers: Params) -> list[LayerPlace]:
    """The places of all layers in order, read off the stacks: those of a block are neighbours and
    equally deep."""
    depths = {int(name): jax.tree.leaves(stack)[0].shape[0] for name, stack in layers.items()}
    places, first = [], 0
    while first in depths:
        repeats, size = depths[first], 1
        while first + size in depths and depths[first + size] == repeats:
            size += 1
        places += [LayerPlace(str(first + j), n) for n in range(repeats) for j in range(size)]
        first += repeats * size
    return places


def narrow(params: Params, dtype: DTypeLike) -> Params:
    """Kernels and tables cast to the compute `dtype`, in which they are read; norms and quantised
    kernels stay. The model's results are the same."""
    return jax.tree.map(
        lambda w, axes: w.astype(dtype) if not is_quantized(w) and EMBED in axes else w,
        params,
        logical_axes(params),
        is_leaf=is_quantized,
    )


@functools.lru_cache(maxsize=256)
def parameter_count(config: DecoderConfig, active: bool = False) -> int:
    """Parameters of the decoder's layers and norms, without embedding and head.

    `active` counts only the experts that a token passes through.

    >>> parameter_count(DecoderConfig(10, 4, 8, 1, 2, 1, 2))
    160
    """
    shapes = jax.eval_shape(lambda key: init_params(config, key), random_key(0))
    share = config.num_experts_per_tok / config.num_experts if config.num_experts else 1
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        names = [p.key for p in path]
        if names[0] not in ("embed", "head"):
            of_experts = "experts" in names and "router" not in names
            total += round(leaf.size * share) if active and of_experts else leaf.size
    return total
