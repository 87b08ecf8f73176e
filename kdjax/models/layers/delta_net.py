"""Linear attention by the gated delta-net (arXiv 2412.06464), as in Qwen3.5: short convolutions,
a state that fades and is corrected token by token (models/layers/delta_rule.py), a gated norm."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kdjax.errors import ConfigError
from kdjax.models.layers.cache import Recurrent
from kdjax.models.layers.context import Context, Next, Settings
from kdjax.models.layers.delta_rule import causal_conv, chunked, conv_tail, normalised, recurrent
from kdjax.models.layers.norm import Norm
from kdjax.models.shape import DecoderConfig, LayerKind
from kdjax.sharding import BATCH, EMBED, HEADS, constrain, map_sharded, pieces

AXES: dict[str, tuple[str | None, ...]] = {
    "in_proj_qkv": (EMBED, HEADS),
    "in_proj_z": (EMBED, HEADS),
    "in_proj_a": (EMBED, None),
    "in_proj_b": (EMBED, None),
    "out_proj": (HEADS, EMBED),
}
"""Logical axes (input, output) of each projection's kernel."""

NAMES = {
    "linear_attn.in_proj_qkv.weight": ("in_proj_qkv", "kernel"),
    "linear_attn.in_proj_z.weight": ("in_proj_z", "kernel"),
    "linear_attn.in_proj_a.weight": ("in_proj_a", "kernel"),
    "linear_attn.in_proj_b.weight": ("in_proj_b", "kernel"),
    "linear_attn.out_proj.weight": ("out_proj", "kernel"),
    "linear_attn.conv1d.weight": ("conv",),
    "linear_attn.A_log": ("log_rate",),
    "linear_attn.dt_bias": ("step_bias",),
    "linear_attn.norm.weight": ("norm", "scale"),
}
"""Name in a checkpoint -> path in a layer's parameters."""


class DeltaNet(nnx.Module):
    """y [B, T, D] -> ([B, T, D], the layer's state, None where none is kept).

    log_decay = -exp(log_rate) softplus(in_proj_a y + step_bias), beta = sigmoid(in_proj_b y), both
    in float32; queries and keys have length 1.
    """

    def __init__(self, settings: Settings, kind: LayerKind, *, rngs: nnx.Rngs):
        del kind
        config, linear = settings.config, functools.partial(settings.linear, rngs=rngs)
        self.settings = settings
        d, values = config.hidden_size, config.linear_num_value_heads * config.linear_value_head_dim
        heads = config.linear_num_value_heads
        self.in_proj_qkv = linear("in_proj_qkv", d, _channels(config))
        self.in_proj_z = linear("in_proj_z", d, values)
        self.in_proj_a = linear("in_proj_a", d, heads)
        self.in_proj_b = linear("in_proj_b", d, heads)
        self.out_proj = linear("out_proj", values, d)
        width = config.linear_conv_kernel_dim
        uniform = jax.random.uniform(rngs.params(), (_channels(config), 1, width), minval=-1.0)
        self.conv = nnx.Param(width**-0.5 * uniform)
        rate = jax.random.uniform(rngs.params(), (heads,), minval=0.01, maxval=16.0)
        self.log_rate, self.step_bias = nnx.Param(jnp.log(rate)), nnx.Param(jnp.ones(heads))
        self.norm = Norm(
            config.linear_value_head_dim, config.rms_norm_eps, settings.dtype, False, rngs=rngs
        )

    def __call__(self, y: jax.Array, context: Context) -> tuple[jax.Array, Any]:
        if not isinstance(context, Next) and context.segment_ids is not None:
            raise ConfigError("segment_ids: a layer of linear attention reads one text a row")
        real = self._real(context)
        mixed = self.in_proj_qkv(y)
        mixed = mixed if real is None else jnp.where(real, mixed, 0)
        kernel_wc = self.conv.get_value()[:, 0].T
        tail = context.cache.tail if isinstance(context, Next) else None
        q, k, v = self._heads(jax.nn.silu(causal_conv(mixed, kernel_wc, tail)))
        beta = jax.nn.sigmoid(self.in_proj_b(y).astype(jnp.float32))
        steps = self.in_proj_a(y).astype(jnp.float32) + self.step_bias.get_value()[None, None]
        decay = -jnp.exp(self.log_rate.get_value())[None, None] * jax.nn.softplus(steps)
        if real is not None:
            beta, decay = (jnp.where(real, x, 0) for x in (beta, decay))
        out, state = self._rule(normalised(q), normalised(k), v, decay, beta, context)
        gate = jax.nn.silu(self.in_proj_z(y).reshape(out.shape).astype(jnp.float32))
        gated = (self.norm(out) * gate).astype(self.settings.dtype)
        return self.out_proj(gated.reshape(*y.shape[:2], -1)), self._kept(mixed, state, context)

    @staticmethod
    def _real(context: Context) -> jax.Array | None:
        """[B, T, 1], False at padding, which must leave the state as it is; None: no state is kept,
        and what follows a row's end does not change what is before it."""
        if isinstance(context, Next):
            return (context.pointer >= context.start_b)[:, None, None]
        if context.length_b is None:
            return None
        return (context.positions_bt < context.length_b[:, None])[..., None]

    def _heads(self, mixed: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries and keys [B, T, K, Dk], values [B, T, H, Dv]."""
        config, place = self.settings.config, functools.partial(constrain, self.settings.mesh)
        keys = config.linear_num_key_heads * config.linear_key_head_dim
        q, k, v = jnp.split(mixed, (keys, 2 * keys), axis=-1)
        q, k = (x.reshape(*x.shape[:2], -1, config.linear_key_head_dim) for x in (q, k))
        v = v.reshape(*v.shape[:2], -1, config.linear_value_head_dim)
        if config.linear_num_key_heads % pieces(self.settings.mesh, HEADS):
            group = config.linear_num_value_heads // config.linear_num_key_heads
            q, k = (jnp.repeat(x, group, axis=2) for x in (q, k))
        return tuple(place(x, BATCH, None, HEADS, None) for x in (q, k, v))  # type: ignore

    def _rule(self, q, k, v, decay, beta, context: Context) -> tuple[jax.Array, jax.Array]:
        """The delta rule on each device's own rows and heads. The first state is sharded like the
        others, so that its type is theirs where it is carried from chunk to chunk."""
        heads, gates = (BATCH, None, HEADS, None), (BATCH, None, HEADS)
        states = (BATCH, HEADS, None, None)
        if isinstance(context, Next):
            rule, before = recurrent, context.cache.state
        else:
            shape = v.shape[0], v.shape[2], k.shape[3], v.shape[3]
            rule, before = chunked, jnp.zeros(shape, jnp.float32)
        axes, args = [heads, heads, heads, gates, gates, states], (q, k, v, decay, beta, before)
        return map_sharded(self.settings.mesh, rule, axes, (heads, states), *args)

    def _kept(self, mixed: jax.Array, state: jax.Array, context: Context) -> Recurrent | None:
        if isinstance(context, Next):
            tail = jnp.concatenate([context.cache.tail, mixed], axis=1)[:, 1:]
            return Recurrent(state, tail)
        if context.length_b is None:
            return None
        width = self.settings.config.linear_conv_kernel_dim
        return Recurrent(state, conv_tail(mixed, context.length_b, width))

    @staticmethod
    def empty(settings: Settings, kind: LayerKind, batch: int, slots: int) -> Recurrent:
        """The state of a layer without a token; it is as large for any number of slots."""
        del kind, slots
        config, place = settings.config, functools.partial(constrain, settings.mesh)
        heads = batch, config.linear_num_value_heads
        state = jnp.zeros((*heads, config.linear_key_head_dim, config.linear_value_head_dim))
        tail = jnp.zeros(
            (batch, config.linear_conv_kernel_dim - 1, _channels(config)), settings.dtype
        )
        return Recurrent(place(state, BATCH, HEADS, None, None), place(tail, BATCH, None, None))


def _channels(config: DecoderConfig) -> int:
    """The width of the convolution: queries, keys and values of all heads."""
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    return 2 * keys + config.linear_num_value_heads * config.linear_value_head_dim
