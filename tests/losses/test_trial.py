"""The trial of the user's own losses: each mistake is a line that names the function, its file and
line, and what was expected."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import (
    add,
    at_temperature,
    clip,
    divergence,
    forward_kl,
    mix,
    negative_log_likelihood,
    scale,
    token_mean,
)
from kdjax.errors import ConfigError
from kdjax.losses.composition import describe
from kdjax.losses.reductions import first_tokens
from kdjax.losses.trial import (
    require_per_token,
    try_advantage,
    try_reduction,
    try_token_loss,
)

V = 7


def fine(student_logp, teacher_logp):
    return 0.5 * jnp.abs(jnp.exp(student_logp) - jnp.exp(teacher_logp)).sum(-1)


def summed_up(student_logp, teacher_logp):
    return fine(student_logp, teacher_logp).sum()


def kept_axis(student_logp, teacher_logp):
    return fine(student_logp, teacher_logp)[..., None]


def branching(student_logp, teacher_logp):
    return fine(student_logp, teacher_logp) if student_logp.sum() < 0 else 0.0


def as_float(student_logp, teacher_logp):
    return float(student_logp.sum()) * teacher_logp.sum(-1)


def as_numpy(student_logp, teacher_logp):
    return np.exp(student_logp).sum(-1)


def misspelled(student_logp, teacher_logp):
    return jnp.foo(student_logp).sum(-1)


def mismatched(student_logp, teacher_logp):
    return (student_logp[..., 1:] - teacher_logp[..., :3]).sum(-1)


def log_of_negative(student_logp, teacher_logp):
    return jnp.log(student_logp).sum(-1)


def root_of_zero(student_logp, teacher_logp):
    gap = (student_logp - student_logp).sum(-1)
    return jnp.sqrt(gap * gap)


def less_the_mean_loss(student_logp, teacher_logp):
    loss = fine(student_logp, teacher_logp)
    return loss - loss.mean()


def nothing(student_logp, teacher_logp):
    return None


def counted(student_logp, teacher_logp):
    return (student_logp > teacher_logp).sum(-1)


WRONG = {
    summed_up: r"made \[\], not \[3\], of two \[3, 7\]; a token loss makes \[...\] of",
    kept_axis: r"made \[3, 1\], not \[3\]",
    nothing: "made no array, not",
    counted: r"made \[3\] int32, not \[3\]",
    branching: "TracerBoolConversionError: .*use jnp.where in place of if",
    as_float: "ConcretizationTypeError: .*without float",
    as_numpy: "TracerArrayConversionError: .*use jax.numpy in place of numpy",
    misspelled: "AttributeError: module 'jax.numpy' has no attribute 'foo'",
    mismatched: "TypeError: sub got incompatible shapes",
    log_of_negative: "its value is nan for two ordinary distributions",
    root_of_zero: "its gradient is nan for two ordinary distributions",
    less_the_mean_loss: "its value at a token depends on other tokens",
}


@pytest.mark.parametrize("loss", WRONG, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize(
    "composed", [lambda f: f, lambda f: mix(f, forward_kl, weight=0.7)], ids=["alone", "mixed"]
)
def test_a_wrong_token_loss_is_named(loss, composed):
    """Its function with file and line, also within a mix, which would hide a shape of []."""
    with pytest.raises(ConfigError, match=WRONG[loss]) as caught:
        try_token_loss(composed(loss), V)
    first, last = loss.__code__.co_firstlineno, max(n for *_, n in loss.__code__.co_lines() if n)
    line = int(
        re.match(rf"token_loss: {loss.__name__} \(.*test_trial.py:(\d+)\)", str(caught.value))[1]
    )
    assert first <= line <= last
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "loss", [fine, functools.partial(fine), jax.jit(fine), at_temperature(clip(fine, 0.2), 2.0)]
)
def test_a_right_token_loss_passes(loss):
    """Alone, bound, jitted and composed, where both exclude an entry too."""
    try_token_loss(loss, V)
    try_token_loss(loss, V, excludes=True)


def test_what_both_exclude_is_tried():
    """p (log p - log q) is fine for ordinary distributions, and NaN at -inf of both."""

    def plain_kl(student_logp, teacher_logp):
        return (jnp.exp(teacher_logp) * (teacher_logp - student_logp)).sum(-1)

    try_token_loss(plain_kl, V)
    with pytest.raises(
        ConfigError, match=r"plain_kl .*nan for an entry that both exclude \(-inf\)"
    ):
        try_token_loss(plain_kl, V, excludes=True)


@pytest.mark.parametrize(
    ("reduction", "says"),
    [
        (lambda mask, rollout: mask.sum(), r"made \[\] int32 of a mask \[2, 3\]"),
        (lambda mask, rollout: jnp.where(mask, 1.0, 0.0).sum(-1), r"made \[2\] of a mask \[2, 3\]"),
        (lambda mask, rollout: jnp.where(mask, jnp.nan, 0.0), "a weight is nan"),
        (lambda mask, rollout: rollout.rewards, "AttributeError"),
        (lambda mask, rollout: token_mean(mask) if mask.any() else 0.0, "use jnp.where"),
    ],
)
def test_a_wrong_reduction_is_named(reduction, says):
    """With its file, alone and within another."""
    for one in (reduction, first_tokens(reduction, 2)):
        with pytest.raises(ConfigError, match=says) as caught:
            try_reduction(one)
        assert "reduction: <lambda> (" in str(caught.value)
        assert "test_trial.py:" in str(caught.value)


def test_a_right_reduction_passes():
    """One of the user's own that reads the rollout."""
    try_reduction(lambda mask, rollout: token_mean(mask) * (1 - rollout.pass_rate_b)[:, None])
    try_reduction(lambda mask, rollout: mask)
    try_reduction(lambda mask, rollout: token_mean(mask & rollout.signal_b[:, None]))


def test_an_objective_that_branches_is_named():
    """It runs on known values, and is traced all the same."""

    def branches(scores):
        return scores.divergence if scores.divergence.sum() > 0 else scores.forward_kl

    with pytest.raises(ConfigError, match=r"branches \(.*test_trial.py:\d+\): Tracer.*jnp.where"):
        require_per_token(branches)


PER_TOKEN = [
    divergence,
    negative_log_likelihood,
    mix(divergence, negative_log_likelihood, weight=0.5),
    add(divergence, scale(negative_log_likelihood, 0.1)),
    clip(scale(divergence, 3.0), 1.0),
]


@pytest.mark.parametrize("objective", PER_TOKEN, ids=describe)
def test_objectives_of_one_token_are_accepted(objective):
    """Each token's own scores, however combined."""
    require_per_token(objective)


def test_objectives_may_read_every_score():
    """Also one of the user's own, with a coefficient for each field and a constant weight."""

    def of_everything(scores):
        values = [
            value for name, value in scores._asdict().items() if name not in ("mask", "parts")
        ]
        weighted = sum(number * value for number, value in enumerate(values, start=1))
        return jnp.where(scores.mask, jax.lax.stop_gradient(scores.forward_kl) * weighted, 0.0)

    require_per_token(of_everything)


def less_the_mean(scores):
    return scores.divergence - scores.divergence.mean()


def reversed_tokens(scores):
    return scores.divergence[::-1]


def less_the_mean_agreement(scores):
    return scores.divergence * (1 - scores.top1_agreement.mean())


def running_sum(scores):
    return jnp.cumsum(scores.divergence)


def less_the_mean_root(scores):
    return jnp.sqrt(-scores.student_logp) - jnp.sqrt(-scores.student_logp).mean()


@pytest.mark.parametrize(
    "objective",
    [
        less_the_mean,
        less_the_mean_root,
        reversed_tokens,
        less_the_mean_agreement,
        running_sum,
    ],
)
def test_objectives_of_many_tokens_are_refused(objective):
    """ConfigError that names the objective, alone and as a part of a combination."""
    for refused in (objective, scale(objective, 0.5)):
        with pytest.raises(ConfigError, match=f"{objective.__name__}.*depends on other tokens"):
            require_per_token(refused)


@pytest.mark.parametrize(
    ("objective", "says"),
    [
        (lambda scores: scores.divergence.sum(), r"made \[\], not \[5\], of Scores \[5\]"),
        (lambda scores: jnp.concatenate([scores.divergence] * 2), r"made \[10\], not \[5\]"),
        (lambda scores: 1.0, r"made \[\], not"),
        (lambda scores: None, "made no array, not"),
        (lambda scores: (scores.divergence, scores.forward_kl), "made no array, not"),
    ],
)
def test_an_objective_of_another_shape_is_named(objective, says):
    """With what it made, not as one whose tokens depend on each other."""
    with pytest.raises(ConfigError, match=rf"<lambda> \(.*test_trial.py:\d+\) {says}"):
        require_per_token(objective)


@pytest.mark.parametrize(
    "made", [None, [[1.0], [1.0, 2.0]], [["a"] * 4] * 2, np.zeros(2), np.full((2, 4), np.inf)]
)
def test_an_advantage_that_is_no_array_of_numbers_is_named(made):
    """Whatever comes of it: no error of NumPy without a place."""
    with pytest.raises(ConfigError, match=r"rl.advantage: <lambda> \(.*test_trial.py:\d+\)"):
        try_advantage(lambda reward_gs: made, 4)


def test_objectives_that_do_not_run_are_refused():
    """A [B, T] objective that reads the second axis: the error says where and why, in one line."""

    def over_rows(scores):
        return scores.divergence - scores.divergence.mean(axis=1, keepdims=True)

    with pytest.raises(
        ConfigError, match=r"over_rows \(.*test_trial.py:\d+\): IndexError: tuple index"
    ) as caught:
        require_per_token(over_rows)
    assert "\n" not in str(caught.value)
