"""Programs of a config, from shapes alone: models on a mesh, the sampler, the training step.

Training, plans and benchmarks use these same functions.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from kdjax import models
from kdjax.base import Model, Params, Rollout, Scores
from kdjax.config.as_json import as_dict
from kdjax.config.schema import Config, Curriculum, Optimizer
from kdjax.config.teachers import SELF
from kdjax.config.timetable import Timetable
from kdjax.losses.trial import require_per_token, try_reduction, try_token_loss
from kdjax.models.layers.linear import LoRA
from kdjax.models.lora import adapter_of, make_lora
from kdjax.models.shape import DecoderConfig
from kdjax.numerics import LMHead
from kdjax.runtime import topology
from kdjax.runtime.settings import check_settings
from kdjax.sharding import (
    BATCH,
    constrain,
    head_sharding,
    replicated,
    shard_batch,
)
from kdjax.step.average import exponential_average, of_student
from kdjax.step.gate import POLICIES, entropy_gate
from kdjax.step.head import chunk_tokens
from kdjax.step.optimizer import make_optimizer
from kdjax.step.score import HeadPlan, sampled_logp, score, teacher_states
from kdjax.step.stops import Stops
from kdjax.step.update import abstract_state, make_step
from kdjax.step.vocabulary import SharedHead
from kdjax.training.parts.sampling import read_by_sampler, sampler_mesh
from kdjax.training.parts.shapes import Shapes, check_layout, teacher_shapes


def optimizer_of(
    curriculum: Curriculum, settings: Optimizer, table: Timetable, self_decay: float = 0.0
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a config; the gate's history has room for all measurements of its run.
    self_decay: over 0, an average of the parameters is kept."""
    gate = entropy_gate(
        curriculum.lengths,
        curriculum.entropy_threshold_nats,
        entropy_threshold_share=curriculum.entropy_threshold_share,
        policy=POLICIES[curriculum.policy],
        measurements=max(1, len(table.measured)),  # Orbax keeps no empty array
    )
    average = exponential_average(self_decay) if self_decay else None
    return make_optimizer(steps=table.updates(), gate=gate, average=average, **as_dict(settings))


class StudentPrograms(NamedTuple):
    """The student's programs; params, state and frozen are shapes, with shardings.

    - model reads params; learner is the model as the step differentiates it (remat, adapters).
    - teacher is the model that teaches itself: learner as it is read without a gradient.
    - state holds what is trained, frozen the base of an adapter (`lora`).
    - to_sampler(params) -> parameters as `sampler` reads them: in the compute dtype, unstacked,
      sharded over the tensor axis alone, on this process's devices.
    """

    model: Model
    learner: Model
    teacher: Model
    sampler: Model
    optimizer: Any
    lora: LoRA | None
    params: Params
    state: Any
    frozen: Params | None
    to_sampler: Callable[[Params], Params]


class TeacherPrograms(NamedTuple):
    """One teacher's programs; without a teacher the steps alone.

    - steps: for each of the timetable's methods a step(state, given, rollout,
      heldout_entropy_nats, frozen) -> (state, metrics).
    - model reads params (shapes here), sampler what `to_sampler` makes of them.
    - read(params, rollout) -> the rollout for the step, give(params) -> the parameters for the
      step, which guide reads. A teacher on the student's mesh is guide itself, and both return
      what they get; one on a mesh of its own reads there: they return the rollout with its states
      and its LM head, on the student's mesh.
    - Of a teacher whose states are stored (kdjax/training/parts/precompute.py) there is the guide
      alone; and of the student as its own teacher, whose parameters the step has (`of_student`).
    """

    steps: tuple[Any, ...] = ()
    model: Model | None = None
    sampler: Model | None = None
    params: Params | None = None
    guide: Model | None = None
    read: Callable[[Params, Rollout], Rollout] = lambda params, rollout: rollout
    give: Callable[[Params], Params] = lambda params: params

    @property
    def shape(self) -> DecoderConfig | None:
        """The decoder that reads rows in this run; None where none does."""
        reads = self.model or self.guide
        return reads and reads.config


class ReferencePrograms(NamedTuple):
    """A reference model, and the shapes of its parameters."""

    model: Model
    params: Params


class Programs(NamedTuple):
    """The jitted functions of a config on its meshes, and the shapes (with shardings) they take.

    - head: how the step reads the LM heads.
    - teachers: by the name of their model; those of one shape share their programs.
    """

    mesh: Mesh
    teacher_mesh: Mesh
    head: HeadPlan
    student: StudentPrograms
    teachers: dict[str | None, TeacherPrograms]
    reference: ReferencePrograms | None = None


def compose(
    config: Config, table: Timetable, meshes: tuple[Mesh, Mesh], shapes: Shapes
) -> Programs:
    """The programs of a config on the student's mesh and the teachers' (one mesh twice where they
    share it). Configs that compile alike, such as the seeds of a study, share them. Errors:
    ConfigError for rows or heads that can't be sharded over the meshes, a loss of the user's own
    that is wrong, a setting of JAX's that must be off."""
    check_settings()
    check_layout(config, meshes, shapes)
    unset: dict[str, Any] = dict.fromkeys(NOT_COMPILED)
    alike = dataclasses.replace(config, **unset)
    without = shapes._replace(teachers=())  # type: ignore[arg-type]  # a dict has no hash
    return _compose(alike, table, meshes, without, tuple(shapes.teachers.items()))


NOT_COMPILED = (
    "run", "cache", "trajectories", "seed", "data", "evaluation", "save_every_steps",
    "log_every_steps", "wandb_project", "served", "student", "reference",
)  # fmt: skip
"""Fields that no program depends on (of models, their shapes decide)."""


@functools.lru_cache(maxsize=4)
def _compose(
    config: Config,
    table: Timetable,
    meshes: tuple[Mesh, Mesh],
    shapes: Shapes,
    teachers: tuple[tuple[str | None, DecoderConfig | None], ...],
) -> Programs:
    """`compose`, with hashable arguments.

    Args:
        config: with NOT_COMPILED fields unset.
        table, meshes: as in `compose`.
        shapes: without the teachers'.
        teachers: (name of the model, its shape) of each.
    """
    mesh, teacher_mesh = meshes
    ids = tuple(dict.fromkeys((*shapes.stop_ids, *shapes.teacher_stop_ids)))
    chunk = head_chunk(config.head_memory_mib, mesh, shapes.vocabulary // config.layout.tensor)
    head = HeadPlan(chunk, shapes.vocabulary, mesh, Stops(config.stops, ids))
    _try_losses(config, table, head)
    student = _student_programs(config, table, mesh, shapes.student)
    of_shape = {
        decoder: _teacher_programs(config, meshes, decoder, shapes.heads_alone)
        for decoder in dict.fromkeys(decoder for _, decoder in teachers)
    }
    if config.teacher == SELF:
        of_shape = {None: TeacherPrograms(guide=student.teacher)}
    of_shape = {
        decoder: taught._replace(steps=_steps(config, table, student, taught.guide, head))
        for decoder, taught in of_shape.items()
    }
    reference = None
    if shapes.reference is not None:
        model = models.build(
            shapes.reference, dtype=jnp.dtype(config.dtype), impl=config.attention, mesh=mesh
        )
        params = models.abstract_params(shapes.reference, jnp.dtype(config.dtype), mesh)
        reference = ReferencePrograms(model, params)
    by_name = {name: of_shape[decoder] for name, decoder in teachers}
    return Programs(
        mesh=mesh,
        teacher_mesh=teacher_mesh,
        head=head,
        student=student,
        teachers=by_name,
        reference=reference,
    )


def _try_losses(config: Config, table: Timetable, head: HeadPlan) -> None:
    """The user's own losses on a few tokens, before anything is loaded. Errors: ConfigError naming
    whose function is wrong, and where."""
    assert head.vocabulary is not None
    merges = head.stops.policy == "merge" and len(head.stops.ids) > 1
    merges |= config.least_aligned is not None
    for method in table.methods:
        require_per_token(method.objective)
        try_token_loss(method.token_loss, head.vocabulary)
        if merges or config.layout.tensor > 1:  # shards are padded to one width
            try_token_loss(method.token_loss, head.vocabulary, excludes=True)
    try_reduction(config.reduction)


def _student_programs(
    config: Config, table: Timetable, mesh: Mesh, shape: DecoderConfig
) -> StudentPrograms:
    dtype = jnp.dtype(config.dtype)
    build = functools.partial(models.build, shape, dtype=dtype, impl=config.attention)
    lora = make_lora(shape, config.lora.rank, config.lora.alpha, config.lora.targets)
    optimizer = optimizer_of(config.curriculum, config.optimizer, table, config.self_decay)
    whole = models.abstract_params(shape, jnp.float32, mesh)
    trained, frozen = whole, None
    if lora is not None:
        trained = adapter_of(models.abstract_params(shape, jnp.float32, mesh, lora))
        frozen = models.abstract_params(shape, dtype, mesh)
    return StudentPrograms(
        model=build(mesh=mesh),
        learner=build(remat=config.remat, mesh=mesh, lora=lora),
        teacher=build(mesh=mesh, lora=lora),
        sampler=build(mesh=sampler_mesh(mesh), kv_cache=config.rollouts.kv_cache),
        optimizer=optimizer,
        lora=lora,
        params=whole,
        state=abstract_state(trained, optimizer, mesh),
        frozen=frozen,
        to_sampler=read_by_sampler(whole, dtype, mesh),
    )


def _teacher_programs(
    config: Config, meshes: tuple[Mesh, Mesh], shape: DecoderConfig | None, heads_alone: bool
) -> TeacherPrograms:
    """A teacher's programs but for the steps."""
    mesh, teacher_mesh = meshes
    if shape is None:
        return TeacherPrograms(guide=HEAD if heads_alone else None)
    build = functools.partial(
        models.build, shape, dtype=jnp.dtype(config.dtype), impl=config.attention
    )
    model = build(mesh=teacher_mesh)
    taught = TeacherPrograms(
        model=model,
        sampler=build(mesh=sampler_mesh(teacher_mesh), kv_cache=config.rollouts.kv_cache),
        params=teacher_shapes(shape, config.dtype, config.teacher_weights, teacher_mesh),
        guide=model,
    )
    if teacher_mesh is not mesh:
        return read_elsewhere(taught, teacher_mesh, mesh)
    if config.least_aligned is None:
        return taught
    return taught._replace(
        guide=headed(model), give=lambda params: Headed(params, model.head(params))
    )


def _steps(
    config: Config,
    table: Timetable,
    student: StudentPrograms,
    guide: Model | None,
    head: HeadPlan,
) -> tuple[Any, ...]:
    """The jitted step of each method with one teacher.

    Args:
        config, table: as in `compose`.
        student: its programs.
        guide: the teacher's model (`TeacherPrograms.guide`).
        head: how the LM heads are read; with a mesh.
    """
    assert head.mesh is not None
    placed = jax.tree.map(lambda leaf: leaf.sharding, student.state)
    places = (placed, replicated(head.mesh))  # every process knows the metrics
    make = functools.partial(
        make_step,
        student.learner,
        guide,
        student.optimizer,
        reduction=config.reduction,
        plan=head,
        micro_batches=config.micro_batches,
        steps=config.steps,
        of_state=of_student(config.dtype) if config.teacher == SELF else None,
    )
    return tuple(
        jax.jit(
            make(token_loss=method.token_loss, objective=method.objective),
            donate_argnums=0,
            out_shardings=places,
        )
        for method in table.methods
    )


def read_elsewhere(taught: TeacherPrograms, teacher_mesh: Mesh, mesh: Mesh) -> TeacherPrograms:
    """The programs of a teacher on `teacher_mesh`: its states and its head are sent to `mesh`."""
    model = taught.model
    assert model is not None
    states = jax.jit(functools.partial(teacher_states, model))

    def read(params: Params, rollout: Rollout) -> Rollout:
        made = states(params, shard_batch(rollout, teacher_mesh))
        return rollout._replace(teacher_states_btd=shard_batch(made, mesh))

    def give(params: Params) -> Params:
        head = model.head(params)
        return jax.device_put(head, head_sharding(mesh, head.weight_vd.shape))

    return taught._replace(guide=HEAD, read=read, give=give)


class Headed(NamedTuple):
    """A model's parameters, and an LM head in place of its own."""

    params: Params
    head: LMHead | SharedHead


def headed(model: Model) -> Model:
    """The model as it reads `Headed` parameters: for one whose head is arranged anew."""

    def hidden(given: Headed, tokens_bs: jax.Array) -> jax.Array:
        return model.hidden(given.params, tokens_bs)

    return HEAD._replace(config=model.config, hidden=hidden, head=lambda given: given.head)


def _same(head):
    return head


def _unavailable(*args):
    raise TypeError("this model is its LM head alone")


HEAD = Model(None, _unavailable, _same, _unavailable, _unavailable, _unavailable)
"""The model of an LM head alone, for rollouts that have its states."""


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def jitted_score(
    student: Model,
    teacher: Model | None,
    plan: HeadPlan,
    params: Params,
    teacher_params: Params | None,
    rollout: Rollout,
) -> Scores:
    """`score`, jitted, its rows sharded as the rollout's are: for evaluations, and the self-test at
    the start.

    Args:
        student, teacher, plan: static; as in `score`.
        params: the student's.
        teacher_params, rollout: as in `score`.
    """
    scores = score(student, params, teacher, teacher_params, rollout, plan=plan)
    return jax.tree.map(lambda x: constrain(plan.mesh, x, BATCH, None), scores)


jitted_logp = jax.jit(sampled_logp, static_argnames=("model", "micro_batches", "plan"))
"""`sampled_logp`, jitted: for the old policy, and for the reference model."""


def head_chunk(memory_mib: int | None, mesh: Mesh, columns: int) -> int:
    """The tokens in a chunk of the loss head: as many as fit memory_mib of each device, if that is
    given; else 8 % of its memory (128 MiB on CPU), and at most 1,024."""
    if memory_mib is not None:
        return chunk_tokens(memory_mib * 2**20, columns)
    stated = topology.memory_bytes(mesh.devices.flat[0])
    return min(1024, chunk_tokens(0.08 * stated if stated else 128 * 2**20, columns))
