"""How a layer is run: the settings that a decoder's layers share, and the tokens that they read."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh

from kdjax.models.layers.cache import CACHES, Keep
from kdjax.models.layers.linear import Linear, LoRA
from kdjax.models.layers.norm import Norm
from kdjax.models.shape import DecoderConfig


class Settings(NamedTuple):
    """The settings of a decoder's layers, as in `decoder.build`; keep: how keys and values are
    cached."""

    config: DecoderConfig
    dtype: Any
    lora: LoRA | None = None
    mesh: Mesh | None = None
    impl: str = "xla"
    platform: str | None = None
    keep: Keep = CACHES["compute"]

    def linear(
        self, name: str, width_in: int, width_out: int, bias: bool = False, *, rngs: nnx.Rngs
    ) -> Linear:
        """A projection, with an adapter where LoRA names it."""
        lora = self.lora if self.lora is not None and name in self.lora.targets else None
        rank, scale = (lora.rank, lora.alpha / lora.rank) if lora is not None else (0, 0.0)
        return Linear(width_in, width_out, bias, rank, scale, self.dtype, rngs=rngs)

    def norm(self, width: int, *, rngs: nnx.Rngs) -> Norm:
        config = self.config
        return Norm(width, config.rms_norm_eps, self.dtype, config.unit_offset, rngs=rngs)


class Whole(NamedTuple):
    """Full right-padded rows. length_b, int32 [B]: what decoding needs of the first so many tokens
    is kept; None: nothing is. segment_ids as in `attention`."""

    positions_bt: jax.Array
    segment_ids: jax.Array | None = None
    length_b: jax.Array | None = None


class Next(NamedTuple):
    """The next token of each row: its slot, the row's first slot that is not padding, and the
    layer's cache of those before it."""

    positions_bt: jax.Array
    pointer: jax.Array
    start_b: jax.Array
    cache: Any


Context = Whole | Next
