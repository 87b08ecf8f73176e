"""States as a trainer saves them, without a model: parameters, moments, counters, gate."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from kdjax.base import TrainState
from kdjax.sharding import make_mesh
from kdjax.step.gate import entropy_gate, fall_back
from kdjax.step.optimizer import make_optimizer
from kdjax.step.update import init_state

GATE = entropy_gate((4, 8), 0.3, policy=fall_back, measurements=3)
OPTIMIZER = make_optimizer(learning_rate=0.1, steps=10, gate=GATE)


def initial() -> TrainState:
    """Step 0. Large arrays and small ones, which lie apart in a checkpoint."""
    params = {"embed": jnp.ones((64, 64)), "norm": jnp.ones(8), "steps": jnp.ones((4, 8, 8))}
    return init_state(params, OPTIMIZER)


def values_of(step: int):
    """What might be trained after `step` steps, on the host; every leaf another than at step 0."""
    rng = np.random.default_rng(step)

    def trained(leaf: jax.Array) -> np.ndarray:
        if leaf.dtype == jnp.float32:
            return rng.normal(size=leaf.shape).astype(np.float32)
        return np.full(leaf.shape, step, leaf.dtype)

    return jax.tree.map(trained, initial())


def state_of(step: int, devices: int = 1) -> TrainState:
    """The same on so many devices, the rows dealt over them."""
    return jax.tree.map(jax.device_put, values_of(step), places(devices))


def places(devices: int):
    """The sharding of every leaf on a mesh of so many devices."""
    mesh = make_mesh(jax.devices()[:devices], fsdp=devices)

    def place(leaf):
        dealt = leaf.ndim > 0 and leaf.shape[0] % devices == 0
        return NamedSharding(mesh, PartitionSpec("fsdp") if dealt else PartitionSpec())

    return jax.tree.map(place, initial())


def like(devices: int = 1) -> TrainState:
    """Shapes of a state on so many devices."""

    def shape(leaf, place):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    return jax.tree.map(shape, initial(), places(devices))


def bits(state) -> list[bytes]:
    """Every leaf's bytes."""
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]
