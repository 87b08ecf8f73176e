"""Teachers and reference: the loaded weights of models that are not trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax.numpy as jnp

from kdjax import models
from kdjax.base import Params, Rollout
from kdjax.config.schema import Config
from kdjax.config.teachers import SELF
from kdjax.data.teacher_prompts import fields_of
from kdjax.train.parts.problems import Problems
from kdjax.train.parts.programs import Programs, TeacherPrograms, jitted_logp
from kdjax.train.parts.roles import Role, Roles, title
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
        elif role is not None and own.guide is not None:
            given = models.read_head(role.folder, role.shape, jnp.dtype(dtype), programs.mesh)
        loaded[name] = Teacher(role, own, params, given)
    return {tag: loaded[role.name if role else None] for tag, role in roles.teachers.items()}


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


def about_what_teachers_read(config: Config, problems: Problems) -> Iterator[str]:
    """What teachers read that the student does not, and which student teaches itself, in words."""
    for tag, theirs in problems.theirs.items():
        first = theirs.source.problem(int(problems.groups[tag][0])).prompt
        shown = theirs.tokenizer.render(first)[:SHOWN]
        yield f"prompt of the {title(tag)} as rendered, of the first problem: {shown!r}"
    told = problems.source.problem(0).teacher_prompt is not None
    if told and "teacher_prompt" not in fields_of(config.data.teacher_prompt_template or ""):
        yield (
            "note: problems have a teacher_prompt, and nobody reads it; put {teacher_prompt} into"
            " data.teacher_prompt_template"
        )
    if config.teacher == SELF:
        which = {0.0: "as it is at each update", 1.0: "as it is at the start"}
        average = f"averaged over updates with decay {config.self_decay}"
        yield f"teacher: the student itself, {which.get(config.self_decay, average)}"


SHOWN = 400
"""Characters of a teacher's prompt that are shown."""
