"""The tensors of a checkpoint: each one's name, its place in the parameters, its shape."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax

from kdjax.base import random_key
from kdjax.models.layers import delta_net, self_attention
from kdjax.models.parameters import init_params, layer_places
from kdjax.models.shape import LINEAR, DecoderConfig, layer_kinds

Path = tuple[str, ...]

MLP: dict[str, Path] = {
    "mlp.gate_proj.weight": ("gate_proj", "kernel"),
    "mlp.up_proj.weight": ("up_proj", "kernel"),
    "mlp.down_proj.weight": ("down_proj", "kernel"),
    "mlp.gate_proj.bias": ("gate_proj", "bias"),
    "mlp.up_proj.bias": ("up_proj", "bias"),
    "mlp.down_proj.bias": ("down_proj", "bias"),
    "mlp.gate.weight": ("experts", "router", "kernel"),
    "mlp.experts.{}.gate_proj.weight": ("experts", "gate_proj", "kernel"),
    "mlp.experts.{}.up_proj.weight": ("experts", "up_proj", "kernel"),
    "mlp.experts.{}.down_proj.weight": ("experts", "down_proj", "kernel"),
}
NORMS: dict[str, dict[str, Path]] = {
    "before": {
        "input_layernorm.weight": ("attention_norm", "scale"),
        "post_attention_layernorm.weight": ("mlp_norm", "scale"),
    },
    "after": {
        "post_attention_layernorm.weight": ("attention_post_norm", "scale"),
        "post_feedforward_layernorm.weight": ("mlp_post_norm", "scale"),
    },
    "sandwich": {
        "input_layernorm.weight": ("attention_norm", "scale"),
        "post_attention_layernorm.weight": ("attention_post_norm", "scale"),
        "pre_feedforward_layernorm.weight": ("mlp_norm", "scale"),
        "post_feedforward_layernorm.weight": ("mlp_post_norm", "scale"),
    },
}
"""Placement of norms -> their names."""


class Place(NamedTuple):
    """A checkpoint tensor's place in the parameters: params[path][at] (a layer, then an expert).

    shape is that in the file, where kernels are [out, in] and so are transposed.
    """

    path: Path
    at: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def turned(self) -> bool:
        return self.path[-1] == "kernel"


def layer_table(config: DecoderConfig, layer: int) -> dict[str, Path]:
    """Checkpoint name within a layer -> path within its parameters, where some layer of the kind
    has one; {} stands for an expert.

    >>> layer_table(DecoderConfig(10, 4, 8, 1, 2, 1, 2), 0)["self_attn.q_norm.weight"]
    ('mixer', 'q_norm', 'scale')
    """
    linear = layer_kinds(config)[layer].mixer == LINEAR
    mixer = delta_net.NAMES if linear else self_attention.NAMES
    mixed = {name: ("mixer", *path) for name, path in mixer.items()}
    return NORMS[config.norms] | mixed | MLP


@functools.lru_cache(maxsize=32)
def tensors(config: DecoderConfig) -> dict[str, Place]:
    """Every tensor that a checkpoint of this config holds, by its name, layer by layer."""
    params = jax.eval_shape(lambda key: init_params(config, key), random_key(0))
    shapes = {
        tuple(p.key for p in path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }

    def place(path: Path, at: tuple[int, ...] = ()) -> Place:
        shape = shapes[path][len(at) :]
        return Place(path, at, shape[::-1] if path[-1] == "kernel" else shape)

    places = {"model.embed_tokens.weight": place(("embed",))}
    for layer, (stack, index) in enumerate(layer_places(config)):
        for name, own in layer_table(config, layer).items():
            path = ("layers", stack, *own)
            if path not in shapes:
                continue
            experts = [(n,) for n in range(config.num_experts)] if "{}" in name else [()]
            for expert in experts:
                full = f"model.layers.{layer}.{name.format(*expert)}"
                places[full] = place(path, (index, *expert))
    places["model.norm.weight"] = place(("norm",))
    if not config.tie_word_embeddings:
        places["lm_head.weight"] = place(("head",))
    return places
