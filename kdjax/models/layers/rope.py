"""Rotary positions: frequencies of every supported scaling, and the rotation itself."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.models.shape import Rope, RopeScaling


def rotate(x: jax.Array, positions_bt: jax.Array, rope: Rope) -> jax.Array:
    """Rotary position embedding in float32 of the first rope.width entries of a head, its halves
    rotated as in Llama: x [B, T, H, D] -> the same shape and dtype; positions_bt int [B, T]."""
    half = rope.width // 2
    frequency, amplitude = frequencies(rope)
    turns = jnp.asarray(frequency, jnp.float32)[None, None, None]
    angle = positions_bt[..., None, None].astype(jnp.float32) * turns
    cos, sin = amplitude * jnp.cos(angle), amplitude * jnp.sin(angle)
    first, second = (x[..., a : a + half].astype(jnp.float32) for a in (0, half))
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), x[..., rope.width :]], axis=-1)


def frequencies(rope: Rope) -> tuple[np.ndarray, float]:
    """(radians a position [width / 2], the factor on cosine and sine) of rotary positions.

    >>> frequencies(Rope(100.0, 4))[0].tolist()
    [1.0, 0.1]
    """
    half = rope.width // 2
    plain = rope.theta ** (-np.arange(half) / half)
    scaling = rope.scaling
    if scaling is None or scaling.rope_type == "dynamic":
        return plain, 1.0
    if scaling.rope_type == "longrope":
        return plain / np.array(scaling.short_factor), _sharpened(scaling)
    if scaling.rope_type == "linear":
        return plain / scaling.factor, 1.0
    if scaling.rope_type == "llama3":
        return _llama3(plain, scaling), 1.0
    return _yarn(plain, scaling, rope)


def _llama3(plain: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Llama 3.1: wavelengths past the trained context are stretched by the factor, short ones kept,
    those between interpolated."""
    turns = scaling.original_max_position_embeddings * plain / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return plain * (kept + (1 - kept) / scaling.factor)


def _sharpened(scaling: RopeScaling) -> float:
    """LongRoPE's factor (arXiv 2402.13753): the root of 1 + log(factor) / log(trained context)."""
    if scaling.attention_factor is not None or scaling.factor <= 1:
        return scaling.attention_factor or 1.0
    trained = scaling.original_max_position_embeddings
    return math.sqrt(1 + math.log(scaling.factor) / math.log(trained))


def _yarn(plain: np.ndarray, scaling: RopeScaling, rope: Rope) -> tuple[np.ndarray, float]:
    """YaRN (arXiv 2309.00071): frequencies with more than beta_fast turns in the trained context
    are kept, those with fewer than beta_slow stretched, those between on a ramp; attention is
    sharpened."""
    half, dim = len(plain), rope.width

    def dimension(turns: float) -> float:
        context = scaling.original_max_position_embeddings
        return dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = max(math.floor(dimension(scaling.beta_fast)), 0)
    high = min(math.ceil(dimension(scaling.beta_slow)), dim - 1)
    ramp = np.clip((np.arange(half) - low) / max(high - low, 1e-3), 0.0, 1.0)
    amplitude = scaling.attention_factor
    if amplitude is None:
        amplitude = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    return plain * (1 - ramp + ramp / scaling.factor), amplitude
