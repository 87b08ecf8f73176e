"""One decoder layer: a mixer of positions by its kind, a gated MLP or experts, norms and sums."""

from __future__ import annotations

import functools
from typing import Any

import jax
from flax import nnx

from kdjax.models.layers import delta_net, self_attention
from kdjax.models.layers.context import Context, Settings
from kdjax.models.layers.mlp import ACTIVATIONS, Experts
from kdjax.models.shape import FULL, LINEAR, SLIDING, LayerKind
from kdjax.sharding import BATCH, EMBED, MLP, constrain

MIXERS: dict[str, Any] = {
    FULL: self_attention.SelfAttention,
    SLIDING: self_attention.SelfAttention,
    LINEAR: delta_net.DeltaNet,
}
"""Kind of layer -> its class, (settings, kind, rngs) -> (y, context) -> (mixed, cache); its
`empty(settings, kind, batch, slots)` is the cache without a token."""

AXES: dict[str, tuple[str | None, ...]] = {
    **self_attention.AXES,
    **delta_net.AXES,
    "gate_proj": (EMBED, MLP),
    "up_proj": (EMBED, MLP),
    "down_proj": (MLP, EMBED),
    "router": (EMBED, None),
}
"""Logical axes (input, output) of each projection's kernel; experts' kernels have one axis more,
in front."""


class Layer(nnx.Module):
    """x [B, T, D] -> (x [B, T, D], what decoding needs of it, None where nothing is kept)."""

    def __init__(self, settings: Settings, kind: LayerKind, *, rngs: nnx.Rngs):
        config = settings.config
        linear = functools.partial(settings.linear, bias=config.mlp_bias, rngs=rngs)
        self.settings = settings
        d, m = config.hidden_size, config.intermediate_size
        norm = functools.partial(settings.norm, d, rngs=rngs)
        if config.norms != "after":
            self.attention_norm, self.mlp_norm = norm(), norm()
        if config.norms != "before":
            self.attention_post_norm, self.mlp_post_norm = norm(), norm()
        self.mixer = MIXERS[kind.mixer](settings, kind, rngs=rngs)
        if config.num_experts:
            self.experts = Experts(config, settings.dtype, settings.mesh, rngs=rngs)
        else:
            self.gate_proj, self.up_proj = linear("gate_proj", d, m), linear("up_proj", d, m)
            self.down_proj = linear("down_proj", m, d)

    def __call__(self, x: jax.Array, context: Context) -> tuple[jax.Array, Any]:
        norms = self.settings.config.norms
        place = functools.partial(constrain, self.settings.mesh)
        y = x if norms == "after" else self.attention_norm(x)
        mixed, kept = self.mixer(y, context)
        x = place(x + (mixed if norms == "before" else self.attention_post_norm(mixed)), *ROWS)
        y = x if norms == "after" else self.mlp_norm(x)
        out = self.experts(y) if self.settings.config.num_experts else self._mlp(y)
        return place(x + (out if norms == "before" else self.mlp_post_norm(out)), *ROWS), kept

    def _mlp(self, y: jax.Array) -> jax.Array:
        activation = ACTIVATIONS[self.settings.config.hidden_act]
        return self.down_proj(activation(self.gate_proj(y)) * self.up_proj(y))


ROWS = (BATCH, None, None)
