"""Root-mean-square normalisation against float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kdjax.models.layers.norm import Norm

EPSILON = 1e-5


def normed(x, scale, unit_offset: bool, dtype=jnp.float32):
    norm = Norm(x.shape[-1], EPSILON, dtype, unit_offset, rngs=nnx.Rngs(0))
    norm.scale.set_value(scale)
    return norm(x)


def oracle(x, scale, unit_offset: bool) -> np.ndarray:
    x, factor = np.asarray(x, np.float64), unit_offset + np.asarray(scale, np.float64)
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + EPSILON) * factor


@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0, 1e4])
def test_norms_are_exact_to_float32(size, unit_offset):
    """Rows of any size, far below the root of epsilon, too: within 4e-7 of float64, relatively."""
    rng = np.random.default_rng(0)
    x = jnp.float32(size * rng.normal(size=(3, 5, 96)))
    scale = jnp.float32(rng.normal(size=96))
    found, expected = normed(x, scale, unit_offset), oracle(x, scale, unit_offset)
    room = np.abs(x) / np.sqrt(size**2 + EPSILON)  # a scale near -1 cancels the offset
    assert (np.abs(found - expected) <= 4e-7 * (np.abs(expected) + room)).all()


def test_bfloat16_is_rounded_once():
    """Rows and result in bfloat16: what float32 gives of the same rows, rounded."""
    rng = np.random.default_rng(1)
    x = jnp.bfloat16(rng.normal(size=(4, 96)))
    scale = jnp.float32(1 + 0.3 * rng.normal(size=96))
    narrow = normed(x, scale, False, jnp.bfloat16)
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_array_equal(narrow, normed(x, scale, False).astype(jnp.bfloat16))


@pytest.mark.parametrize("unit_offset", [False, True])
def test_a_new_norm_multiplies_by_one(unit_offset):
    norm = Norm(8, EPSILON, jnp.float32, unit_offset, rngs=nnx.Rngs(0))
    x = jnp.arange(8.0) - 3
    np.testing.assert_allclose(norm(x), oracle(x, 1 - unit_offset, unit_offset), rtol=1e-6)


def test_the_gradient_at_zero_is_finite():
    """A row of zeros (padding, say) is divided by the root of epsilon."""
    slopes = jax.grad(lambda x: normed(x, jnp.ones(4), False).sum())(jnp.zeros(4))
    np.testing.assert_allclose(slopes, EPSILON**-0.5, rtol=1e-6)
