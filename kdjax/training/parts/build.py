"""The parts of a run, built once from its config: models, data, prefix sources, compiled steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kdjax import models
from kdjax.base import Batch, Key, Params, PrefixSource, Rollout, Sampler, Samples, TrainState
from kdjax.config.schema import Config, Prefix
from kdjax.config.timetable import Timetable, timetable
from kdjax.data.tokenizer import Tokenizer
from kdjax.grading.rewards import Rewarder, open_rewarder
from kdjax.losses.composition import theirs
from kdjax.losses.trial import try_advantage
from kdjax.models.lora import Student, open_student
from kdjax.rollouts.prefix import from_dataset, from_student
from kdjax.runtime.profiling import UNPROFILED, Profile
from kdjax.sharding import data_size
from kdjax.training.parts import precomputed
from kdjax.training.parts import roles as named
from kdjax.training.parts.precompute import Asked, from_cache, from_stored
from kdjax.training.parts.precomputed import NOTHING, Stored
from kdjax.training.parts.problems import (
    ADAPTER,
    TRAJECTORIES,
    Problems,
    encode,
    heldout_source,
    open_problems,
    run_key,
    training_source,
)
from kdjax.training.parts.programs import Programs, compose
from kdjax.training.parts.published import Published, open_published
from kdjax.training.parts.roles import Role, Roles, resolve
from kdjax.training.parts.sampling import sampler_of
from kdjax.training.parts.shapes import Shapes, choose_meshes, expected_rollout
from kdjax.training.parts.teachers import Teacher, load_teachers, open_reference, open_served


class Responses(NamedTuple):
    """The sources of the responses that are trained on.

    - draw(params, batch, key, length): the student's sampler at the training temperature, with
      parameters of `Parts.sampler_params`; it runs on this process's devices alone.
    - sources: by prefix and tag.
    - stored: by tag, the folders that responses are read from; {} where none are.
    """

    draw: Sampler
    sources: dict[Prefix, dict[str, PrefixSource]]
    stored: dict[str, Stored]


class Parts(NamedTuple):
    """Everything a run is made of, in the order in which it becomes known: the config with its
    timetable, the models by their roles, the programs compiled from shapes, the weights, the data.

    refer(rollout) adds the reference model's log-probabilities, serve(rollout) the top k of a
    teacher behind an engine, to this process's rows. published is the student behind an engine,
    where one draws its rollouts (evaluation and the gate draw here). rewarder is closed by the
    caller of `build`. profile times the parts of a training step.
    """

    config: Config
    table: Timetable
    roles: Roles
    programs: Programs
    student: Student
    teachers: dict[str, Teacher]
    refer: Callable[[Rollout], Rollout]
    serve: Callable[[Rollout], Rollout]
    published: Published | None
    problems: Problems
    responses: Responses
    rewarder: Rewarder
    identities: dict[str, str]
    profile: Profile = UNPROFILED

    @property
    def mesh(self) -> Mesh:
        return self.programs.mesh

    @property
    def tokenizer(self) -> Tokenizer:
        return self.roles.student.tokenizer

    def sampler_params(self, trained: Params) -> Params:
        """Trained parameters as the sampler reads them. All processes call this together."""
        return self.programs.student.to_sampler(self.student.whole(trained))


def build(config: Config, devices: Sequence[jax.Device] | None = None) -> Parts:
    """The parts of a config's run: models and data are loaded, programs composed over these devices
    (by default those of all processes)."""
    table, stored = timetable(config), precomputed.open_stored(config)
    roles = resolve(config, precomputed.vocabulary(stored))
    shapes = shapes_of(roles, stored, config.served.url is not None)
    meshes = choose_meshes(config, devices or jax.devices(), shapes)
    programs = compose(config, table, meshes, shapes)
    check_turns(config, table, programs)
    own = roles.student.tokenizer
    readers = {tag: role.tokenizer if role else own for tag, role in roles.teachers.items()}
    problems = open_problems(config, table, readers, own)
    student = load_student(roles.student, programs, config.dtype, run_key(config.seed, ADAPTER))
    teachers = load_teachers(roles, programs, config.dtype, config.teacher_weights)
    draw = sampler_of(
        config.rollouts, programs.mesh, programs.student.sampler, config.sampling,
        roles.student.tokenizer.stop_ids, shapes.vocabulary,
    )  # fmt: skip
    parts = Parts(
        config=config,
        table=table,
        roles=roles,
        programs=programs,
        student=student,
        teachers=teachers,
        refer=open_reference(roles.reference, programs, config.dtype, config.micro_batches),
        serve=open_served(config, roles, precomputed.kept_of(stored) == NOTHING),
        published=_published(config, table, roles.student, programs, student, problems),
        problems=problems,
        responses=Responses(draw, {}, stored),
        rewarder=open_rewarder(
            config.rl.reward,
            workers=config.rollouts.reward_workers,
            deadline_seconds=config.rollouts.reward_seconds,
        ),
        identities=identities(config, table),
    )
    if any(method.rewarded for method in table.methods):
        try_rewards(parts)
    sources = {method.prefix: prefix_sources(parts, method.prefix) for method in table.methods}
    return parts._replace(responses=parts.responses._replace(sources=sources))


def _published(
    config: Config,
    table: Timetable,
    role: Role,
    programs: Programs,
    student: Student,
    problems: Problems,
) -> Published | None:
    """The student's engine; None where none draws its rollouts."""
    drawn = config.trajectories is None and table.draws("student")
    if config.rollouts.engine is None or not drawn:
        return None
    rows, most = np.arange(PROBED * data_size(programs.mesh)), config.data.max_prompt_tokens
    batch = encode(problems.source, role.tokenizer, rows % problems.source.size, most, 1)
    return open_published(config, role, programs, student, batch)


PROBED = 4
"""Prompts, of each device, whose log-probabilities tell whether an engine has the new weights."""


def shapes_of(roles: Roles, stored: dict[str, Stored], served: bool = False) -> Shapes:
    """The shapes of these models. Where teachers' outputs are stored, or an engine scores (served),
    no teacher runs here, and only stored states need its LM head."""
    keep, teachers = precomputed.kept_of(stored), roles.by_model()
    alike = [role for role in teachers.values() if role and role.shared is None]
    stop_ids = (i for role in alike for i in role.tokenizer.stop_ids)
    live = keep == NOTHING and not served
    return Shapes(
        student=roles.student.shape,
        teachers={n: role.shape if role and live else None for n, role in teachers.items()},
        vocabulary=roles.student.tokenizer.size,
        stop_ids=roles.student.tokenizer.stop_ids,
        teacher_stop_ids=(*stop_ids, *precomputed.stop_ids(stored)),
        heads_alone=keep.kind == "states",
        reference=roles.reference.shape if roles.reference else None,
    )


def load_student(role: Role, programs: Programs, dtype: str, key: Key) -> Student:
    """The student's weights, split into trained and frozen, sharded as the programs take them."""
    own = programs.student
    held = jnp.float32 if own.lora is None else jnp.dtype(dtype)
    _, params = models.load(role.folder, programs.mesh, params_dtype=held)
    student = open_student(own.lora, role.shape, params, key)
    places = jax.tree.map(lambda leaf: leaf.sharding, own.state.params)
    return student._replace(trained=jax.device_put(student.trained, places))


def asked_of(parts: Parts, prefix: Prefix) -> dict[str, Asked]:
    """By tag, the problems whose responses of a prefix are drawn once, with what draws them."""
    config, programs, draw = parts.config, parts.programs, parts.responses.draw

    def draw_first(batch: Batch, key: Key, length: int) -> Samples:
        return draw(parts.sampler_params(parts.student.trained), batch, key, length)

    return {
        tag: Asked(
            config=config,
            prefix=prefix,
            programs=programs,
            student=parts.roles.student,
            teacher=teacher,
            tag=tag,
            rows=parts.problems.groups[tag],
            source=parts.problems.source,
            key=run_key(config.seed, TRAJECTORIES),
            draw_student=draw_first,
            theirs=parts.problems.theirs.get(tag),
        )
        for tag, teacher in parts.teachers.items()
    }


def prefix_sources(parts: Parts, prefix: Prefix) -> dict[str, PrefixSource]:
    """By tag, the source of a prefix's responses: a sampler, the dataset, or a folder."""
    asked, stored, draw = asked_of(parts, prefix), parts.responses.stored, parts.responses.draw
    sources: dict[str, Callable[[str], PrefixSource]] = {
        "dataset": lambda tag: from_dataset,
        "student": lambda tag: from_student(
            draw if parts.published is None else parts.published.draw
        ),
        "teacher": lambda tag: from_cache(asked[tag], lambda: rows_needed(parts, tag)),
        "stored": lambda tag: from_stored(asked[tag], stored[tag]),
    }
    return {tag: sources["stored" if stored else prefix](tag) for tag in parts.teachers}


def rows_needed(parts: Parts, tag: str) -> np.ndarray:
    """The rows of the source whose responses a run needs from the teacher of a tag, in the order in
    which its steps come to them."""
    steps = (step for step in range(parts.config.steps) if parts.table.at(step).prefix == "teacher")
    batches = (parts.problems.batch_at(step) for step in steps)
    needed = dict.fromkeys(row for owner, rows in batches for row in rows if owner == tag)
    return np.array([*needed], np.int64)


def fresh_state(parts: Parts) -> TrainState:
    """The state of step 0 on the mesh: the student's parameters, and an optimizer state that is
    sharded like them."""
    own, params = parts.programs.student, parts.student.trained
    like = jax.tree.map(lambda leaf: leaf.sharding, own.state)
    opt_state = jax.jit(own.optimizer.init, out_shardings=like.opt_state)(params)
    return TrainState(jax.device_put(jnp.int32(0), like.step), params, opt_state)


def identities(config: Config, table: Timetable) -> dict[str, str]:
    """Hashes of what a run is trained with besides its config: model folders and problems."""
    found = named.identities(config)
    found["problems"] = training_source(config.data, table).identity
    found |= precomputed.identities(config)
    if len(config.curriculum.lengths) > 1:
        found["heldout problems"] = heldout_source(config.data, config.curriculum).identity
    return found


def try_rewards(parts: Parts) -> None:
    """The user's own reward of a right and an empty response, and the user's own advantages of two
    groups. Errors: ConfigError naming whose function is wrong, and where."""
    rl, source = parts.config.rl, parts.problems.source
    if theirs(rl.reward):
        problem = source.problem(0)
        parts.rewarder.of_all([problem] * 2, ["", rf"\boxed{{{problem.answer}}}"])
    try_advantage(rl.advantage, rl.group_size)


def check_turns(config: Config, table: Timetable, programs: Programs) -> None:
    """Trace the training steps of a config's turns, which may begin long after the first, and the
    first where functions of the user's own are in it: a loss that lacks something it needs fails
    now. Errors: ConfigError, and those of the user's functions."""
    apart = programs.teacher_mesh is not programs.mesh or config.least_aligned is not None
    if apart:  # the arrays that the teacher gives are not known yet
        return
    entropy, own = jax.ShapeDtypeStruct((), jnp.float32), programs.student
    teacher = next(iter(programs.teachers.values()))
    for number, (step, method) in enumerate(zip(teacher.steps, table.methods, strict=True)):
        functions: list[Callable] = [method.token_loss, method.objective, config.reduction]
        # what a folder of trajectories brings is not known here
        if number or (config.trajectories is None and any(theirs(f) for f in functions)):
            rollout = expected_rollout(config, method, programs.mesh)
            jax.eval_shape(step, own.state, teacher.params, rollout, entropy, own.frozen)
