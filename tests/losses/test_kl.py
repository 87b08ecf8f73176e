"""Forward and reverse KL: equal to optax's, 0 for identical models, with the paper's gradients."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdjax import forward_kl, reverse_kl
from kdjax.numerics import log_probs

LOSSES = [forward_kl, reverse_kl]
both = pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)


def normal_logits(seed: int, *shape: int, scale: float = 30.0) -> np.ndarray:
    """Signed float32 logits; a deviation of 30 shows faults that small or positive ones hide."""
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


def log_softmax64(logits: np.ndarray) -> np.ndarray:
    wide = np.asarray(logits, np.float64)
    wide = wide - wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def kl64(first_logits: np.ndarray, second_logits: np.ndarray) -> np.ndarray:
    """KL(first || second) in float64, over the entries where the first has mass."""
    first, second = log_softmax64(first_logits), log_softmax64(second_logits)
    possible = np.exp(first) > 0
    with np.errstate(invalid="ignore"):
        return np.where(possible, np.exp(first) * (first - second), 0).sum(-1)


def of_logits(loss):
    """The loss as a function of both models' logits, the teacher a constant."""

    @jax.jit
    def of_both(student, teacher):
        return loss(log_probs(student), jax.lax.stop_gradient(log_probs(teacher)))

    return of_both


def directed(loss, student, teacher):
    """(first, second) of the KL that the loss claims to be: KL(first || second)."""
    return (teacher, student) if loss is forward_kl else (student, teacher)


@both
def test_equals_float64_reference(loss):
    """On signed logits of standard deviation 30 the float32 value is the float64 one to 1e-5."""
    student, teacher = normal_logits(0, 3, 4096), normal_logits(1, 3, 4096)
    expected = kl64(*directed(loss, student, teacher))
    np.testing.assert_allclose(of_logits(loss)(student, teacher), expected, rtol=1e-5)


@both
def test_equals_optax(loss):
    """forward_kl is optax's KL with the teacher as target, reverse_kl with the student."""
    student_logp = log_probs(normal_logits(0, 5, 64, scale=3.0))
    teacher_logp = log_probs(normal_logits(1, 5, 64, scale=3.0))
    first, second = directed(loss, student_logp, teacher_logp)
    expected = optax.losses.kl_divergence(log_predictions=second, targets=jnp.exp(first))
    np.testing.assert_allclose(loss(student_logp, teacher_logp), expected, rtol=1e-5)


@both
@pytest.mark.parametrize("compiled", [True, False], ids=["jit", "eager"])
def test_identical_models_give_exactly_zero(loss, compiled):
    """KL(p || p) = 0 and its gradient in the logits is 0: exactly, in float32, at V = 4,096."""
    total = jax.jit(jax.value_and_grad(lambda s, t: of_logits(loss)(s, t).sum()))
    for scale in (0.1, 3.0, 30.0):
        logits = normal_logits(2, 2, 4096, scale=scale)
        with jax.disable_jit(not compiled):
            value, gradient = total(logits, logits)
        assert float(value) == 0.0
        np.testing.assert_array_equal(gradient, np.zeros_like(logits))


@both
@pytest.mark.parametrize("apart", [1e-3, 30.0], ids=["near convergence", "far apart"])
def test_float32_has_the_float64_value_and_gradient(loss, apart):
    """With logits 1e-3 apart at V = 4,096, and with unrelated ones, both are right to 1 %."""
    teacher = normal_logits(3, 4096, scale=3.0 if apart < 1 else 30.0)
    student = teacher + normal_logits(4, 4096, scale=apart)
    value, gradient = jax.jit(jax.value_and_grad(of_logits(loss)))(student, teacher)
    np.testing.assert_allclose(value, kl64(*directed(loss, student, teacher)), rtol=0.01)
    log_q, log_p = log_softmax64(student), log_softmax64(teacher)
    q, p = np.exp(log_q), np.exp(log_p)
    reverse = q * ((log_q - log_p) - np.sum(q * (log_q - log_p)))
    expected = q - p if loss is forward_kl else reverse
    assert np.linalg.norm(gradient - expected) < 0.01 * np.linalg.norm(expected)


@both
@pytest.mark.parametrize("gap", [60.0, 87.0, 95.0, 110.0])
def test_mass_where_the_other_has_almost_none(loss, gap):
    """Probabilities down to underflow in one model, near 1 in the other: finite and right."""
    student, teacher = np.float32([0.0, gap, 1.0]), np.float32([gap, 0.0, gap - 1])
    value, gradient = jax.jit(jax.value_and_grad(of_logits(loss)))(student, teacher)
    np.testing.assert_allclose(value, kl64(*directed(loss, student, teacher)), rtol=1e-5)
    q, p = np.exp(log_softmax64(student)), np.exp(log_softmax64(teacher))
    expected = q - p if loss is forward_kl else np.zeros(3)
    np.testing.assert_allclose(gradient, expected, atol=1e-4)


@both
def test_padded_columns_of_both_change_nothing(loss):
    """Columns at -inf in both models are as good as deleted, and get a gradient of exactly 0."""
    student, teacher = normal_logits(5, 4, 12, scale=2.0), normal_logits(6, 4, 12, scale=2.0)
    padding = np.full((4, 3), -np.inf, np.float32)
    padded = [np.concatenate([x, padding], axis=-1) for x in (student, teacher)]
    total = jax.jit(jax.value_and_grad(lambda s, t: of_logits(loss)(s, t).sum()))
    value, gradient = total(student, teacher)
    padded_value, padded_gradient = total(*padded)
    np.testing.assert_allclose(padded_value, value, rtol=1e-6)
    np.testing.assert_allclose(padded_gradient[:, :12], gradient, atol=1e-6)
    np.testing.assert_array_equal(padded_gradient[:, 12:], 0)


def test_forward_kl_where_only_the_teacher_excludes():
    """Entries that the teacher excludes: the value is the reference's, the gradient still q - p."""
    student, teacher = normal_logits(7, 12, scale=2.0), normal_logits(8, 12, scale=2.0)
    teacher[8:] = -np.inf
    value, gradient = jax.jit(jax.value_and_grad(of_logits(forward_kl)))(student, teacher)
    np.testing.assert_allclose(value, kl64(teacher, student), rtol=1e-6)
    expected = np.exp(log_softmax64(student)) - np.exp(log_softmax64(teacher))
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_reverse_kl_where_only_the_teacher_excludes():
    """Infinite where the student has mass on an excluded entry; 0 where its mass underflows."""
    value_and_gradient = jax.jit(jax.value_and_grad(of_logits(reverse_kl)))
    teacher = np.array([1.0, 2.0, -np.inf], np.float32)
    assert value_and_gradient(np.array([0.5, 1.0, 0.0], np.float32), teacher)[0] == np.inf
    student = np.array([0.5, 1.0, -500.0], np.float32)
    value, gradient = value_and_gradient(student, teacher)
    np.testing.assert_allclose(value, kl64(student[:2], teacher[:2]), rtol=1e-5)
    assert np.isfinite(gradient).all()


@both
def test_leading_axes_are_free(loss):
    """[..., V] -> [...]: one call on [2, 3, V] is two vmaps over rows."""
    student = log_probs(normal_logits(9, 2, 3, 16, scale=2.0))
    teacher = log_probs(normal_logits(10, 2, 3, 16, scale=2.0))
    whole = jax.jit(loss)(student, teacher)
    chex.assert_shape(whole, (2, 3))
    chex.assert_trees_all_close(
        whole, jax.jit(jax.vmap(jax.vmap(loss)))(student, teacher), rtol=1e-6
    )


STUDENT = np.array([0.3, -1.2, 2.0, 0.1, -0.4])
TEACHER = np.array([-0.5, 1.1, 0.7, -2.0, 0.9])


def log_likelihood_gradients(logits) -> np.ndarray:
    """[y, i]: the gradient of log q(y) in the student's logits, for every token y."""
    return np.asarray(jax.jit(jax.jacrev(jax.nn.log_softmax))(logits))


def test_forward_gradient_is_soft_cross_entropy():
    """grad KL(p || q) = -E_{y ~ p}[grad log q(y)] = q - p, summed over the whole vocabulary."""
    with jax.enable_x64(True):
        gradient = jax.jit(jax.grad(of_logits(forward_kl)))(
            jnp.asarray(STUDENT), jnp.asarray(TEACHER)
        )
        p, q = np.exp(log_softmax64(TEACHER)), np.exp(log_softmax64(STUDENT))
        expected = -p @ log_likelihood_gradients(jnp.asarray(STUDENT))
        assert gradient.dtype == np.float64
        np.testing.assert_allclose(gradient, expected, atol=1e-14)
        np.testing.assert_allclose(gradient, q - p, atol=1e-14)


def test_reverse_gradient_is_expected_reinforce():
    """grad KL(q || p) = E_{y ~ q}[(log q - log p) grad log q] = q ((log q - log p) - KL).

    That is REINFORCE on the constant reward r = log p - log q, in expectation over its tokens.
    """
    with jax.enable_x64(True):
        log_p = jnp.asarray(log_softmax64(TEACHER))

        def minus_expected_reward(logits):
            """E_{y ~ q}[-r(y) log q(y)], the sampler's q and r held constant: the surrogate."""
            log_q = jax.nn.log_softmax(logits)
            reward = jax.lax.stop_gradient(log_p - log_q)
            return -jnp.sum(jax.lax.stop_gradient(jnp.exp(log_q)) * reward * log_q)

        student = jnp.asarray(STUDENT)
        gradient = jax.jit(jax.grad(of_logits(reverse_kl)))(student, jnp.asarray(TEACHER))
        log_q = log_softmax64(STUDENT)
        q, ratio = np.exp(log_q), log_q - np.asarray(log_p)
        by_token = (q * ratio) @ log_likelihood_gradients(student)
        np.testing.assert_allclose(gradient, by_token, atol=1e-14)
        np.testing.assert_allclose(
            gradient, jax.jit(jax.grad(minus_expected_reward))(student), atol=1e-14
        )
        np.testing.assert_allclose(gradient, q * (ratio - (q * ratio).sum()), atol=1e-14)


@both
def test_gradient_by_sampled_tokens(loss):
    """One-sample estimators are unbiased: SFT on teacher tokens, REINFORCE on student tokens."""
    log_p, log_q = log_softmax64(TEACHER), log_softmax64(STUDENT)
    by_token = log_likelihood_gradients(STUDENT.astype(np.float32))
    if loss is forward_kl:
        sampled_from, estimates = np.exp(log_p), -by_token
    else:
        sampled_from, estimates = np.exp(log_q), (log_q - log_p)[:, None] * by_token
    tokens = np.random.default_rng(11).choice(5, size=40_000, p=sampled_from)
    draws = estimates[tokens]
    exact = jax.jit(jax.grad(of_logits(loss)))(jnp.float32(STUDENT), jnp.float32(TEACHER))
    standard_error = draws.std(0, ddof=1) / np.sqrt(len(draws))
    assert np.all(np.abs(draws.mean(0) - exact) < 4.5 * standard_error)
    assert np.all(standard_error < 0.02)
