"""A linear map with an optional bias and an optional low-rank adapter."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from kdjax.errors import ConfigError

PROJECTIONS = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    "in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj",
)  # fmt: skip
"""Those of attention, of MLPs and of linear attention."""


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Low-rank adapters (arXiv 2106.09685): y = x W + alpha / rank x A B at each target.

    Errors: ConfigError naming the field and what it got.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = PROJECTIONS

    def __post_init__(self):
        if self.rank < 1:
            raise ConfigError(f"lora.rank of an adapter must be at least 1, got {self.rank}")
        if not self.alpha > 0:
            raise ConfigError(f"lora.alpha must be above 0, got {self.alpha}")
        for name in self.targets:
            if name not in PROJECTIONS:
                raise ConfigError(
                    f"lora.targets: unknown projection {name!r}; there are {list(PROJECTIONS)}"
                )


class Linear(nnx.Module):
    """x [..., in] -> [..., out] in `dtype`.

    Args:
        width_in, width_out: in and out.
        bias: whether there is one.
        rank: of the adapter; 0 is none.
        scale: its alpha / rank.
        dtype: what it computes in.
        rngs: for the initial parameters.
    """

    def __init__(
        self,
        width_in: int,
        width_out: int,
        bias: bool,
        rank: int,
        scale: float,
        dtype,
        *,
        rngs: nnx.Rngs,
    ):
        self.dtype, self.scale, self.rank, self.with_bias = dtype, scale, rank, bias
        init = nnx.initializers.normal(0.02)
        self.kernel = nnx.Param(init(rngs.params(), (width_in, width_out), jnp.float32))
        if bias:
            self.bias = nnx.Param(jnp.zeros(width_out))
        if rank:
            # within 1 / sqrt(in), as peft draws it, so that learning rates found there hold here
            uniform = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
            self.lora_a = nnx.Param(uniform(rngs.params(), (width_in, rank), jnp.float32))
            self.lora_b = nnx.Param(jnp.zeros((rank, width_out)))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(self.dtype)
        y = x @ self.kernel.get_value().astype(self.dtype)
        if self.rank:
            a, b = (w.get_value().astype(self.dtype) for w in (self.lora_a, self.lora_b))
            y = y + (x @ a) @ b * jnp.asarray(self.scale, self.dtype)
        return y + self.bias.get_value().astype(self.dtype)[None, None] if self.with_bias else y
