"""Teachers and reference: the loaded weights of models that are not trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kdjax import models
from kdjax.base import Params, Rollout
from kdjax.data.alignment import SharedVocabulary
from kdjax.numerics import LMHead
from kdjax.sharding import head_sharding, replicated
from kdjax.step.vocabulary import SharedHead, arranged, lay_out
from kdjax.train.parts.programs import Headed, Programs, TeacherPrograms, jitted_logp
from kdjax.train.parts.roles import Role, Roles
from kdjax.train.parts.shapes import TEACHER_WEIGHTS


class Teacher(NamedTuple):
    """One teacher: its role, its programs, its weights, and the part of the weights that the step
    takes (given, of `TeacherPrograms.give`). Without a teacher all but the programs are None."""

    role: Role | None
    programs: TeacherPrograms
    params: Params | None = None
    given: Params | None = None


def load_teachers(
    roles: Roles, programs: Programs, dtype: str, teacher_weights: str
) -> dict[str, Teacher]:
    """Tag -> its teacher, in the compute dtype, stored as `teacher_weights` says; a model that
    several tags name is loaded once. Where stored outputs replace the model, only its LM head is
    loaded, if they are states, or nothing."""
    loaded = {}
    for name, role in roles.by_model().items():
        own, params, given = programs.teachers[name], None, None
        if role is not None and own.model is not None:
            hold, mesh = TEACHER_WEIGHTS[teacher_weights], programs.teacher_mesh
            _, params = models.load(role.folder, mesh, params_dtype=jnp.dtype(dtype), hold=hold)
            given = own.give(params)
            if role.shared is not None:
                given = _rearranged(given, role.shared, programs.mesh)
        elif role is not None and own.guide is not None:
            given = models.read_head(role.folder, role.shape, jnp.dtype(dtype), programs.mesh)
        loaded[name] = Teacher(role, own, params, given)
    return {tag: loaded[role.name if role else None] for tag, role in roles.teachers.items()}


def _rearranged(given: Headed | LMHead, vocabulary: SharedVocabulary, mesh: Mesh) -> Params:
    """The same with the LM head's rows in the student's order."""
    head: Any = given.head if isinstance(given, Headed) else given
    columns, shared = lay_out(vocabulary.teacher_of_v, vocabulary.size, vocabulary.stops)
    if not np.array_equal(columns, np.arange(len(columns))):
        place = head_sharding(mesh, (len(columns), head.weight_vd.shape[1]))
        head = jax.jit(arranged, out_shardings=place)(head, columns)
    if shared is not None:
        head = SharedHead(head, jax.device_put(shared, replicated(mesh)))
    return given._replace(head=head) if isinstance(given, Headed) else head


def open_reference(
    role: Role | None, programs: Programs, dtype: str, micro_batches: int
) -> Callable[[Rollout], Rollout]:
    """refer(rollout) -> the rollout with the reference's log-probability of each response token,
    under the run's stop policy; the rollout as it is where there is no reference."""
    if role is None or programs.reference is None:
        return lambda rollout: rollout
    model = programs.reference.model
    _, params = models.load(role.folder, programs.mesh, params_dtype=jnp.dtype(dtype))

    def refer(rollout: Rollout) -> Rollout:
        read = jitted_logp(model, params, rollout, micro_batches=micro_batches, plan=programs.head)
        return rollout._replace(reference_logp_bt=read)

    return refer
