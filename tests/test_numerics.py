"""The float32 boundary, against float64 NumPy at the vocabulary of Qwen3."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.numerics import LMHead, entropy, expectation, gather_last, log_probs, project

V = 151_936


@pytest.fixture(scope="module")
def logits() -> np.ndarray:
    """Two rows of signed logits: a sharp one (standard deviation 30) and a flat one (0.5)."""
    rng = np.random.default_rng(0)
    return (rng.normal(size=(2, V)) * np.array([[30.0], [0.5]])).astype(np.float32)


def log_softmax64(logits: np.ndarray) -> np.ndarray:
    wide = np.asarray(logits, np.float64)
    wide = wide - wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.0])
def test_log_probs_at_a_full_vocabulary(logits, temperature):
    """log softmax(logits / temperature) is the float64 one, and its exponentials sum to 1."""
    logp = log_probs(jnp.asarray(logits), temperature)
    assert logp.dtype == jnp.float32
    expected = log_softmax64(logits.astype(np.float64) / temperature)
    np.testing.assert_allclose(logp, expected, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(np.exp(np.float64(logp)).sum(-1), 1, atol=1e-5)


def test_log_probs_widens_before_it_sums(logits):
    """bfloat16 logits give float32 log-probabilities, as if they had been float32 all along."""
    narrow = jnp.asarray(logits, jnp.bfloat16)
    logp = log_probs(narrow)
    assert logp.dtype == jnp.float32
    expected = log_softmax64(np.asarray(narrow, np.float64))
    np.testing.assert_allclose(logp, expected, rtol=1e-6, atol=1e-5)


def test_log_probs_keeps_float64():
    """ "At least float32": float64 logits are not narrowed."""
    with jax.enable_x64(True):
        logits64 = jnp.asarray(np.linspace(-3, 3, 7))
        np.testing.assert_allclose(log_probs(logits64), log_softmax64(logits64), rtol=1e-15)


def test_entropy_at_a_full_vocabulary(logits):
    """-sum p log p is the float64 one; uniform gives log V, certain gives 0."""
    wide = log_softmax64(logits)
    expected = -(np.exp(wide) * wide).sum(-1)
    np.testing.assert_allclose(
        entropy(log_probs(jnp.asarray(logits))), expected, rtol=1e-5, atol=1e-7
    )
    np.testing.assert_allclose(entropy(log_probs(jnp.zeros(V))), np.log(V), rtol=1e-6)
    certain = jnp.where(jnp.arange(V) == 7, 0.0, -jnp.inf)
    assert float(entropy(certain)) == 0.0


def test_expectation_at_a_full_vocabulary(logits):
    """sum_v p value is the float64 one, for signed values."""
    value = np.random.default_rng(1).normal(size=(2, V)).astype(np.float32)
    expected = (np.exp(log_softmax64(logits)) * value).sum(-1)
    measured = expectation(log_probs(jnp.asarray(logits)), jnp.asarray(value))
    np.testing.assert_allclose(measured, expected, atol=1e-5)


@pytest.mark.parametrize("impossible", [-np.inf, -500.0], ids=["excluded", "underflow"])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_expectation_of_the_impossible_adds_nothing(impossible, value):
    """An entry of zero probability adds 0, whatever its value, with a gradient of 0, not NaN."""
    logp = jnp.array([np.log(0.25), np.log(0.75), impossible], jnp.float32)
    values = jnp.array([4.0, 8.0, value], jnp.float32)
    mean, gradients = jax.value_and_grad(expectation, argnums=(0, 1))(logp, values)
    np.testing.assert_allclose(mean, 7.0, rtol=1e-6)
    np.testing.assert_allclose(gradients[0], [1.0, 6.0, 0.0], rtol=1e-6)
    np.testing.assert_allclose(gradients[1], [0.25, 0.75, 0.0], rtol=1e-6)


def test_gather_last_at_a_full_vocabulary(logits):
    """values [..., V] at index [...], the first and the last column included."""
    index = np.array([[0, V - 1, 17], [V - 1, 0, 99_999]])
    values = np.broadcast_to(logits[:, None], (2, 3, V))
    picked = gather_last(jnp.asarray(values), jnp.asarray(index))
    np.testing.assert_array_equal(
        picked, [[values[b, t, index[b, t]] for t in range(3)] for b in range(2)]
    )


def test_leading_axes_are_free():
    """[..., V] -> [...]: one call on [2, 3, V] is two vmaps over rows."""
    logits = jnp.asarray(np.random.default_rng(2).normal(size=(2, 3, 8)), jnp.float32)
    for function in (lambda z: entropy(log_probs(z)), lambda z: gather_last(z, z.argmax(-1))):
        whole = function(logits)
        chex.assert_shape(whole, (2, 3))
        chex.assert_trees_all_close(whole, jax.jit(jax.vmap(jax.vmap(function)))(logits), rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_project_at_a_full_vocabulary(dtype):
    """hidden @ head.T is the float64 product of the same inputs, in float32 even from bfloat16."""
    rng = np.random.default_rng(3)
    hidden = jnp.asarray(rng.normal(size=(2, 2, 16)) * 4, dtype)
    head = jnp.asarray(rng.normal(size=(V, 16)) * 2, dtype)
    logits = project(hidden, LMHead(head))
    assert logits.dtype == jnp.float32
    chex.assert_shape(logits, (2, 2, V))
    expected = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=2e-4)
