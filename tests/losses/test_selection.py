"""Weights by what both models say: ranks within a response, by hand in NumPy."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdjax import (
    bounded,
    disagreement,
    except_stop,
    finished_only,
    first_tokens,
    linear,
    log_ratio,
    magnitude,
    mix,
    reverse_divergence,
    sequence_mean,
    student_entropy,
    token_mean,
    top_either,
    top_share,
    top_tokens,
)
from kdjax.base import Rollout, Scores
from kdjax.config.names import REDUCTIONS, parse
from kdjax.errors import ConfigError
from kdjax.losses.composition import describe
from kdjax.losses.reductions import reads_scores
from kdjax.losses.trial import try_reduction

B, T = 4, 7
LENGTHS = np.array([7, 3, 0, 1])
MASK = np.arange(T)[None] < LENGTHS[:, None]
RNG = np.random.default_rng(0)


def scores_of(**fields) -> Scores:
    """Random scores, with these fields given."""
    drawn = {
        name: jnp.asarray(-RNG.random((B, T)) * (1 if "logp" in name else -3), jnp.float32)
        for name in Scores._fields
        if name not in ("mask", "parts")
    }
    return Scores(**{**drawn, "mask": jnp.asarray(MASK), **fields})


SCORES = scores_of()
ROLLOUT = Rollout(
    tokens_bs=jnp.zeros((B, T + 2), jnp.int32),
    prompt_length_b=jnp.full(B, 2),
    response_length_b=jnp.asarray(LENGTHS),
    sampler_logp_bt=jnp.zeros((B, T)),
    truncated_b=jnp.array([True, False, False, False]),
)


def best(value, mask, count: int) -> set[int]:
    """The places of the largest of a row, the earlier of equals, by a stable sort of Python's."""
    inside = [place for place in range(len(mask)) if mask[place]]
    return set(sorted(inside, key=lambda place: -value[place])[:count])


@settings(deadline=None, max_examples=60, derandomize=True, database=None)
@given(st.floats(0.01, 1.0), st.integers(0, 3), st.data())
def test_the_largest_of_each_response(share, digits, data):
    """So many of its tokens, rounded up, whatever ties there are and whatever lies outside."""
    value = np.array(
        data.draw(
            st.lists(st.lists(st.floats(-9, 9), min_size=T, max_size=T), min_size=B, max_size=B)
        )
    ).round(digits)
    value[2:, 1:] = np.inf  # outside the mask, where it is not to be looked at
    scores = SCORES._replace(student_entropy=jnp.asarray(value, jnp.float32))
    chosen = np.asarray(top_share(token_mean, student_entropy, share)(MASK, ROLLOUT, scores)) > 0
    few = np.asarray(top_tokens(token_mean, student_entropy, 2)(MASK, ROLLOUT, scores)) > 0
    for row in range(B):
        read, most = value[row].astype(np.float32), np.float32(share) * LENGTHS[row]
        assert {*np.flatnonzero(chosen[row])} == best(read, MASK[row], math.ceil(most))
        assert {*np.flatnonzero(few[row])} == best(read, MASK[row], 2)


def test_by_one_quantity_or_the_other():
    """a + b - a b of both scaled within the response; a row of equal values ranks by the other."""
    entropy = np.array(SCORES.student_entropy)
    entropy[1] = 0.5
    scores = SCORES._replace(student_entropy=jnp.asarray(entropy))
    kl = np.asarray(SCORES.reverse_kl)
    reduction = top_either(token_mean, student_entropy, reverse_divergence, 0.4)
    chosen = np.asarray(reduction(MASK, ROLLOUT, scores)) > 0
    for row, count in ((0, 3), (1, 2), (3, 1)):
        inside = MASK[row]

        def scaled(value, inside=inside):
            low, high = value[inside].min(), value[inside].max()
            return (value - low) / (high - low) if high > low else np.zeros(T)

        a, b = scaled(entropy[row].astype(np.float64)), scaled(kl[row].astype(np.float64))
        assert {*np.flatnonzero(chosen[row])} == best(a + b - a * b, inside, count)
    assert {*np.flatnonzero(chosen[1])} == best(kl[1], MASK[1], 2)


def test_a_quantity_that_is_no_number_comes_last():
    """NaN, as 0 times infinity makes it, is chosen after every number; infinity comes first."""
    entropy = np.zeros((B, T), np.float32)
    entropy[0] = [np.nan, -np.inf, np.inf, 1, 2, np.nan, 0]
    scores = SCORES._replace(student_entropy=jnp.asarray(entropy))
    for count, wanted in ((1, {2}), (3, {2, 3, 4}), (4, {2, 3, 4, 6}), (7, {*range(7)})):
        chosen = top_tokens(token_mean, student_entropy, count)(MASK, ROLLOUT, scores)
        assert {*np.flatnonzero(chosen[0])} == wanted


def test_quantities():
    """disagreement and magnitude by their definitions."""
    q, p = (np.exp(np.asarray(x, np.float64)) for x in (SCORES.student_logp, SCORES.teacher_logp))
    np.testing.assert_allclose(disagreement(SCORES), (p - q) * np.log(p / q), rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(
        magnitude(log_ratio)(SCORES), abs(np.log(p / q)), rtol=1e-4, atol=1e-6
    )
    assert (np.asarray(disagreement(SCORES)) >= 0).all()


def test_they_nest_in_any_order():
    """Inside and around the others: each masks what the next one ranks."""
    ranked = top_share(sequence_mean, disagreement, 0.5)
    for outer, mask in (
        (first_tokens(ranked, 4), MASK & (np.arange(T) < 4)),
        (finished_only(ranked), MASK & ~np.asarray(ROLLOUT.truncated_b)[:, None]),
        (
            except_stop(ranked),
            MASK & (np.arange(T) != np.where(ROLLOUT.truncated_b, 99, LENGTHS - 1)[:, None]),
        ),
    ):
        assert reads_scores(outer)
        np.testing.assert_array_equal(outer(MASK, ROLLOUT, SCORES), ranked(mask, ROLLOUT, SCORES))
    inner = top_share(first_tokens(token_mean, 2), disagreement, 0.5)
    chosen = np.asarray(top_share(token_mean, disagreement, 0.5)(MASK, ROLLOUT, SCORES))
    np.testing.assert_array_equal(inner(MASK, ROLLOUT, SCORES), chosen * (np.arange(T) < 2))


def test_a_batch_in_pieces():
    """A response's weights don't depend on the rows beside it."""
    for reduction in (
        top_share(sequence_mean, disagreement, 0.3),
        top_either(sequence_mean, student_entropy, reverse_divergence, 0.3),
    ):
        whole = reduction(MASK, ROLLOUT, SCORES)
        for row in range(B):
            own = SCORES._replace(
                **{k: v[row : row + 1] for k, v in SCORES._asdict().items() if v is not None}
            )
            np.testing.assert_array_equal(reduction(MASK[row : row + 1], None, own)[0], whole[row])


def test_read_back_from_their_text():
    """With the objectives inside, and combinators of those."""
    for text in (
        "top_share(sequence_mean, disagreement, 0.4)",
        "except_stop(top_tokens(token_mean, magnitude(bounded(log_ratio, -2.0, 2.0)), 2))",
        "top_either(first_tokens(token_mean, 5), student_entropy, reverse_divergence, 0.5)",
    ):
        again = parse(text, REDUCTIONS)
        assert describe(again) == text
        assert again(MASK, ROLLOUT, SCORES).shape == MASK.shape
    for text, why in (
        ("disagreement", "written inside one"),
        ("magnitude(log_ratio)", "written inside one"),
        ("top_share(disagreement, sequence_mean, 0.4)", "reduction must be"),
        ("top_share(sequence_mean, token_mean, 0.4)", "by must be"),
        ("top_share(sequence_mean, disagreement)", "share"),
    ):
        with pytest.raises(ConfigError, match=why):
            parse(text, REDUCTIONS)


def test_what_cannot_be():
    """Named in one line: shares and counts out of range, scores that no teacher gave, and a
    quantity or reduction of the user's own that makes another shape."""
    for maker in (top_share, lambda *a: top_either(a[0], a[1], a[1], a[2])):
        for share in (0, 1.5):
            with pytest.raises(ConfigError, match=r"share must be in \(0, 1\]"):
                maker(token_mean, disagreement, share)
    with pytest.raises(ConfigError, match="count must be at least 1, got 0"):
        top_tokens(token_mean, disagreement, 0)
    with pytest.raises(
        ConfigError, match="needs teacher_logp, which is not known here: set teacher"
    ):
        top_share(token_mean, disagreement, 0.5)(MASK, ROLLOUT, SCORES._replace(teacher_logp=None))

    def summed(scores):
        return scores.reverse_kl.sum()

    with pytest.raises(
        ConfigError, match=r"summed \(test_selection.py:\d+\) made \[\], not|made \[\] of a mask"
    ):
        try_reduction(top_share(token_mean, summed, 0.5))
    with pytest.raises(ConfigError, match=r"made \[\] of a mask \[2, 3\]"):
        try_reduction(lambda mask, rollout, scores: scores.reverse_kl.sum())
    moving = mix(student_entropy, reverse_divergence, weight=linear(0, 1))
    with pytest.raises(ConfigError, match=r"linear\(0, 1\)\) goes .* in place of the schedule"):
        try_reduction(first_tokens(top_share(token_mean, moving, 0.5), 3))
    try_reduction(top_share(lambda mask, rollout: mask * 1.0, bounded(log_ratio, -1.0, 1.0), 0.5))
