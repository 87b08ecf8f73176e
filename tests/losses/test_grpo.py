"""Group-relative advantages and the clipped surrogate: laws, worked examples, enumeration."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdjax import (
    add,
    clipped_surrogate,
    finished_only,
    group_advantage,
    importance,
    log_ratio,
    negative_entropy,
    paced,
    policy_gradient,
    reference_log_ratio,
    reverse_kl,
    scale,
    sequence_mean,
    token_mean,
    with_signal,
)
from kdjax.base import Rollout, Scores
from kdjax.config.names import GROUP_ADVANTAGES, OBJECTIVES, parse
from kdjax.errors import ConfigError
from kdjax.losses.composition import describe
from kdjax.losses.grpo import have_signal

RNG = np.random.default_rng(6)
LOGITS, TEACHER = (jnp.asarray(RNG.normal(0, 1.5, 7), jnp.float32) for _ in range(2))
every_advantage = pytest.mark.parametrize(
    "advantage", GROUP_ADVANTAGES.functions.values(), ids=GROUP_ADVANTAGES.functions
)
groups = st.lists(
    st.lists(st.floats(-5, 5, allow_subnormal=False, width=32), min_size=4, max_size=4),
    min_size=1,
    max_size=3,
)


@every_advantage
@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(rewards=groups)
def test_advantages_of_a_group_sum_to_zero(advantage, rewards):
    """Whatever the rewards; they are ordered as the rewards are."""
    made = advantage(np.array(rewards))
    np.testing.assert_allclose(made.sum(axis=1), 0, atol=1e-9)
    for own, given_ in zip(made, rewards, strict=True):
        assert (np.diff(own[np.argsort(given_)]) >= -1e-12).all()


@every_advantage
def test_a_group_without_signal_has_none(advantage):
    """Equal rewards give exactly 0, also where their mean is not exact in floating point."""
    equal = np.full((3, 7), 0.1)
    np.testing.assert_array_equal(advantage(equal), 0.0)


@every_advantage
@pytest.mark.parametrize("unit", [1e-3, 1.0, 1e3])
def test_rounding_is_no_signal(advantage, unit):
    """Rewards that are equal but for the last bits of their sums, in either precision, are equal;
    what is more than that is signal."""
    nearly = unit * np.array([[0.1 + 0.2, 0.3, 0.3, 0.3], [*[np.float32(0.1) * 3] * 3, 0.3]])
    np.testing.assert_array_equal(advantage(nearly), 0.0)
    assert not have_signal(nearly).any()
    small = unit * np.array([[0.3, 0.3001, 0.3, 0.3]])
    assert have_signal(small).all()
    np.testing.assert_allclose(
        advantage(small) / np.abs(advantage(small)).max(), [[-1 / 3, 1, -1 / 3, -1 / 3]], rtol=1e-6
    )


def test_worked_advantages():
    """One success among four: by the deviation, by the mean, by the others' mean."""
    reward = np.array([[1.0, 0.0, 0.0, 0.0]])
    expected = {
        "standardized": [3**0.5, *[-(3**-0.5)] * 3],
        "centered": [0.75, -0.25, -0.25, -0.25],
        "leave_one_out": [1.0, *[-1 / 3] * 3],
    }
    for name, function in GROUP_ADVANTAGES.functions.items():
        np.testing.assert_allclose(function(reward), [expected[name]])


def scores_of(logq, advantage, old=None) -> Scores:
    return Scores(logq, logq, logq, logq < 1, old_logp=old, advantage=advantage)


def test_at_ratio_one_it_is_reinforce():
    """The gradient is A grad log q, with the old policy unknown (it is the student) or equal."""
    advantage = jnp.array([1.5, -0.7, 0.0])
    tokens = jnp.array([0, 3, 5])

    def of(z, objective, old=None):
        logq = jax.nn.log_softmax(z)[tokens]
        return objective(scores_of(logq, advantage, old)).sum()

    reinforce = jax.grad(lambda z: of(z, policy_gradient(group_advantage)))(LOGITS)
    for old in (None, jax.nn.log_softmax(LOGITS)[tokens]):
        gradient = jax.grad(lambda z, old=old: of(z, clipped_surrogate(0.2), old))(LOGITS)
        np.testing.assert_allclose(gradient, reinforce, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0), (1.19, 2.0, -2.38, -2.38), (1.5, 2.0, -2.4, 0.0),
        (0.5, 2.0, -1.0, -1.0), (0.5, -2.0, 1.6, 0.0), (1.5, -2.0, 3.0, 3.0), (1.5, 0.0, 0.0, 0.0),
    ],
)  # fmt: skip
def test_clipping_by_hand(ratio, advantage, value, slope):
    """low = high = 0.2: the gain above 1.2 and below 0.8 is not followed; losses always are. The
    slope is by log q."""
    old = jnp.array([-1.0])

    def of(logq):
        return clipped_surrogate(0.2)(scores_of(logq, jnp.array([advantage]), old))[0]

    logq = old + jnp.log(ratio)
    np.testing.assert_allclose(of(logq), value, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.grad(of)(logq), [slope], rtol=1e-5, atol=1e-6)


def test_clip_higher():
    """The upper bound alone is moved."""
    old, advantage = jnp.array([-1.0, -1.0]), jnp.array([1.0, -1.0])
    logq = old + jnp.log(jnp.array([1.5, 0.5]))
    values = clipped_surrogate(0.2, 0.28)(scores_of(logq, advantage, old))
    np.testing.assert_allclose(values, [-1.28, 0.8], rtol=1e-5)


def test_no_signal_no_gradient():
    """An advantage of 0 leaves a gradient of exactly 0."""
    logq = jax.nn.log_softmax(LOGITS)
    gradient = jax.grad(lambda x: clipped_surrogate(0.2)(scores_of(x, jnp.zeros(7))).sum())(logq)
    np.testing.assert_array_equal(gradient, 0.0)


def test_distillation_is_the_same_machinery():
    """With the log-ratio as advantage the surrogate's expected gradient is that of reverse KL."""
    logp, q = jax.nn.log_softmax(TEACHER), jax.lax.stop_gradient(jax.nn.softmax(LOGITS))

    def surrogate(z):
        logq = jax.nn.log_softmax(z)
        scores = scores_of(logq, jax.lax.stop_gradient(logp - logq))
        return (q * clipped_surrogate(0.2)(scores)).sum()

    exact = jax.grad(lambda z: reverse_kl(jax.nn.log_softmax(z), logp))(LOGITS)
    np.testing.assert_allclose(jax.grad(surrogate)(LOGITS), exact, atol=1e-6)


def test_reference_estimator_has_the_right_gradient():
    """E_{y ~ q} of its gradient is that of KL(q || ref); k3's is not."""
    logref, q = jax.nn.log_softmax(TEACHER), jax.lax.stop_gradient(jax.nn.softmax(LOGITS))

    def expected(z, objective):
        logq = jax.nn.log_softmax(z)
        return (q * objective(scores_of(logq, None)._replace(reference_logp=logref))).sum()

    def k3(scores):
        ratio = scores.reference_logp - scores.student_logp
        return jnp.exp(ratio) - ratio - 1

    exact = jax.grad(lambda z: reverse_kl(jax.nn.log_softmax(z), logref))(LOGITS)
    ours = jax.grad(lambda z: expected(z, policy_gradient(reference_log_ratio)))(LOGITS)
    np.testing.assert_allclose(ours, exact, atol=1e-6)
    assert float(jnp.abs(jax.grad(lambda z: expected(z, k3))(LOGITS) - exact).max()) > 0.05


def test_importance_is_of_the_old_policy():
    """min(q_old / sampler, C) multiplies the surrogate, whose own ratio is q / q_old."""
    old, sampler = jnp.array([-1.0, -1.0]), jnp.array([-1.5, -3.0])
    logq, advantage = old + 0.1, jnp.array([1.0, 1.0])
    scores = scores_of(logq, advantage, old)._replace(sampler_logp=sampler)
    weighed = importance(clipped_surrogate(0.5), 2.0)(scores)
    plain = clipped_surrogate(0.5)(scores)
    np.testing.assert_allclose(weighed, plain * jnp.array([np.exp(0.5), 2.0]), rtol=1e-5)


def test_importance_alone_is_of_the_student():
    """Around an objective without a ratio of its own, what another student drew weighs by the
    student as it is, whatever `old_logp` says."""
    old, sampler = jnp.array([-1.0]), jnp.array([-1.0])
    scores = scores_of(old + 0.5, jnp.array([1.0]), old)._replace(sampler_logp=sampler)
    plain = policy_gradient(group_advantage)(scores)
    weighed = importance(policy_gradient(group_advantage), 5.0)(scores)
    np.testing.assert_allclose(weighed, plain * np.exp(0.5), rtol=1e-5)


def test_entropy_bonus_and_text():
    """A composition of all of it reads back from its text."""
    loss = add(clipped_surrogate(0.2, 0.28), scale(negative_entropy, 0.01), scale(log_ratio, -0.1))
    assert describe(parse(describe(loss), OBJECTIVES)) == describe(loss)
    scores = scores_of(jnp.array([-1.0]), jnp.array([2.0]))._replace(teacher_logp=jnp.array([-2.0]))
    np.testing.assert_allclose(loss(scores), -2.0 + 0.01 + 0.1, rtol=1e-5)


MASK = jnp.ones((3, 4), bool)
NONE = jnp.zeros(3)
CUT = Rollout(NONE, NONE, NONE, NONE, jnp.array([False, True, False]))


def test_finished_only_masks_what_was_cut():
    """Cut rows weigh nothing and are not counted in the mean."""
    weights = finished_only(sequence_mean)(MASK, CUT)
    np.testing.assert_allclose(weights.sum(axis=1), [1, 0, 1])


def test_paced_weighs_by_the_pass_rate():
    """Most at a half, nothing where all or none passed."""
    rollout = CUT._replace(pass_rate_b=jnp.array([0.0, 0.5, 0.75]))
    weights = paced(token_mean, 1.0)(MASK, rollout)
    np.testing.assert_allclose(weights[:, 0], [0.0, 1.0, 0.75])
    with pytest.raises(ConfigError, match=r"rl\.group_size over 1"):
        paced(token_mean, 1.0)(MASK, CUT)


def test_without_signal_is_not_counted():
    """Rows of groups without signal weigh nothing, and are not in the mean's denominator."""
    rollout = CUT._replace(signal_b=jnp.array([True, False, True]))
    weights = with_signal(token_mean)(MASK, rollout)
    np.testing.assert_array_equal(weights[:, 0], [1, 0, 1])
    with pytest.raises(ConfigError, match=r"rl\.group_size over 1"):
        with_signal(token_mean)(MASK, CUT)


def test_without_rewards():
    """The remedy in one line."""
    with pytest.raises(ConfigError, match=r"rl\.group_size over 1, and prefix student"):
        clipped_surrogate(0.2)(scores_of(jnp.zeros(2), None))


@pytest.mark.parametrize("text", ["clipped_surrogate(1.5)", "clipped_surrogate(0.2, -1)"])
def test_clip_ranges_that_cannot_be(text):
    """A ConfigError."""
    with pytest.raises(ConfigError):
        parse(text, OBJECTIVES)
