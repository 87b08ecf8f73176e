"""The curriculum's gate: what each policy does at which entropy, and that it disturbs nothing."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_config

from kdjax import entropy_gate, init_state, make_optimizer, models, rollout_length
from kdjax.base import TrainState
from kdjax.errors import ConfigError
from kdjax.sharding import make_mesh
from kdjax.step.gate import (
    DECISIONS,
    FALL_BACK,
    LAST,
    POLICIES,
    RISE,
    START,
    GateState,
    advance,
    fall_back,
    hold,
    last_decision,
    stop,
)
from kdjax.step.optimizer import gate_state
from kdjax.step.update import abstract_state
from kdjax.storage.checkpoints import open_checkpoints

LENGTHS = (128, 512, 1024)
NAN, INF = float("nan"), float("inf")
ABSOLUTE, RELATIVE = {"entropy_threshold_nats": 0.3}, {"entropy_threshold_share": 0.5}


def run(entropies, policy=stop, threshold=ABSOLUTE, capacity=8) -> GateState:
    """The state of a three-stage gate after updates with these entropies."""
    gate = entropy_gate(LENGTHS, **threshold, policy=policy, measurements=capacity)
    params = {"w": jnp.zeros(2)}
    state = gate.init(params)
    for entropy in entropies:
        _, state = gate.update(params, state, params, heldout_entropy_nats=jnp.float32(entropy))
    return state


def decisions(state: GateState) -> list[str]:
    return [DECISIONS[int(d)] for d in state.history.decision if d >= 0]


EXAMPLES = [
    (stop, ABSOLUTE, [], 0, []),
    (stop, ABSOLUTE, [0.31], 1, ["rise"]),
    (stop, ABSOLUTE, [0.3], 1, ["rise"]),
    (stop, ABSOLUTE, [0.29], 0, ["stop"]),
    (stop, ABSOLUTE, [0.5, 0.4, 0.4, 0.9], 2, ["rise", "rise", "last", "last"]),
    (stop, ABSOLUTE, [0.5, 0.2, 0.9, 0.1], 1, ["rise", "stop", "stopped", "stopped"]),
    (stop, ABSOLUTE, [0.5, 0.4, 0.2, 0.4], 2, ["rise", "rise", "stop", "stopped"]),
    (stop, ABSOLUTE, [NAN, NAN, 0.5, NAN], 1, ["rise"]),
    (stop, ABSOLUTE, [NAN, 0.2, NAN, 0.5], 0, ["stop", "stopped"]),
    (stop, ABSOLUTE, [INF, -INF], 0, []),
    (stop, {"entropy_threshold_nats": 0}, [0.0, 0.0], 2, ["rise", "rise"]),
    (hold, ABSOLUTE, [0.2, 0.1, 0.4, 0.2, 0.3], 2, ["hold", "hold", "rise", "hold", "rise"]),
    (hold, ABSOLUTE, [0.4, 0.4, 0.2, 0.4], 2, ["rise", "rise", "hold", "last"]),
    (fall_back, ABSOLUTE, [0.4, 0.4, 0.2, 0.4], 1, ["rise", "rise", "fall back", "stopped"]),
    (fall_back, ABSOLUTE, [0.4, 0.4, 0.4, 0.2], 1, ["rise", "rise", "last", "fall back"]),
    (fall_back, ABSOLUTE, [0.2], 0, ["fall back"]),
    (stop, RELATIVE, [0.8], 0, ["start"]),
    (stop, RELATIVE, [0.8, 0.4, 0.39], 1, ["start", "rise", "stop"]),
    (stop, RELATIVE, [NAN, 0.01, NAN, 0.005, 0.004], 1, ["start", "rise", "stop"]),
    (hold, RELATIVE, [0.8, 0.3, 0.9, 0.9], 2, ["start", "hold", "rise", "rise"]),
    (fall_back, RELATIVE, [0.8, 0.8, 0.1, 0.8], 0, ["start", "rise", "fall back", "stopped"]),
]


@pytest.mark.parametrize(("policy", "threshold", "entropies", "stage", "made"), EXAMPLES)
def test_worked_examples(policy, threshold, entropies, stage, made):
    """Rise at or above the threshold; under it as the policy says; nothing at what is not finite,
    and no decision on the measurement that a relative threshold refers to."""
    state = run(entropies, policy, threshold)
    assert decisions(state) == made
    assert int(state.stage) == stage
    assert rollout_length(state, LENGTHS) == LENGTHS[stage]
    assert bool(state.stopped) == bool({"stop", "fall back"} & {*made})
    assert last_decision(state) == (DECISIONS.index(made[-1]) if made else -1)


def test_the_history_says_what_happened():
    """Step, stage and entropy of every measurement, in order; unused places are -1 and NaN, and
    the newest of more than there is room for are counted alone."""
    state = run([NAN, 0.8, NAN, 0.5, 0.1], fall_back, RELATIVE, capacity=4)
    history = state.history
    np.testing.assert_array_equal(history.step, [1, 3, 4, -1])
    np.testing.assert_array_equal(history.stage, [0, 0, 1, -1])
    np.testing.assert_array_equal(history.entropy_nats, np.float32([0.8, 0.5, 0.1, NAN]))
    np.testing.assert_array_equal(history.decision, [START, RISE, FALL_BACK, -1])
    assert (int(state.step), int(state.measurements)) == (5, 3)
    assert float(state.threshold_nats) == np.float32(0.4)
    full = run([0.4, 0.5, 0.6], capacity=2)
    assert (int(full.stage), int(full.measurements)) == (2, 3)
    np.testing.assert_array_equal(full.history.entropy_nats, np.float32([0.4, 0.5]))


ENTROPIES = st.lists(st.sampled_from([0.0, 0.2, 0.3, 0.4, 2.0, NAN, INF]), max_size=8)


@settings(max_examples=40, deadline=None)
@given(ENTROPIES, st.sampled_from(list(POLICIES)), st.sampled_from([ABSOLUTE, RELATIVE]))
def test_policy_laws(entropies, name, threshold):
    """No policy passes the last length or goes up by more than one; stop and fall_back never rise
    after a failure, hold never goes down or stops; passing or not is by the threshold alone."""
    state = run([], POLICIES[name], threshold)
    stages, share = [0], threshold.get("entropy_threshold_share", 1.0)
    failed = False
    for entropy in entropies:
        before = state
        state, decision = advance(
            state, jnp.float32(entropy), stages=3, policy=POLICIES[name], threshold_share=share
        )
        stages.append(int(state.stage))
        change = stages[-1] - stages[-2]
        assert 0 <= stages[-1] <= 2
        assert change <= 1
        if failed and name != "hold":
            assert change == 0
        if int(decision) in (RISE, LAST):
            assert np.float32(entropy) >= before.threshold_nats
        failed |= DECISIONS[int(decision)] in ("stop", "hold", "fall back") and int(decision) >= 0
    assert bool(state.stopped) == (failed and name != "hold")
    if name != "fall_back":
        assert stages == sorted(stages)


@pytest.mark.parametrize("missing", [NAN, INF, -INF])
@pytest.mark.parametrize("before", [[], [0.4], [0.4, 0.1]])
@pytest.mark.parametrize("threshold", [ABSOLUTE, RELATIVE], ids=["absolute", "relative"])
def test_no_measurement_leaves_the_state_bit_for_bit(missing, before, threshold):
    """NaN and infinities leave every field as it was, the NaN of the start included."""
    state = run(before, fall_back, threshold)
    after, decision = advance(state, jnp.float32(missing), stages=3, policy=fall_back)
    first, second = jax.tree.leaves(after), jax.tree.leaves(state)
    assert [np.asarray(x).tobytes() for x in first] == [np.asarray(x).tobytes() for x in second]
    assert int(decision) == -1


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_updates_pass_unchanged(policy):
    """The gate returns the updates that it was given, bit for bit, wherever it does not fall
    back: unmeasured, at a start, a rise, the last length, a hold or a stop, and after one."""
    gate = entropy_gate((8, 16), entropy_threshold_share=0.5, policy=policy)
    params = {"w": jnp.array([1.0, 2.0, 3.0]), "b": jnp.ones(2)}
    updates = {"w": jnp.array([1.0, jnp.nan, -2.0]), "b": jnp.zeros(2)}
    state, seen = gate.init(params), []
    for entropy in (NAN, 0.8, 0.7, 0.6, 0.1, 0.7):
        passed, state = gate.update(updates, state, params, heldout_entropy_nats=entropy)
        seen.append(last_decision(state))
        if entropy != 0.1 or policy is not fall_back:
            chex.assert_trees_all_equal(passed, updates)
    assert len(set(seen)) == 6 - (policy is hold)
    passed, after = gate.update(updates, state, params)
    chex.assert_trees_all_equal(passed, updates)
    assert int(after.measurements) == int(state.measurements) == 5


def test_fall_back_returns_the_parameters_of_the_last_pass():
    """Parameters move by 1 a step; at the failure they become what they were at the last
    measurement that passed, up to rounding, and go on from there."""
    gate = entropy_gate(LENGTHS, 0.3, policy=fall_back)
    params, moved = {"w": jnp.array([0.1, 1e3, -7.0])}, {"w": jnp.ones(3)}
    state, trace = gate.init(params), []
    for entropy in (NAN, 0.5, NAN, 0.4, NAN, NAN, 0.1, 0.4, NAN):
        trace.append(params["w"])
        updates, state = gate.update(moved, state, params, heldout_entropy_nats=entropy)
        params = optax.apply_updates(params, updates)
        if entropy == 0.1:
            np.testing.assert_allclose(params["w"], trace[3], rtol=1e-6)
            np.testing.assert_array_equal(state.stable["w"], trace[3])
    np.testing.assert_allclose(params["w"], trace[3] + 2, rtol=1e-6)
    assert float(jnp.abs(trace[3] - trace[0]).min()) > 2


def test_nothing_passed_is_a_return_to_the_start():
    """At the first failure the copy is of the parameters that the run began with."""
    gate = entropy_gate((8, 16), 0.3, policy=fall_back)
    start = {"w": jnp.array([1.0, 2.0])}
    state, params = gate.init(start), {"w": jnp.array([3.0, 5.0])}
    updates, state = gate.update(params, state, params, heldout_entropy_nats=0.1)
    chex.assert_trees_all_equal(optax.apply_updates(params, updates), start)


def test_the_copy_is_there_under_fall_back_alone():
    """No other policy, and no fixed horizon, pays for a second set of parameters."""
    params = {"w": jnp.ones(3)}
    for lengths, policy, kept in (
        (LENGTHS, stop, 0),
        (LENGTHS, hold, 0),
        (LENGTHS, fall_back, 3),
        ((64,), fall_back, 0),
    ):
        state = entropy_gate(lengths, 0.3, policy=policy).init(params)
        assert sum(leaf.size for leaf in jax.tree.leaves(state.stable)) == kept


def test_a_fresh_state_can_be_donated():
    """No two of its arrays are one buffer, and none is a parameter's."""
    params = {"w": jnp.ones(3)}
    state = entropy_gate(LENGTHS, 0.3, policy=fall_back).init(params)
    arrays = jax.tree.leaves((params, state))
    assert len({array.unsafe_buffer_pointer() for array in arrays}) == len(arrays)


def test_one_length_is_a_fixed_horizon():
    """With a single stage no threshold is needed, and an entropy changes nothing but the record."""
    gate = entropy_gate((64,))
    _, state = gate.update({}, gate.init({}), heldout_entropy_nats=jnp.float32(2.0))
    assert rollout_length(state, (64,)) == 64
    assert not bool(state.stopped)
    assert decisions(state) == ["last"]


@pytest.mark.parametrize("lengths", [(), (0,), (-1, 5), (8, 8), (16, 8), (8, 32, 16)])
def test_lengths_must_be_positive_and_rise(lengths):
    """Anything else is a ConfigError that shows them."""
    with pytest.raises(ConfigError) as caught:
        entropy_gate(lengths, 0.3)
    assert str(caught.value).endswith(f"lengths must be positive and rise, got {lengths}")


@pytest.mark.parametrize(
    ("nats", "share", "says"),
    [
        (None, None, "set one of entropy_threshold_nats and entropy_threshold_share, got None and"),
        (0.1, 0.5, "set one of entropy_threshold_nats and entropy_threshold_share, got 0.1 and"),
        (-0.1, None, "entropy_threshold_nats must be at least 0, got -0.1"),
        (NAN, None, "entropy_threshold_nats must be at least 0, got nan"),
        (None, 0.0, "entropy_threshold_share must be over 0, got 0.0"),
        (None, INF, "entropy_threshold_share must be over 0, got inf"),
    ],
)
def test_there_is_one_threshold(nats, share, says):
    """A curriculum has exactly one threshold, and it is a number that can be reached."""
    with pytest.raises(ConfigError) as caught:
        entropy_gate(LENGTHS, nats, entropy_threshold_share=share)
    assert says in str(caught.value)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_in_the_optimizer_one_trace_serves_every_stage(policy):
    """Inside make_optimizer, under jit: stages change and stop without a second trace.

    The state keeps its structure, shapes and dtypes, so that nothing is compiled again.
    """
    gate = entropy_gate(LENGTHS, 0.3, policy=policy)
    optimizer = make_optimizer(learning_rate=0.1, steps=10, gate=gate)
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
    assert stages == [0, 1, 1, 2, 2, 1 if policy is fall_back else 2, stages[-2]]
    assert bool(gate_state(state).stopped) == (policy is not hold)
    assert int(gate_state(state).measurements) == 5


def test_the_gate_does_not_change_what_is_learnt():
    """The parameter updates are the same whatever the entropy that the gate is told."""
    optimizer = make_optimizer(learning_rate=0.1, steps=10, gate=entropy_gate(LENGTHS, 0.3))
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


def test_the_copy_on_a_mesh_and_through_a_checkpoint(tmp_path):
    """On (1, 4, 2) the copy is dealt as the parameters are, jitted steps leave it there, it is
    restored bit for bit with the rest of the gate's state, and it is what is returned to."""
    config, mesh = tiny_config(64, hidden_size=32, num_key_value_heads=4), make_mesh(8, 4, 2)
    gate = entropy_gate(LENGTHS, 0.3, policy=fall_back, measurements=3)
    optimizer = make_optimizer(learning_rate=0.1, steps=10, gate=gate)
    like = abstract_state(models.abstract_params(config, jnp.float32, mesh), optimizer, mesh)
    rng, places = np.random.default_rng(0), jax.tree.map(lambda leaf: leaf.sharding, like)
    params = jax.tree.map(lambda leaf: np.float32(rng.normal(size=leaf.shape)), like.params)
    states = [jax.device_put(init_state(params, optimizer), places)]

    @jax.jit
    def step(state, entropy):
        updates, opt_state = optimizer.update(
            state.params, state.opt_state, state.params, heldout_entropy_nats=entropy
        )
        return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state)

    for entropy in (NAN, 0.5, NAN):
        states.append(step(states[-1], jnp.float32(entropy)))
    checkpoints = open_checkpoints(tmp_path)
    checkpoints.save(3, states[-1], {})
    restored = checkpoints.restore(3, like)
    checkpoints.close()
    chex.assert_trees_all_equal(states[-1], restored)
    after = step(restored, jnp.float32(0.1))
    for state in (restored, after):
        kept = gate_state(state.opt_state)
        chex.assert_trees_all_equal(kept.stable, states[1].params)  # those that were measured
        for copy, wanted in zip(*map(jax.tree.leaves, (kept.stable, like.params)), strict=True):
            assert copy.sharding.is_equivalent_to(wanted.sharding, copy.ndim)
        assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(kept.history))
    chex.assert_trees_all_close(after.params, states[1].params, rtol=1e-6, atol=1e-6)
    moved, past = jax.tree.leaves(restored.params), jax.tree.leaves(states[1].params)
    assert all(float(jnp.abs(a - b).max()) > 0.01 for a, b in zip(moved, past, strict=True))
