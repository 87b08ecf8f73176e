"""The optimizer, observed through what it does to plain parameters."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kdjax import make_optimizer
from kdjax.errors import ConfigError
from kdjax.step.gate import entropy_gate
from kdjax.step.optimizer import gate_state, guard_state

RATE = 0.125


def moves(steps: int, *, gradient=1.0, parameter=1.0, **options) -> list[float]:
    """How far one parameter moves downhill at each step, under a constant gradient.

    With a constant gradient AdamW's direction has length 1, so that a move is the learning rate.
    """
    optimizer = make_optimizer(
        **{"learning_rate": RATE, "steps": steps, "final_fraction": 1.0, **options}
    )
    params = jnp.float32(parameter)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    made = []
    for _ in range(steps):
        change, state = update(jnp.float32(gradient), state, params)
        params = params + change
        made.append(-float(change))
    return made


def test_warm_up_then_constant():
    """The rate rises linearly over warmup_fraction of the steps, to its peak, and stays there."""
    expected = RATE * np.array([1 / 4, 2 / 4, 3 / 4, 1, 1, 1, 1, 1])
    np.testing.assert_allclose(moves(8, warmup_fraction=0.5), expected, rtol=1e-5)


@pytest.mark.parametrize("warmup_fraction", [0.0, 0.125])
def test_no_warm_up_starts_at_the_peak(warmup_fraction):
    """No warm-up step, or a single one: the first rate is the peak already, never 0."""
    measured = moves(8, warmup_fraction=warmup_fraction)
    np.testing.assert_allclose(measured, RATE, rtol=1e-5)


def test_cosine_to_the_final_fraction():
    """After warm-up the rate goes by half a cosine towards final_fraction of the peak."""
    measured = moves(10, warmup_fraction=0.2, final_fraction=0.1)
    progress = np.arange(8) / 8
    cosine = 0.1 + 0.9 * (1 + np.cos(np.pi * progress)) / 2
    np.testing.assert_allclose(measured, RATE * np.array([0.5, 1, *cosine]), rtol=1e-5)


def test_zero_gradients_move_nothing():
    """A step without a gradient changes no parameter, exactly: no weight decay unless asked for."""
    assert moves(3, gradient=0.0, parameter=5.0) == [0.0, 0.0, 0.0]


def test_weight_decay_when_asked_for():
    """Decoupled decay: with zero gradients a parameter shrinks by rate * decay * parameter."""
    shrunk = moves(1, gradient=0.0, parameter=5.0, warmup_fraction=0.0, weight_decay=0.1)
    np.testing.assert_allclose(shrunk, [RATE * 0.1 * 5.0], rtol=1e-6)


def first_moment(gradients: dict, clip_norm: float) -> dict:
    """What AdamW was given in the first step, read off its first moment (b1 = 0.9)."""
    optimizer = make_optimizer(learning_rate=RATE, steps=1, clip_norm=clip_norm)
    params = jax.tree.map(jnp.zeros_like, gradients)
    _, state = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
    adam = next(s for s in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(s))
    return jax.tree.map(lambda m: m / np.float32(0.1), adam.mu)


def is_adam(node) -> bool:
    return hasattr(node, "mu")


def test_clipping_is_by_the_global_norm():
    """Gradients of global norm 13 are scaled to the bound as one; below it they pass unchanged."""
    gradients = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([[12.0]])}
    clipped = first_moment(gradients, clip_norm=2.0)
    np.testing.assert_allclose(clipped["a"], np.array([3.0, 4.0]) * 2 / 13, rtol=1e-5)
    np.testing.assert_allclose(clipped["b"], np.array([[12.0]]) * 2 / 13, rtol=1e-5)
    passed = first_moment(gradients, clip_norm=14.0)
    np.testing.assert_allclose(passed["b"], [[12.0]], rtol=1e-5)


NAN, INF = float("nan"), float("inf")
PARAMS = {"a": jnp.array([[1.5, -0.0], [0.0, -2.0]]), "b": jnp.array([3.0, -0.0])}
GOOD = {"a": jnp.array([[0.5, 1.0], [-1.0, 2.0]]), "b": jnp.array([1.0, -1.0])}


@functools.cache  # one program for all cases
def guarded():
    optimizer = make_optimizer(
        learning_rate=RATE, steps=8, weight_decay=0.1, gate=entropy_gate((4, 8), 0.5)
    )

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, grads, loss):
        updates, state = optimizer.update(
            grads, state, params, loss=loss, heldout_entropy_nats=jnp.float32(0.9)
        )
        return optax.apply_updates(params, updates), state

    return optimizer, step


def guarded_steps(given, mesh=None):
    """(params, state) after (loss, gradients) one after the other, jitted with donated arguments;
    with a mesh, parameters dealt over it."""
    optimizer, step = guarded()
    params = jax.tree.map(jnp.copy, PARAMS)
    if mesh is not None:
        dealt = NamedSharding(mesh, PartitionSpec("fsdp"))
        params = jax.tree.map(lambda p: jax.device_put(p, dealt), params)
    state = optimizer.init(params)
    for loss, grads in given:
        params, state = step(params, state, grads, jnp.float32(loss))
    return params, state


@pytest.mark.parametrize("on_mesh", [False, True])
@pytest.mark.parametrize(
    ("loss", "gradient"), [(NAN, 1.0), (INF, 1.0), (0.5, NAN), (0.5, -INF), (0.5, 3e38)]
)
def test_what_is_not_finite_is_skipped(loss, gradient, on_mesh):
    """No bit of parameters (-0.0 among them) or of clip and AdamW changes, also where only the
    norm overflows; it is counted, the gate is measured, and the next update is as if nothing had
    been."""
    mesh = jax.make_mesh((2,), ("fsdp",), (AxisType.Auto,)) if on_mesh else None
    bad = loss, GOOD | {"b": jnp.array([1.0, gradient])}
    before, first = guarded_steps([(0.5, GOOD)], mesh)
    after, skipped = guarded_steps([(0.5, GOOD), bad, bad], mesh)
    assert_bitwise_equal((before, guard_state(first).inner), (after, guard_state(skipped).inner))
    start, _ = guarded_steps([bad], mesh)
    assert_bitwise_equal(start, PARAMS)
    assert (guard_state(first).in_a_row, guard_state(first).total) == (0, 0)
    assert (guard_state(skipped).in_a_row, guard_state(skipped).total) == (2, 2)
    assert (gate_state(skipped).step, gate_state(skipped).measurements) == (3, 3)
    through, good = guarded_steps([(0.5, GOOD), bad, bad, (0.5, GOOD)], mesh)
    directly, _ = guarded_steps([(0.5, GOOD), (0.5, GOOD)], mesh)
    assert_bitwise_equal(through, directly)
    assert (guard_state(good).in_a_row, guard_state(good).total) == (0, 2)


def assert_bitwise_equal(first, second):
    chex.assert_trees_all_equal_structs(first, second)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be above 0, got 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be above 0, got nan"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"warmup_fraction": 1.0}, "warmup_fraction must be in [0, 1), got 1.0"),
        ({"warmup_fraction": -0.1}, "warmup_fraction must be in [0, 1), got -0.1"),
        ({"final_fraction": 1.5}, "final_fraction must be in [0, 1], got 1.5"),
        ({"final_fraction": -0.5}, "final_fraction must be in [0, 1], got -0.5"),
        ({"clip_norm": 0.0}, "clip_norm must be above 0, got 0.0"),
        ({"clip_norm": -1.0}, "clip_norm must be above 0, got -1.0"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0, got -0.1"),
        ({"b2": 1.0}, "b2 must be in [0, 1), got 1.0"),
        ({"b2": -0.1}, "b2 must be in [0, 1), got -0.1"),
    ],
)
def test_bad_arguments(changes, says):
    """A ConfigError of one line that names the argument and what it got."""
    with pytest.raises(ConfigError) as caught:
        make_optimizer(**{"learning_rate": RATE, "steps": 8, **changes})
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
