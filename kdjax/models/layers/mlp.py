"""MLPs: their activations, and a mixture of experts without dropped tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from kdjax.models.layers.linear import Linear
from kdjax.models.shape import DecoderConfig
from kdjax.sharding import BATCH, MLP, map_sharded

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}
"""Activation of a gate, by transformers' name."""


class Stack(nnx.Module):
    """The experts' kernels, [experts, in, out]."""

    def __init__(self, experts: int, width_in: int, width_out: int, *, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        self.kernel = nnx.Param(init(rngs.params(), (experts, width_in, width_out), jnp.float32))


class Experts(nnx.Module):
    """Qwen3-MoE's MLP: x [B, T, D] -> [B, T, D].

    The router's softmax over all experts is float32; a token takes its top k, renormalised where
    the config says so. Tokens are sorted by expert and multiplied group by group
    (`jax.lax.ragged_dot`).
    """

    def __init__(self, config: DecoderConfig, dtype, mesh: Mesh | None, *, rngs: nnx.Rngs):
        self.config, self.dtype, self.mesh = config, dtype, mesh
        d, m, e = config.hidden_size, config.moe_intermediate_size, config.num_experts
        self.router = Linear(d, e, False, 0, 0.0, dtype, rngs=rngs)
        self.gate_proj, self.up_proj = Stack(e, d, m, rngs=rngs), Stack(e, d, m, rngs=rngs)
        self.down_proj = Stack(e, m, d, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        kernels = (
            w.kernel.get_value().astype(self.dtype)
            for w in (self.gate_proj, self.up_proj, self.down_proj)
        )
        probs = jax.nn.softmax(self.router(x).astype(jnp.float32), axis=-1)
        weights, chosen = jax.lax.top_k(probs, self.config.num_experts_per_tok)
        if self.config.norm_topk_prob:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        rows, columns = (BATCH, None, None), (None, None, MLP)
        return map_sharded(
            self.mesh,
            _mixture,
            (rows, rows, rows, columns, columns, (None, MLP, None)),
            rows,
            *(x, weights.astype(self.dtype), chosen, *kernels),
            summed=MLP,
        )


def _mixture(x_btd, weights_btk, chosen_btk, gate_edm, up_edm, down_emd) -> jax.Array:
    """Every token through its chosen experts -> [B, T, D]; a partial sum where M is sharded.

    Args:
        x_btd: [B, T, D].
        weights_btk, chosen_btk: the router's weights and expert numbers, [B, T, k].
        gate_edm, up_edm, down_emd: the experts' kernels, [E, D, M] twice and [E, M, D].
    """
    tokens, k = x_btd.reshape(-1, x_btd.shape[-1]), chosen_btk.shape[-1]
    chosen = chosen_btk.reshape(-1)
    order = jnp.argsort(chosen)
    sizes = jnp.bincount(chosen, length=gate_edm.shape[0]).astype(jnp.int32)
    rows = tokens[order // k]
    inner = jax.nn.silu(jax.lax.ragged_dot(rows, gate_edm, sizes))
    inner = inner * jax.lax.ragged_dot(rows, up_edm, sizes)
    out = jax.lax.ragged_dot(inner, down_emd, sizes)[jnp.argsort(order)]
    weighed = out.reshape(-1, k, out.shape[-1]) * weights_btk.reshape(-1, k, 1)
    return weighed.sum(axis=1).reshape(x_btd.shape)
