"""Token losses beyond the KLs: their defining identities, limits and gradients, padded or not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import (
    adaptive_kl,
    alpha_divergence,
    at_top_k,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    token_wise_kl,
    total_variation,
)
from kdjax.errors import ConfigError
from kdjax.losses.combinators import closed_form
from kdjax.losses.composition import describe

RNG = np.random.default_rng(3)
LOGITS = RNG.normal(0, 2, (2, 6, 9))
"""(student, teacher) logits, [6, 9] in float64."""


def softmax(logits) -> np.ndarray:
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


Q, P = softmax(LOGITS)
LOGQ, LOGP = (jnp.asarray(np.log(x), jnp.float32) for x in (Q, P))


def kl(a, b) -> np.ndarray:
    """KL(a || b) in float64."""
    return (a * np.log(a / b)).sum(-1)


def todi() -> np.ndarray:
    weight = 1 / (1 + Q / P)
    return (weight * P * np.log(P / Q) + (1 - weight) * Q * np.log(Q / P)).sum(-1)


def akl() -> np.ndarray:
    found = []
    for q, p in zip(Q, P, strict=True):
        order = np.argsort(-p)
        count = np.searchsorted(np.cumsum(p[order]), 0.5) + 1
        head = np.isin(np.arange(len(p)), order[:count])
        g, h = np.abs(p - q)[head].sum(), np.abs(p - q)[~head].sum()
        found.append((g * kl(p, q) + h * kl(q, p)) / (g + h))
    return np.array(found)


ORACLES = {
    jensen_shannon(0.3): 0.3 * kl(P, 0.3 * P + 0.7 * Q) + 0.7 * kl(Q, 0.3 * P + 0.7 * Q),
    skew_forward_kl(0.1): kl(P, 0.1 * P + 0.9 * Q),
    skew_reverse_kl(0.1): kl(Q, 0.1 * Q + 0.9 * P),
    total_variation: np.abs(P - Q).sum(-1) / 2,
    alpha_divergence(0.3): (1 - (P**0.3 * Q**0.7).sum(-1)) / (0.3 * 0.7),
    adaptive_kl(0.5): akl(),
    token_wise_kl(1.0): todi(),
}
every_loss = pytest.mark.parametrize("loss", ORACLES, ids=describe)


@every_loss
def test_value_in_float64(loss):
    """The paper's formula in NumPy, float64."""
    np.testing.assert_allclose(loss(LOGQ, LOGP), ORACLES[loss], rtol=2e-5)


@every_loss
def test_identical_models(loss):
    """Value 0, and no gradient beyond the rounding of one logarithm."""
    value, gradient = jax.value_and_grad(lambda q: loss(q, LOGP).sum())(LOGP)
    assert float(value) == pytest.approx(0.0, abs=2e-6)
    own = gradient - jnp.exp(LOGP) * gradient.sum(-1, keepdims=True)  # by logits
    if loss is not total_variation:  # which has a kink there
        np.testing.assert_allclose(own, 0.0, atol=2e-7)


@every_loss
def test_padding_is_nothing(loss):
    """Entries that both exclude change neither value nor gradient."""
    wide = [jnp.pad(x, ((0, 0), (0, 3)), constant_values=-jnp.inf) for x in (LOGQ, LOGP)]
    value, gradient = jax.value_and_grad(lambda q: loss(q, wide[1]).sum())(wide[0])
    plain, plain_gradient = jax.value_and_grad(lambda q: loss(q, LOGP).sum())(LOGQ)
    np.testing.assert_allclose(value, plain, rtol=1e-6)
    np.testing.assert_allclose(gradient[:, :9], plain_gradient, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(gradient[:, 9:], 0.0)


@pytest.mark.parametrize(
    "loss",
    [jensen_shannon(0.3), skew_forward_kl(0.1), skew_reverse_kl(0.1), alpha_divergence(0.3)],
    ids=describe,
)
def test_gradient_by_differences(loss):
    """Central differences of the float64 value, by the student's logits."""
    with jax.enable_x64(True):
        logits, teacher = jnp.asarray(LOGITS[0, 0]), jnp.log(jnp.asarray(P[0]))

        def of(z):
            return loss(jax.nn.log_softmax(z), teacher)

        gradient, step = jax.grad(of)(logits), 1e-5
        for place in range(len(logits)):
            shift = step * (jnp.arange(len(logits)) == place)
            slope = (of(logits + shift) - of(logits - shift)) / (2 * step)
            np.testing.assert_allclose(gradient[place], slope, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("teacher", "mass", "head"),
    [
        ([0.25, 0.25, 0.25, 0.25], 0.5, 2),  # equal to the last: two of four hold a half
        ([0.25, 0.25, 0.25, 0.25], 0.55, 3),
        ([0.4, 0.2, 0.2, 0.2], 0.5, 2),  # one above the border, one of three at it
        ([0.5, 0.3, 0.1, 0.1], 0.5, 1),
    ],
)
def test_the_head_is_the_fewest_tokens(teacher, mass, head):
    """Also where tokens are equal at its border; the first of them are in it."""
    p, q = np.array(teacher), np.array([0.1, 0.2, 0.3, 0.4])
    apart = np.abs(p - q)
    weight = apart[:head].sum() / apart.sum()
    loss = adaptive_kl(mass)(*(jnp.asarray(np.log(x), jnp.float32) for x in (q, p)))
    np.testing.assert_allclose(loss, weight * kl(p, q) + (1 - weight) * kl(q, p), rtol=1e-5)


def test_weights_of_adaptive_and_token_wise_are_constants():
    """Their gradients are those of the two KLs with the weights frozen, worked by hand."""
    q, p = jnp.asarray(Q[0], jnp.float32), jnp.asarray(P[0], jnp.float32)
    weight = 1 / (1 + q / p)
    by_logq = -weight * p + (1 - weight) * q * (jnp.log(q / p) + 1)
    gradient = jax.grad(token_wise_kl(1.0))(LOGQ[0], LOGP[0])
    np.testing.assert_allclose(gradient, by_logq, rtol=1e-4, atol=1e-6)
    total, forward, reverse = (
        jax.grad(lambda x, f=f: f(x, LOGP[0]))(LOGQ[0])
        for f in (adaptive_kl(0.5), forward_kl, reverse_kl)
    )
    share = (total - reverse) / (forward - reverse)
    np.testing.assert_allclose(share, share[0], rtol=1e-3)


def test_skew_at_zero_is_the_kl():
    """alpha 0 mixes nothing in."""
    np.testing.assert_allclose(skew_forward_kl(0.0)(LOGQ, LOGP), forward_kl(LOGQ, LOGP), rtol=1e-6)
    np.testing.assert_allclose(skew_reverse_kl(0.0)(LOGQ, LOGP), reverse_kl(LOGQ, LOGP), rtol=1e-6)


def test_jensen_shannon_is_symmetric_at_a_half():
    """And at most log 2."""
    half = jensen_shannon(0.5)
    np.testing.assert_allclose(half(LOGQ, LOGP), half(LOGP, LOGQ), rtol=1e-6)
    far = jnp.array([0.0, -jnp.inf]), jnp.array([-jnp.inf, 0.0])
    np.testing.assert_allclose(half(*far), np.log(2), rtol=1e-6)


def test_limits_are_the_kls():
    """JSD / beta and the alpha-divergence near 1 tend to forward KL, at the other end to reverse
    KL."""
    forward, reverse, near = kl(P, Q), kl(Q, P), 1e-5
    with jax.enable_x64(True):
        pair = jnp.log(Q), jnp.log(P)
        np.testing.assert_allclose(jensen_shannon(near)(*pair) / near, forward, rtol=0.01)
        np.testing.assert_allclose(jensen_shannon(1 - near)(*pair) / near, reverse, rtol=0.01)
        np.testing.assert_allclose(alpha_divergence(1 - near)(*pair), forward, rtol=0.01)
        np.testing.assert_allclose(alpha_divergence(near)(*pair), reverse, rtol=0.01)


def test_token_wise_without_sharpness_is_the_mean_of_the_kls():
    """sigmoid(0) is a half."""
    expected = (kl(P, Q) + kl(Q, P)) / 2
    np.testing.assert_allclose(token_wise_kl(0.0)(LOGQ, LOGP), expected, rtol=1e-5)


def test_token_wise_where_one_side_vanishes():
    """A token that the student all but excludes is missed, and lifted; the other way lowered."""
    far = jnp.array([-90.0, -np.log(2), -np.log(2)]), jnp.log(jnp.array([0.5, 0.25, 0.25]))
    loss = token_wise_kl(1.0)
    for student, teacher, sign in ((*far, -1), (*far[::-1], 1)):
        value, gradient = jax.value_and_grad(loss)(student, teacher)
        assert 44 < float(value) < 46
        assert float(gradient[0]) * sign > 0.4


@pytest.mark.parametrize("loss", [forward_kl, reverse_kl])
def test_top_k(loss):
    """k = V (and more) is exact; a smaller k is at most the whole and rises with k."""
    whole = np.asarray(loss(LOGQ, LOGP))
    np.testing.assert_allclose(at_top_k(loss, 9)(LOGQ, LOGP), whole, rtol=1e-5)
    np.testing.assert_allclose(at_top_k(loss, 99)(LOGQ, LOGP), whole, rtol=1e-5)
    before = np.zeros(6)
    for k in range(1, 9):
        coarse = np.asarray(at_top_k(loss, k)(LOGQ, LOGP))
        assert (coarse <= whole + 1e-6).all()
        assert (coarse >= before - 1e-6).all()
        before = coarse


@every_loss
def test_no_closed_form(loss):
    """They are differentiated automatically."""
    assert closed_form(loss) is None


@pytest.mark.parametrize(
    ("make", "bad"),
    [
        (jensen_shannon, 0.0), (jensen_shannon, 1.0), (skew_forward_kl, 1.0),
        (skew_reverse_kl, -0.1), (alpha_divergence, 1.0), (adaptive_kl, 0.0),
        (token_wise_kl, -1.0), (lambda k: at_top_k(forward_kl, k), 0),
    ],
)  # fmt: skip
def test_numbers_that_no_divergence_has(make, bad):
    """The error names what it got."""
    with pytest.raises(ConfigError, match=rf"must be .*, got {bad}"):
        make(bad)
