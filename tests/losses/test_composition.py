"""Schedules in compositions: their text, their numbers, and a step that goes with them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import bigram, bigram_params, random_rollout

from kdjax import (
    add,
    at_temperature,
    divergence,
    forward_kl,
    jensen_shannon,
    linear,
    make_optimizer,
    mix,
    negative_log_likelihood,
    reverse_kl,
    scale,
    switch,
    total_variation,
)
from kdjax.config.names import TOKEN_LOSSES, parse
from kdjax.errors import ConfigError
from kdjax.losses.composition import at_progress, describe, schedules
from kdjax.step.score import HeadPlan
from kdjax.step.update import init_state, make_step

V = 23
LOGITS = jnp.asarray(np.random.default_rng(0).normal(0, 2, (2, 5)), jnp.float32)
PAIR = tuple(jax.nn.log_softmax(LOGITS))
MOVING = mix(forward_kl, reverse_kl, weight=linear(1.0, 0.0))


def test_linear_and_switch():
    """From end to end, and from one number to the other at a point."""
    assert [float(linear(2, -2).at(p)) for p in (0.0, 0.25, 1.0)] == [2.0, 1.0, -2.0]
    assert [float(switch(1, 3, at=0.5).at(p)) for p in (0.0, 0.49, 0.5, 1.0)] == [1, 1, 3, 3]


@pytest.mark.parametrize(
    "loss",
    [
        MOVING,
        scale(jensen_shannon(linear(0.1, 0.9)), 2),
        add(at_temperature(forward_kl, switch(2.0, 1.0, at=0.3)), scale(MOVING, linear(0, 1))),
    ],
    ids=describe,
)
def test_text_reads_back(loss):
    """describe and parse are inverse, and both know the same schedules."""
    again = parse(describe(loss), TOKEN_LOSSES)
    assert describe(again) == describe(loss)
    assert list(schedules(again)) == list(schedules(loss)) != []
    values = (at_progress(one, 0.25)(*PAIR) for one in (loss, again))
    np.testing.assert_array_equal(*values)


def test_the_number_of_a_moment():
    """A scheduled mix at a progress is the mix with that number, nested or not."""
    now = mix(forward_kl, reverse_kl, weight=0.75)
    np.testing.assert_allclose(at_progress(MOVING, 0.25)(*PAIR), now(*PAIR), rtol=1e-6)
    nested = scale(add(MOVING, forward_kl), 3)
    wanted = scale(add(now, forward_kl), 3)(*PAIR)
    np.testing.assert_allclose(at_progress(nested, 0.25)(*PAIR), wanted, rtol=1e-6)
    assert at_progress(now, 0.25) is now


def test_a_scheduled_part_keeps_its_text():
    """Two scheduled parts are two metrics, by the text that they were written with."""
    loss = add(jensen_shannon(linear(0.1, 0.9)), jensen_shannon(linear(0.2, 0.8)), forward_kl)
    assert describe(at_progress(loss, jnp.float32(0.5))) == describe(loss)
    _, metrics = run(loss, 1)
    parts = {"jensen_shannon(linear(0.1, 0.9))", "jensen_shannon(linear(0.2, 0.8))"}
    assert parts <= set(metrics)


def test_both_ends_are_checked():
    """A weight that leaves [0, 1] on its way is refused."""
    with pytest.raises(ConfigError, match=r"mix: weight must be in \[0, 1\], got linear\(0.5, 2\)"):
        mix(forward_kl, reverse_kl, weight=linear(0.5, 2))


def test_it_does_not_run_without_progress():
    """The error says what to give."""
    with pytest.raises(ConfigError, match="goes with training's progress"):
        MOVING(*PAIR)
    with pytest.raises(ConfigError, match="give `steps`"):
        make_step(bigram(), bigram(), make_optimizer(learning_rate=0.1, steps=4), token_loss=MOVING)


@pytest.mark.parametrize("text", ["linear(0, 1)", "scale(forward_kl, linear(forward_kl, 1))"])
def test_schedules_stand_where_numbers_do(text):
    """Alone, or of functions, they are refused in one line."""
    with pytest.raises(ConfigError):
        parse(text, TOKEN_LOSSES)


@functools.cache
def steps_of(loss, objective=divergence, micro_batches=1, steps=4):
    optimizer = make_optimizer(learning_rate=0.05, steps=4)
    made = make_step(
        bigram(), bigram(), optimizer, token_loss=loss, objective=objective,
        micro_batches=micro_batches, steps=steps, plan=HeadPlan(8),
    )  # fmt: skip
    return jax.jit(made), optimizer


def run(loss, number: int, **options):
    """(parameters, metrics) of step `number` of 4."""
    step, optimizer = steps_of(loss, **options)
    state = init_state(bigram_params(1, V), optimizer)._replace(step=jnp.int32(number))
    rollout = random_rollout(0, V, [3, 6, 1, 2], [5, 7, 2, 6], prompt_width=6, response_width=9)
    state, metrics = step(state, bigram_params(2, V, width=6), rollout)
    return state.params, metrics


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("number", [0, 1, 3])
def test_a_step_takes_its_own_number(number, micro_batches):
    """Step n of N trains the mix with weight 1 - n / N, in one program, and logs the weight."""
    params, metrics = run(MOVING, number, micro_batches=micro_batches)
    fixed, _ = run(mix(forward_kl, reverse_kl, weight=1 - number / 4), number)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), params, fixed)
    assert float(metrics["linear(1.0, 0.0)"]) == pytest.approx(1 - number / 4)
    assert steps_of(MOVING, micro_batches=micro_batches)[0]._cache_size() == 1


def test_each_part_is_logged_apart():
    """By its text, unweighed; what is a metric anyway is not there twice."""
    loss = mix(scale(total_variation, 3.0), forward_kl, weight=0.5)
    objective = add(divergence, scale(negative_log_likelihood, 0.1))
    _, metrics = run(loss, 0, objective=objective)
    _, alone = run(total_variation, 0)
    assert {name for name in metrics if "(" in name or "variation" in name} == {"total_variation"}
    per_token = {name: float(metrics[name]) for name in ("total_variation", "forward_kl")}
    assert 0 < per_token["total_variation"] < 1
    assert per_token["forward_kl"] == pytest.approx(float(alone["forward_kl"]), rel=1e-6)
