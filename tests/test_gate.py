"""The curriculum's gate: when it rises, when it stops for good, and that it disturbs nothing."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import entropy_gate, make_optimizer, rollout_length
from kdjax.base import ConfigError
from kdjax.gate import GateState, advance
from kdjax.optimizer import gate_state

LENGTHS = (128, 512, 1024)
NAN = float("nan")


def run(entropies, threshold_nats=0.3) -> GateState:
    """The state of a three-stage gate after these measurements."""
    state = entropy_gate(LENGTHS, threshold_nats).init({})
    for entropy in entropies:
        state = advance(
            state, jnp.float32(entropy), stages=len(LENGTHS), threshold_nats=threshold_nats
        )
    return state


@pytest.mark.parametrize(
    ("entropies", "stage", "stopped"),
    [
        ([], 0, False),
        ([0.31], 1, False),
        ([0.3], 1, False),
        ([0.29], 0, True),
        ([0.5, 0.4], 2, False),
        ([0.5, 0.4, 0.4, 0.9], 2, False),
        ([0.5, 0.2], 1, True),
        ([0.5, 0.2, 0.9, 0.9], 1, True),
        ([0.2, 0.9], 0, True),
        ([0.5, 0.4, 0.2], 2, True),
        ([NAN, NAN, 0.5, NAN], 1, False),
        ([NAN, 0.2, NAN, 0.5], 0, True),
        ([float("inf")], 0, False),
        ([float("-inf")], 0, False),
    ],
)
def test_worked_examples(entropies, stage, stopped):
    """Rise at or above the threshold, stop for good below it, never pass the last length.

    What is not finite was not measured. The state counts the measurements and keeps the last one.
    """
    state = run(entropies)
    assert (int(state.stage), bool(state.stopped)) == (stage, stopped)
    assert rollout_length(state, LENGTHS) == LENGTHS[stage]
    measured = [entropy for entropy in entropies if np.isfinite(entropy)]
    assert int(state.measurements) == len(measured)
    np.testing.assert_array_equal(state.entropy_nats, np.float32((measured or [NAN])[-1]))


def test_one_length_is_a_fixed_horizon():
    """With a single stage a high entropy changes nothing but the record."""
    gate = entropy_gate((64,), 0.3)
    _, state = gate.update({}, gate.init({}), heldout_entropy_nats=jnp.float32(2.0))
    assert rollout_length(state, (64,)) == 64
    assert not bool(state.stopped)


@pytest.mark.parametrize("missing", [NAN, float("inf"), float("-inf")])
@pytest.mark.parametrize("before", [[], [0.4], [0.4, 0.1]])
def test_no_measurement_leaves_the_state_bit_for_bit(missing, before):
    """NaN and infinities leave every field as it was, the NaN of the start included."""
    state = run(before)
    after = advance(state, jnp.float32(missing), stages=3, threshold_nats=0.3)
    assert [np.asarray(x).tobytes() for x in after] == [np.asarray(x).tobytes() for x in state]


def test_updates_pass_unchanged():
    """The gate returns the very updates that it was given, measured or not."""
    gate = entropy_gate(LENGTHS, 0.3)
    updates = {"w": jnp.array([1.0, jnp.nan, -2.0]), "b": jnp.zeros(2)}
    for entropy in (jnp.nan, 0.5, 0.1):
        passed, _ = gate.update(updates, gate.init(updates), heldout_entropy_nats=entropy)
        chex.assert_trees_all_equal(passed, updates)
    passed, state = gate.update(updates, gate.init(updates))
    chex.assert_trees_all_equal(passed, updates)
    assert int(state.measurements) == 0


@pytest.mark.parametrize("lengths", [(), (0,), (-1, 5), (8, 8), (16, 8), (8, 32, 16)])
def test_lengths_must_be_positive_and_rise(lengths):
    """Anything else is a ConfigError that shows them."""
    with pytest.raises(ConfigError) as caught:
        entropy_gate(lengths, 0.3)
    assert str(caught.value).endswith(f"lengths must be positive and rise, got {lengths}")


def test_in_the_optimizer_one_trace_serves_every_stage():
    """Inside make_optimizer, under jit: stages rise and stop without a second trace.

    The state keeps its structure, shapes and dtypes, so that nothing is compiled again.
    """
    optimizer = make_optimizer(
        learning_rate=0.1, steps=10, lengths=LENGTHS, entropy_threshold_nats=0.3
    )
    params = {"w": jnp.ones(3)}
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def update(gradients, state, params, entropy):
        return optimizer.update(gradients, state, params, heldout_entropy_nats=entropy)

    start = state = optimizer.init(params)
    stages = []
    for entropy in (NAN, 0.5, NAN, 0.3, 0.9, 0.1, 0.9):
        _, state = update({"w": jnp.ones(3)}, state, params, jnp.float32(entropy))
        chex.assert_trees_all_equal_shapes_and_dtypes(state, start)
        assert jax.tree.structure(state) == jax.tree.structure(start)
        stages.append(int(gate_state(state).stage))
    assert stages == [0, 1, 1, 2, 2, 2, 2]
    assert bool(gate_state(state).stopped)
    assert int(gate_state(state).measurements) == 5


def test_the_gate_does_not_change_what_is_learnt():
    """The parameter updates are the same whatever the entropy that the gate is told."""
    optimizer = make_optimizer(learning_rate=0.1, steps=10, lengths=LENGTHS)
    params, gradients = {"w": jnp.ones(3)}, {"w": jnp.array([0.1, -0.2, 0.3])}
    update = jax.jit(optimizer.update)
    measured, _ = update(
        gradients, optimizer.init(params), params, heldout_entropy_nats=jnp.float32(0.5)
    )
    unmeasured, _ = update(
        gradients, optimizer.init(params), params, heldout_entropy_nats=jnp.float32(NAN)
    )
    chex.assert_trees_all_equal(measured, unmeasured)
    assert float(jnp.abs(measured["w"]).min()) > 0
