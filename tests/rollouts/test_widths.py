"""Widths: a short ladder that holds every length, and rollouts cut to it without a trace."""

from __future__ import annotations

import chex
import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import one_layer, random_rollout

from kdjax.base import TeacherRows
from kdjax.errors import ConfigError
from kdjax.rollouts import widths as widths_module
from kdjax.rollouts.widths import bucket, ladder, longest, trim
from kdjax.step.score import HeadPlan, scored_loss

V = 20


@given(st.integers(1, 40_000), st.data())
def test_the_smallest_width_that_holds_it(widest, data):
    """A width of the ladder, at least the length, and the next smaller one is too small; never
    more than half as much again as a length past 256 needs (or the 128 below it)."""
    length = data.draw(st.integers(1, widest))
    width = bucket(length, widest)
    assert length <= width <= widest
    assert all(smaller < length for smaller in ladder(widest) if smaller < width)
    assert width <= max(min(256, widest), 1.5 * length)
    assert width % 128 == 0 or width == widest
    assert width == widest or widest > 256


@pytest.mark.parametrize(("widest", "widths"), [(200, 1), (256, 1), (4096, 9), (32_768, 15)])
def test_programs_are_few(widest, widths):
    """Every length up to 32,768 tokens finds its place in at most 15 widths."""
    assert len({bucket(length, widest) for length in range(widest + 1)}) == widths
    assert len(ladder(widest)) == widths


def test_a_row_past_the_widest():
    """A ConfigError of one line with both numbers."""
    with pytest.raises(ConfigError, match="row of 301 tokens is longer than the widest of 300"):
        bucket(301, 300)


@pytest.fixture
def small_buckets(monkeypatch):
    """The ladder 8, 12, 16, 24, ..., for rollouts that a test can afford."""
    monkeypatch.setattr(widths_module, "WHOLE", 8)


@pytest.mark.parametrize(
    ("responses", "width", "steps"),
    [([3, 5], 8, 8), ([3, 7], 12, 12), ([13, 0], 16, 14), ([14, 14], 17, 14)],
    ids=str,
)
@pytest.mark.usefixtures("small_buckets")
def test_trimmed_scores_the_same(responses, width, steps):
    """The loss, its gradient and every token's scores are those of the rollout before the cut."""
    full = random_rollout(3, V, [3, 2], responses, prompt_width=3, response_width=14)
    cut = trim(full)
    assert (cut.tokens_bs.shape, cut.sampler_logp_bt.shape) == ((2, width), (2, steps))
    (student, params), (teacher, teacher_params) = one_layer(V, 1), one_layer(V, 2)

    @jax.jit
    def run(params, rollout):
        def loss(params):
            total, scores = scored_loss(
                student, params, teacher, teacher_params, rollout, plan=HeadPlan(4)
            )
            return total.mean(), scores

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, scores), gradient = run(params, cut)
    (full_loss, full_scores), full_gradient = run(params, full)
    assert loss != 0
    np.testing.assert_allclose(loss, full_loss, rtol=1e-6)
    chex.assert_trees_all_close(gradient, full_gradient, atol=1e-6, rtol=1e-5)
    same = jax.tree.map(lambda x: x[:, :steps], full_scores)
    chex.assert_trees_all_close(scores, same, atol=1e-5)


@pytest.mark.usefixtures("small_buckets")
def test_training_sees_few_shapes():
    """Rollouts of every length of response make no more shapes than the ladder has widths."""
    rollouts = (
        random_rollout(0, V, [3, 2], [n, 1], prompt_width=3, response_width=60) for n in range(61)
    )
    shapes = {trim(rollout).tokens_bs.shape for rollout in rollouts}
    assert shapes == {(2, width) for width in ladder(63)}
    assert len(shapes) == 7


@pytest.mark.usefixtures("small_buckets")
def test_rows_of_the_teacher_are_trimmed_to_their_own():
    """Each to the bucket of its longest, or of what another process says is its longest."""
    rollout = random_rollout(0, V, [3, 2], [2, 1], response_width=30)
    slot = np.array([[20, 21], [4, -1]])
    apart = TeacherRows(
        np.zeros((2, 40), np.int32), np.pad(slot, ((0, 0), (0, 28)), constant_values=-1)
    )
    rollout = rollout._replace(teacher_rows=apart)
    assert longest(rollout) == (5, 22)
    for least, width, theirs in [((0, 0), 8, 24), ((9, 25), 12, 32)]:
        cut = trim(rollout, least)
        assert (cut.tokens_bs.shape, cut.teacher_rows.tokens_bs.shape) == ((2, width), (2, theirs))
        assert cut.teacher_rows.slot_bt.shape == cut.sampler_logp_bt.shape
