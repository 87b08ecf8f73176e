"""The student's average: a copy of its parameters that follows them at a distance."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from kdjax.base import Params, TrainState
from kdjax.errors import ConfigError
from kdjax.models import narrow
from kdjax.models.lora import join


class AverageState(NamedTuple):
    """The average of the parameters: those of the start, then what each update makes of it."""

    params: Params


def exponential_average(decay: float) -> optax.GradientTransformationExtraArgs:
    """A transformation that returns updates as they are, and keeps average' = decay average +
    (1 - decay) new parameters (float32 like them); at decay 1 those of the start, to the bit.

    It stands outermost, where updates are final: one that was skipped counts as parameters that
    stayed. decay: in (0, 1]; at 0 the average is the parameters, and no copy is needed. Errors:
    ConfigError for another.

    >>> average = exponential_average(0.5)
    >>> state = average.init(jnp.float32(2.0))
    >>> float(average.update(jnp.float32(4.0), state, jnp.float32(2.0))[1].params)
    4.0
    """
    if not 0 < decay <= 1:
        raise ConfigError(f"exponential_average: decay must be in (0, 1], got {decay}")

    def init(params: Params) -> AverageState:
        return AverageState(jax.tree.map(jnp.copy, params))

    def update(updates, state, params=None, **extra):
        del extra
        if decay == 1:
            return updates, state
        new = optax.apply_updates(params, updates)
        moved = jax.tree.map(lambda old, n: old + (1 - decay) * (n - old), state.params, new)
        return updates, AverageState(moved)

    return optax.GradientTransformationExtraArgs(init, update)


def average_of(state: TrainState) -> Params:
    """The average that an optimizer's state keeps, or the present parameters where it keeps
    none."""
    kept = state.opt_state.get("average")
    return state.params if kept is None else kept.params


def of_student(dtype: DTypeLike) -> Callable[[TrainState, Params], Params]:
    """of_state(state, frozen) -> the parameters of the student as its own teacher, in the compute
    dtype, as a teacher's are held: its average where the state has one, else the present ones."""

    def of_state(state: TrainState, frozen: Params) -> Params:
        return narrow(join(frozen, average_of(state)), jnp.dtype(dtype))

    return of_state
