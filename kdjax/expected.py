"""What the steps of a config will be given, as shapes: for plans, and to tell mistakes early."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kdjax.base import Rollout
from kdjax.config import Config
from kdjax.programs import Programs
from kdjax.rewards import math
from kdjax.sharding import batch_spec
from kdjax.timetable import is_rewarded, methods


def expected_rollout(method: Config, mesh: Mesh) -> Rollout:
    """The shapes of a method's rollout at its full length, with every field that it will bring (of
    responses that are drawn, not read from a folder)."""
    prompt, response = method.data.max_prompt_tokens, method.curriculum.lengths[-1]
    rows = method.batch_size

    def array(dtype, *shape: int) -> Any:
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=batch_spec(mesh))

    a_token = functools.partial(array, jnp.float32, response)
    a_row = functools.partial(array, jnp.float32)
    made = Rollout(
        array(jnp.int32, prompt + response),
        array(jnp.int32),
        array(jnp.int32),
        a_token(),
        array(jnp.bool_),
    )
    if method.prefix == "student":
        made = made._replace(own_logp_bt=a_token(), entropy_bt=a_token())
        if method.rollouts.ahead:
            made = made._replace(staleness_b=array(jnp.int32), old_logp_bt=a_token())
    if method.reference is not None:
        made = made._replace(reference_logp_bt=a_token())
    if is_rewarded(method):
        made = made._replace(advantage_bt=a_token(), reward_b=a_row(), pass_rate_b=a_row())
        made = made._replace(draws_b=array(jnp.int32))
        if method.rl.reward is math:
            made = made._replace(not_scored_b=array(jnp.bool_))
        if method.rl.epochs > 1:
            made = made._replace(old_logp_bt=a_token())
    return made


def check_turns(config: Config, programs: Programs) -> None:
    """Trace the steps of a config's turns, which may begin long after the first step: what their
    losses need and don't get is told now. Errors: ConfigError."""
    if programs.teacher_mesh is not programs.mesh:  # what is given of a teacher is not here yet
        return
    entropy = jax.ShapeDtypeStruct((), jnp.float32)
    for number, method in enumerate(methods(config)[1:], start=1):
        rollout = expected_rollout(method, programs.mesh)
        teacher = next(iter(programs.teachers.values()))
        step = teacher.steps[number]
        jax.eval_shape(step, programs.state, teacher.params, rollout, entropy, programs.frozen)
