"""A config's programs, from shapes alone: models on a mesh, the sampler, the training step.

What trains, what is planned ahead of time and what is measured are these same functions.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from kdjax import models
from kdjax.base import Model, Params, Rollout, Sampler, Sampling, Scores
from kdjax.config.as_json import as_dict
from kdjax.config.schema import Config
from kdjax.config.timetable import measured_before, methods, turn_at, updates_of
from kdjax.models import DecoderConfig
from kdjax.models.linear import LoRA
from kdjax.models.lora import adapter_of, make_lora
from kdjax.rollouts.sampler import CACHE_BYTES, open_sampler
from kdjax.runtime import topology
from kdjax.sharding import (
    BATCH,
    constrain,
    head_sharding,
    on_own_devices,
    own_mesh,
    replicated,
    rollout_mesh,
    shard_batch,
    shardings,
)
from kdjax.step.gate import POLICIES, entropy_gate
from kdjax.step.head import chunk_tokens
from kdjax.step.optimizer import make_optimizer
from kdjax.step.score import response_states, sampled_logp, score
from kdjax.step.stops import Stops
from kdjax.step.update import abstract_state, make_step
from kdjax.train.parts.shapes import Shapes, check_layout, teacher_shapes


def optimizer_of(config: Config) -> optax.GradientTransformationExtraArgs:
    """The optimizer that a config asks for, the gate's history as long as its run needs."""
    curriculum = config.curriculum
    gate = entropy_gate(
        curriculum.lengths,
        curriculum.entropy_threshold_nats,
        entropy_threshold_share=curriculum.entropy_threshold_share,
        policy=POLICIES[curriculum.policy],
        measurements=max(1, len(measured_before(config))),  # Orbax keeps no empty array
    )
    of_each = [updates_of(method) for method in methods(config)]
    updates = sum(of_each[turn_at(config, step)] for step in range(config.steps))
    return make_optimizer(steps=updates, gate=gate, **as_dict(config.optimizer))


class TeacherPrograms(NamedTuple):
    """What of a config's programs belongs to one teacher; without a teacher the steps alone.

    - steps: of each of the config's `methods` a step(state, teacher_params, rollout,
      heldout_entropy_nats, frozen) -> (state, metrics); the state holds what is trained, frozen the
      student's base where that is an adapter (`lora`).
    - model reads params (shapes here), sampler what `to_sampler` makes of them.
    - A teacher on a mesh of its own is read there: read(params, rollout) -> the rollout with its
      states, and give(params) -> what remains to be read of it (its head), both on the student's
      mesh. guide is the model of what is given: the step takes it in place of params.
    - Of a teacher whose states were kept (kdjax/train/parts/precompute.py) there is the guide
      alone.
    """

    steps: tuple[Any, ...]
    model: Model | None = None
    sampler: Model | None = None
    params: Params | None = None
    guide: Model | None = None
    read: Callable[[Params, Rollout], Rollout] = lambda params, rollout: rollout
    give: Callable[[Params], Params] = lambda params: params


class Programs(NamedTuple):
    """Jitted functions of a config on a mesh, and the shapes (with shardings) that they take.

    - learner is the student as the step differentiates it (remat, adapters).
    - to_sampler(student parameters) -> parameters as the sampler reads them: narrowed to the
      compute dtype, and whole on each device but for the tensor axis, on this process's devices.
    - student_sampler: the model that reads those.
    - teachers: by the name of their model; those of one shape share their programs.
    - reference reads reference_params (shapes here).
    """

    mesh: Mesh
    teacher_mesh: Mesh
    learner: Model
    student: Model
    student_sampler: Model
    optimizer: Any
    stops: Stops
    lora: LoRA | None
    state: Any
    frozen: Params | None
    student_params: Params
    to_sampler: Any
    teachers: dict[str | None, TeacherPrograms]
    reference: Model | None = None
    reference_params: Params | None = None


def compose(config: Config, meshes: tuple[Mesh, Mesh], shapes: Shapes) -> Programs:
    """The programs of a config on the student's mesh and the teachers' (one mesh twice where they
    share it). Configs that differ in nothing that is compiled, such as the seeds of a study, share
    them. Errors: ConfigError for what can't be dealt over them."""
    check_layout(config, meshes, shapes)
    unset: dict[str, Any] = dict.fromkeys(NOT_COMPILED)
    alike = dataclasses.replace(config, **unset)
    without = shapes._replace(teachers=())  # type: ignore[arg-type]  # a dict has no hash
    return _compose(alike, meshes, without, tuple(shapes.teachers.items()))


NOT_COMPILED = (
    "run", "cache", "trajectories", "seed", "data", "evaluation", "save_every_steps",
    "log_every_steps", "wandb_project", "student", "reference",
)  # fmt: skip
"""Fields that no program depends on (of models, their shapes decide)."""


@functools.lru_cache(maxsize=4)
def _compose(
    config: Config,
    meshes: tuple[Mesh, Mesh],
    shapes: Shapes,
    teachers: tuple[tuple[str | None, DecoderConfig | None], ...],
) -> Programs:
    mesh, teacher_mesh = meshes
    dtype, kv_cache = jnp.dtype(config.dtype), config.rollouts.kv_cache
    build = functools.partial(models.build, dtype=dtype, impl=config.attention)
    stops = Stops(config.stops, tuple(dict.fromkeys((*shapes.stop_ids, *shapes.teacher_stop_ids))))
    lora = make_lora(shapes.student, config.lora.rank, config.lora.alpha, config.lora.targets)
    learner = build(shapes.student, remat=config.remat, mesh=mesh, lora=lora)
    optimizer = optimizer_of(config)
    whole = models.abstract_params(shapes.student, jnp.float32, mesh)
    trained, frozen = whole, None
    if lora is not None:
        trained = adapter_of(models.abstract_params(shapes.student, jnp.float32, mesh, lora))
        frozen = models.abstract_params(shapes.student, dtype, mesh)
    state = abstract_state(trained, optimizer, mesh)
    placed = jax.tree.map(lambda leaf: leaf.sharding, state)

    @functools.cache
    def taught_by(decoder: DecoderConfig | None) -> TeacherPrograms:
        taught = TeacherPrograms((), guide=HEAD if shapes.heads_alone else None)
        if decoder is not None:
            model = build(decoder, mesh=teacher_mesh)
            sampler = build(decoder, mesh=sampler_mesh(teacher_mesh), kv_cache=kv_cache)
            params = teacher_shapes(config, decoder, teacher_mesh)
            taught = TeacherPrograms((), model, sampler, params, model)
            if teacher_mesh is not mesh:
                taught = read_elsewhere(taught, teacher_mesh, mesh)
        make = functools.partial(
            make_step,
            learner,
            taught.guide,
            optimizer,
            reduction=config.reduction,
            stops=stops,
            micro_batches=config.micro_batches,
            chunk=head_chunk(config, mesh, shapes.vocabulary),
            vocabulary=shapes.vocabulary,
            mesh=mesh,
            steps=config.steps,
        )
        steps = (make(token_loss=m.token_loss, objective=m.objective) for m in methods(config))
        places = (placed, replicated(mesh))  # what is measured is known to every process
        jitted = (jax.jit(s, donate_argnums=0, out_shardings=places) for s in steps)
        return taught._replace(steps=tuple(jitted))

    reference, reference_params = None, None
    if shapes.reference is not None:
        reference = build(shapes.reference, mesh=mesh)
        reference_params = models.abstract_params(shapes.reference, dtype, mesh)
    return Programs(
        mesh,
        teacher_mesh,
        learner,
        build(shapes.student, mesh=mesh),
        build(shapes.student, mesh=sampler_mesh(mesh), kv_cache=kv_cache),
        optimizer,
        stops,
        lora,
        state,
        frozen,
        whole,
        read_by_sampler(whole, dtype, mesh),
        {name: taught_by(decoder) for name, decoder in teachers},
        reference,
        reference_params,
    )


def read_elsewhere(taught: TeacherPrograms, teacher_mesh: Mesh, mesh: Mesh) -> TeacherPrograms:
    """The programs of a teacher that lies on `teacher_mesh`: its states and its head travel."""
    model = taught.model
    assert model is not None
    states = jax.jit(functools.partial(response_states, model))

    def read(params: Params, rollout: Rollout) -> Rollout:
        made = states(params, shard_batch(rollout, teacher_mesh))
        return rollout._replace(teacher_states_btd=shard_batch(made, mesh))

    def give(params: Params) -> Params:
        head = model.head(params)
        return jax.device_put(head, head_sharding(mesh, head.weight_vd.shape))

    return taught._replace(guide=HEAD, read=read, give=give)


def _itself(head):
    return head


def _nothing(*args):
    raise TypeError("this model is its LM head alone")


HEAD = Model(None, _nothing, _itself, _nothing, _nothing, _nothing)
"""The model of a head alone, for rollouts that bring its states."""


def to_sampler(params: Params, dtype, mesh: Mesh) -> Any:
    """How a model's parameters on `mesh`, of the shapes of `params`, become those that its sampler
    reads."""
    made = jax.eval_shape(models.unstacked, params)
    axes = models.unstacked_axes(params)
    places = shardings(rollout_mesh(mesh), made, axes)

    def convert(params: Params) -> Params:
        return models.unstacked(models.narrow(params, dtype))

    return jax.jit(convert, out_shardings=places)


def read_by_sampler(params: Params, dtype, mesh: Mesh) -> Callable[[Params], Params]:
    """`to_sampler`, and then on this process's devices alone. All processes must call what it gives
    together; sampling needs none of the others."""
    convert = to_sampler(params, dtype, mesh)
    return lambda params: on_own_devices(convert(params))


def sampler_mesh(mesh: Mesh) -> Mesh:
    """The devices that draw this process's share of the rows of a batch on `mesh`."""
    return own_mesh(rollout_mesh(mesh))


def sampler_of(
    config: Config,
    mesh: Mesh,
    model: Model,
    sampling: Sampling,
    stop_ids: Sequence[int],
    vocabulary: int,
) -> Sampler:
    """A model's sampler on a mesh (its `sampler_mesh`), as the config draws."""
    return open_sampler(
        model,
        stop_ids=stop_ids,
        sampling=sampling,
        vocabulary=vocabulary,
        mesh=sampler_mesh(mesh),
        rows=config.rollouts.rows,
        cache_bytes=cache_bytes(config, mesh),
    )


def cache_bytes(config: Config, mesh: Mesh) -> float:
    """What the KV cache may take of each device."""
    if config.rollouts.cache_gib is not None:
        return config.rollouts.cache_gib * 2**30
    stated = topology.memory_bytes(mesh.devices.flat[0])
    return 0.25 * stated if stated else CACHE_BYTES


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5))
def jitted_score(
    student: Model,
    teacher: Model | None,
    stops: Stops,
    chunk: int,
    vocabulary: int,
    mesh: Mesh,
    params: Params,
    teacher_params: Params | None,
    rollout: Rollout,
) -> Scores:
    """`score`, jitted, its rows dealt as the rollout's are: for the evaluation, and for the
    self-test at the start."""
    scores = score(
        student,
        params,
        teacher,
        teacher_params,
        rollout,
        stops=stops,
        chunk=chunk,
        vocabulary=vocabulary,
        mesh=mesh,
    )
    return jax.tree.map(lambda x: constrain(mesh, x, BATCH, None), scores)


jitted_logp = jax.jit(
    sampled_logp,
    static_argnames=("model", "micro_batches", "stops", "chunk", "vocabulary", "mesh"),
)
"""`sampled_logp`, jitted: for the policy that drew, and for the reference model."""


def logp_settings(config: Config, programs: Programs, vocabulary: int) -> dict[str, Any]:
    """What `jitted_logp` is told, so that it reads rows as the config's step does."""
    return {
        "micro_batches": config.micro_batches,
        "stops": programs.stops,
        "chunk": head_chunk(config, programs.mesh, vocabulary),
        "vocabulary": vocabulary,
        "mesh": programs.mesh,
    }


def head_chunk(config: Config, mesh: Mesh, vocabulary: int) -> int:
    """Tokens a chunk of the loss head: what fits head_memory_mib of each device, if it is given;
    else 8 % of the device's memory (128 MiB on CPU), and at most 1,024."""
    columns = vocabulary // config.layout.tensor
    if config.head_memory_mib is not None:
        return chunk_tokens(config.head_memory_mib * 2**20, columns)
    stated = topology.memory_bytes(mesh.devices.flat[0])
    return min(1024, chunk_tokens(0.08 * stated if stated else 128 * 2**20, columns))
