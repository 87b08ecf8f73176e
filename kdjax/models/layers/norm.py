"""Root-mean-square normalisation, in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx


class Norm(nnx.Module):
    """x / sqrt(mean(x^2) + epsilon) times the scale over the last axis, in `dtype`.

    Args:
        width: of the last axis.
        epsilon: under the root.
        dtype: of the result.
        unit_offset: whether the factor is 1 + scale, as in Gemma.
        rngs: unused; the factor begins as 1.
    """

    def __init__(self, width: int, epsilon: float, dtype, unit_offset: bool, *, rngs: nnx.Rngs):
        del rngs
        self.epsilon, self.dtype, self.offset = epsilon, dtype, float(unit_offset)
        self.scale = nnx.Param(jnp.full(width, 1 - self.offset))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        mean = jnp.mean(wide * wide, axis=-1, keepdims=True)
        scale = self.offset + self.scale.get_value().astype(jnp.float32)
        scale = scale.reshape((1,) * (x.ndim - 1) + scale.shape)
        return (wide * (jax.lax.rsqrt(mean + self.epsilon) * scale)).astype(self.dtype)
