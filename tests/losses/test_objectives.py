"""Sampled-token objectives: expected gradients by enumeration over the vocabulary, identities."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import (
    bounded,
    divergence,
    extrapolated,
    group_advantage,
    importance,
    log_compressed,
    log_ratio,
    policy_gradient,
    power_difference,
    reference_log_ratio,
    reverse_divergence,
    reverse_kl,
)
from kdjax.base import Scores
from kdjax.errors import ConfigError

RNG = np.random.default_rng(4)
LOGITS, TEACHER, REFERENCE = (jnp.asarray(RNG.normal(0, 1.5, 7), jnp.float32) for _ in range(3))
LOGP, LOGREF = jax.nn.log_softmax(TEACHER), jax.nn.log_softmax(REFERENCE)


def every_token(logits, reference=LOGREF) -> Scores:
    """Scores of a position at which each token of the vocabulary was sampled once."""
    logq = jax.nn.log_softmax(logits)
    fixed = jax.lax.stop_gradient(logq)
    return Scores(logq, logq, fixed, logq < 1, teacher_logp=LOGP, reference_logp=reference)


def expected(objective, weights):
    """The gradient by logits in expectation over sampled tokens, by enumeration."""
    return jax.grad(lambda z: (weights * objective(every_token(z))).sum())(LOGITS)


Q = jax.lax.stop_gradient(jax.nn.softmax(LOGITS))


def test_log_ratio_has_the_gradient_of_reverse_kl():
    """E_{y ~ q} [-(log p - log q) grad log q] = grad KL(q || p)."""
    exact = jax.grad(lambda z: reverse_kl(jax.nn.log_softmax(z), LOGP))(LOGITS)
    np.testing.assert_allclose(expected(policy_gradient(log_ratio), Q), exact, atol=1e-6)


def test_importance_corrects_another_sampler():
    """Drawn from r and weighed by q / r, the expectation is q's (the ratio below its bound)."""
    r = jax.nn.softmax(0.7 * LOGITS)

    def drawn(z):
        scores = every_token(z)._replace(sampler_logp=jnp.log(r))
        return (r * importance(policy_gradient(log_ratio), 1e6)(scores)).sum()

    exact = jax.grad(lambda z: reverse_kl(jax.nn.log_softmax(z), LOGP))(LOGITS)
    np.testing.assert_allclose(jax.grad(drawn)(LOGITS), exact, atol=1e-6)


def test_extrapolation_at_scale_one_is_distillation():
    """The reference drops out, whatever it is; beyond 1 the gradient is that of
    KL(q || p^scale ref^(1 - scale)), up to a constant of the distribution's normaliser."""
    scores = every_token(LOGITS)
    np.testing.assert_allclose(extrapolated(1.0)(scores), log_ratio(scores), rtol=1e-6)
    further = jax.nn.log_softmax(1.5 * LOGP - 0.5 * LOGREF)
    exact = jax.grad(lambda z: reverse_kl(jax.nn.log_softmax(z), further))(LOGITS)
    np.testing.assert_allclose(expected(policy_gradient(extrapolated(1.5)), Q), exact, atol=2e-6)


def test_power_difference():
    """p^a - q^a, at most 1 in size; over a it tends to the log-ratio."""
    scores = every_token(LOGITS)
    p, q = np.exp(np.float64(LOGP)), np.float64(Q)
    np.testing.assert_allclose(power_difference(0.5)(scores), p**0.5 - q**0.5, rtol=1e-4, atol=1e-6)
    small = power_difference(1e-3)(scores) / 1e-3
    np.testing.assert_allclose(small, np.log(p / q), rtol=0.01, atol=1e-3)
    extreme = scores._replace(teacher_logp=jnp.full(7, -jnp.inf))
    assert float(jnp.abs(power_difference(0.5)(extreme)).max()) <= 1


def test_compressed_and_bounded():
    """Worked example, signs kept."""
    values = jnp.array([-3.0, -0.5, 0.0, 2.0])

    def fixed(scores):
        return values

    np.testing.assert_allclose(
        log_compressed(fixed)(None), [-np.log(4), -np.log(1.5), 0, np.log(3)], rtol=1e-6
    )
    np.testing.assert_array_equal(bounded(fixed, -1.0, 1.5)(None), [-1.0, -0.5, 0.0, 1.5])


def test_an_advantage_carries_no_gradient():
    """Only log q is differentiated: two factors of one token differ by the advantage alone."""
    gradient = jax.grad(lambda z: policy_gradient(log_ratio)(every_token(z))[2])(LOGITS)
    plain = jax.grad(lambda z: jax.nn.log_softmax(z)[2])(LOGITS)
    ratio = float(log_ratio(every_token(LOGITS))[2])
    np.testing.assert_allclose(gradient, -ratio * plain, rtol=1e-5)


@pytest.mark.parametrize(
    ("advantage", "missing"),
    [(log_ratio, "teacher"), (power_difference(0.5), "teacher"), (extrapolated(2.0), "reference")],
)
def test_what_is_missing_is_named(advantage, missing):
    """One line with the field to set."""
    scores = every_token(LOGITS)._replace(**{f"{missing}_logp": None})
    with pytest.raises(ConfigError, match=f"set {missing}"):
        policy_gradient(advantage)(scores)


@pytest.mark.parametrize(
    ("objective", "says"),
    [
        (divergence, "needs divergence, .* set teacher, or use another objective"),
        (reverse_divergence, "needs reverse_kl, .* set teacher .a kept top-k"),
        (log_ratio, "needs teacher_logp, .* set teacher .a kept top-k"),
        (reference_log_ratio, "needs reference_logp, .* set reference"),
        (group_advantage, "needs advantage, .* set rl.group_size over 1, and prefix student"),
    ],
)
def test_what_is_not_known_is_named_with_what_brings_it(objective, says):
    """One line: the field that is None, and what to set."""
    one = jnp.ones(1)
    with pytest.raises(ConfigError, match=says):
        objective(Scores(one, one, one, one > 0))
