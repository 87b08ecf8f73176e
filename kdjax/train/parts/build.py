"""A config's parts, built once: models, data, prefix source, compiled step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kdjax import models
from kdjax.base import Batch, Key, Params, PrefixSource, Rollout, Sampler, Samples, TrainState
from kdjax.config.schema import Config, teacher_models
from kdjax.config.timetable import is_rewarded, methods, turn_at
from kdjax.data import batches
from kdjax.data.tokenizer import Tokenizer
from kdjax.errors import ConfigError
from kdjax.grading.rewards import Rewarder, open_rewarder
from kdjax.models.lora import Student, open_student
from kdjax.rollouts.prefix import from_dataset, from_student
from kdjax.runtime.profiling import UNPROFILED, Profile
from kdjax.train.parts import precomputed, startup
from kdjax.train.parts.precompute import NOTHING, Asked, from_cache
from kdjax.train.parts.precomputed import Stored
from kdjax.train.parts.problems import (
    ADAPTER,
    TRAJECTORIES,
    heldout_source,
    run_key,
    test_source,
    training_source,
)
from kdjax.train.parts.programs import Programs, compose, head_chunk, sampler_of
from kdjax.train.parts.shapes import Shapes, choose_meshes, expected_rollout
from kdjax.train.parts.teachers import (
    Teacher,
    load_teachers,
    load_tokenizers,
    open_reference,
    read_reference,
    read_shapes,
    title,
)


class Parts(NamedTuple):
    """Everything a run is made of, built once from its config.

    initial_params are those that are trained, frozen those that are not; steps take the trained
    ones, `whole` makes of them what `programs.student` reads. draw(params, batch, key, length) is
    the student at the training temperature, of parameters that `sampler_params` gave; it draws on
    this process's devices, by itself. teachers, groups (the rows of
    source), what is asked of them, and the folders that they are stored in, if any, are by tag;
    prefixes by whose they are and tag. refer(rollout) adds what the reference model says of it.
    rewarder is closed by who has built these parts and drawn with them. profile says what the time
    of a training step goes to.
    """

    config: Config
    programs: Programs
    tokenizer: Tokenizer
    initial_params: Params
    frozen: Params | None
    whole: Callable[[Params], Params]
    draw: Sampler
    source: batches.Source
    teachers: dict[str, Teacher]
    groups: batches.Groups
    prefixes: dict[str, dict[str, PrefixSource]]
    refer: Callable[[Rollout], Rollout]
    rewarder: Rewarder
    identities: dict[str, str]
    asked: dict[str, Asked]
    stored: dict[str, Stored]
    profile: Profile = UNPROFILED

    @property
    def mesh(self) -> Mesh:
        return self.programs.mesh

    def sampler_params(self, trained: Params) -> Params:
        """What `draw` reads of trained parameters. All processes call it together."""
        return self.programs.to_sampler(self.whole(trained))


def build(config: Config, devices: Sequence[jax.Device] | None = None) -> Parts:
    """Load models and data, compose the programs over these devices (by default those of all
    processes). Here names become folders and weights."""
    folder, kept = models.find(config.student), precomputed.open_stored(config)
    tokenizer, tokenizers = load_tokenizers(config)
    tokenizer = precomputed.tokenizer_of(kept, tokenizer, known=None not in tokenizers)
    keep = precomputed.kept_of(kept)
    shapes = Shapes(
        models.read_config(folder),
        read_shapes(config) if keep == NOTHING else dict.fromkeys(tokenizers),
        tokenizer.size,
        tokenizer.stop_ids,
        (*(i for t in tokenizers.values() for i in t.stop_ids), *precomputed.stop_ids(kept)),
        heads_alone=keep.kind == "states",
        reference=read_reference(config),
    )
    programs = compose(config, choose_meshes(config, devices or jax.devices(), shapes), shapes)
    check_turns(config, programs)
    source = training_source(config)
    groups = batches.group_by_tag(source, list(teacher_models(config)))
    _check_data(config, source, groups)
    student = _open_student(config, folder, programs)
    teachers = load_teachers(config, programs, tokenizers)
    draw = sampler_of(
        config, programs.mesh, programs.student_sampler, config.sampling, tokenizer.stop_ids,
        tokenizer.size,
    )  # fmt: skip

    def draw_first(batch: Batch, key: Key, length: int) -> Samples:
        reads = programs.to_sampler(student.whole(student.trained))
        return draw(reads, batch, key, length)

    def asked(config: Config) -> dict[str, Asked]:
        given = (source, run_key(config, TRAJECTORIES), draw_first)
        return {
            tag: Asked(config, programs, tokenizer, teacher, tag, groups[tag], *given)
            for tag, teacher in teachers.items()
        }

    def prefixes(method: Config) -> dict[str, PrefixSource]:
        own = asked(method)
        sources: dict[str, Callable[[str], PrefixSource]] = {
            "dataset": lambda tag: from_dataset,
            "student": lambda tag: from_student(draw),
            "teacher": lambda tag: from_cache(own[tag], lambda: _rows_needed(config, groups, tag)),
            "stored": lambda tag: precomputed.from_stored(own[tag], kept[tag]),
        }
        return {tag: sources["stored" if kept else method.prefix](tag) for tag in teachers}

    return Parts(
        config, programs, tokenizer, student.trained, student.frozen, student.whole, draw, source,
        teachers, groups, {method.prefix: prefixes(method) for method in methods(config)},
        open_reference(config, programs, tokenizer), _open_rewarder(config), identities(config),
        asked(config), kept,
    )  # fmt: skip


def _rows_needed(config: Config, groups: batches.Groups, tag: str) -> np.ndarray:
    """The rows of the source that a run asks the teacher of a tag for."""
    asked = [
        batches.batch_at(groups, step, config.batch_size, config.seed)
        for step in range(config.steps)
        if methods(config)[turn_at(config, step)].prefix == "teacher"
    ]
    return np.unique([row for owner, rows in asked for row in rows if owner == tag])


def fresh_state(parts: Parts) -> TrainState:
    """Step 0 on the mesh: the student's parameters, and an optimizer state that lies beside
    them."""
    like = jax.tree.map(lambda leaf: leaf.sharding, parts.programs.state)
    params = parts.initial_params
    opt_state = jax.jit(parts.programs.optimizer.init, out_shardings=like.opt_state)(params)
    return TrainState(jax.device_put(jnp.int32(0), like.step), params, opt_state)


def batch_at(parts: Parts, number: int) -> tuple[str, list[int]]:
    """(tag, rows of the source) that step `number` is trained on."""
    return batches.batch_at(parts.groups, number, parts.config.batch_size, parts.config.seed)


def _open_rewarder(config: Config) -> Rewarder:
    settings = config.rollouts
    return open_rewarder(
        config.rl.reward,
        workers=settings.reward_workers,
        deadline_seconds=settings.reward_seconds,
    )


def _open_student(config: Config, folder: Path, programs: Programs) -> Student:
    """The student's weights, divided as the config says, where the programs want them."""
    dtype = jnp.float32 if programs.lora is None else jnp.dtype(config.dtype)
    _, params = models.load(folder, programs.mesh, params_dtype=dtype)
    student = open_student(programs.lora, programs.student.config, params, run_key(config, ADAPTER))
    places = jax.tree.map(lambda leaf: leaf.sharding, programs.state.params)
    return student._replace(trained=jax.device_put(student.trained, places))


def _check_data(config: Config, source: batches.Source, groups: batches.Groups) -> None:
    rewarded = all(is_rewarded(method) for method in methods(config))
    asked = config.batch_size // (config.rl.group_size if rewarded else 1)
    for tag, rows in groups.items():
        if asked > len(rows):
            of_tag = f" of tag {tag!r}" if tag else ""
            raise ConfigError(
                f"batch_size {config.batch_size} is over the {len(rows)} training problems{of_tag};"
                " a problem would be sampled twice with one key"
            )
    if any(method.prefix == "dataset" for method in methods(config)):
        batches.require_solutions(source, [0])


def startup_report(parts: Parts) -> str:
    """What the run of these parts is about to do. Errors: DataError, as `startup.report`."""
    programs = parts.programs
    first = {teacher.name: tag for tag, teacher in reversed(parts.teachers.items())}
    lines = [
        f"{title(tag)}: {teacher.name}, for {len(parts.groups[tag])} problems\n"
        for tag, teacher in parts.teachers.items()
        if tag
    ]
    asked = {"problems": parts.source, "test problems": test_source(parts.config)}
    lines += [f"{what}: {source.about}\n" for what, source in asked.items() if source.about]
    return "".join(lines) + startup.report(
        parts.config,
        (parts.mesh, programs.teacher_mesh),
        parts.tokenizer,
        programs.student,
        programs.student_params,
        {
            title(tag): (teacher.programs.model, teacher.params, teacher.tokenizer)
            for tag, teacher in parts.teachers.items()
            if teacher.programs.model is not None and tag == first[teacher.name]
        },
        trained=programs.state.params,
        frozen=programs.frozen,
        stops=programs.stops,
        chunk=head_chunk(parts.config, parts.mesh, parts.tokenizer.size),
        stored=precomputed.describe(parts.config, parts.stored),
        heads=[
            teacher.given
            for tag, teacher in parts.teachers.items()
            if teacher.params is None and teacher.given is not None and tag == first[teacher.name]
        ],
    )


def identities(config: Config) -> dict[str, str]:
    """What a run was trained with, besides its config: contents of model folders and problems."""
    found = {"student": models.identity(models.find(config.student))}
    for tag, name in teacher_models(config).items():
        if name is not None:
            found[title(tag)] = models.identity(models.find(name))
    if config.reference is not None:
        found["reference"] = models.identity(models.find(config.reference))
    found["problems"] = training_source(config).identity
    found |= precomputed.identities(config)
    if len(config.curriculum.lengths) > 1:
        found["heldout problems"] = heldout_source(config).identity
    return found


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
