"""A config's programs, from shapes alone: models on a mesh, the sampler, the training step.

What trains, what is planned ahead of time and what is measured are these same functions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kdjax import models, topology
from kdjax.base import ConfigError, Model, Params, Rollout, Sampler, Sampling, Scores
from kdjax.config import Config
from kdjax.head import chunk_tokens
from kdjax.models import DecoderConfig, parameter_count
from kdjax.models.linear import LoRA
from kdjax.models.lora import adapter_of
from kdjax.sampler import CACHE_BYTES, open_sampler
from kdjax.score import response_states, score
from kdjax.sharding import (
    BATCH,
    constrain,
    data_size,
    head_sharding,
    make_mesh,
    on_own_devices,
    own_mesh,
    owners,
    replicated,
    rollout_mesh,
    shard_batch,
    shardings,
)
from kdjax.step import abstract_state, make_step
from kdjax.stops import Stops
from kdjax.student import lora_of, optimizer_of
from kdjax.timetable import methods

ADAM_BYTES = 16  # float32 parameter, gradient and two moments
COPY_BYTES = 4  # the parameter that the entropy gate may fall back to
TEACHER_WEIGHTS: dict[str, models.Hold | None] = {"compute": None, "int8": models.int8}
"""How the teacher's parameters are held, by the config's `teacher_weights`."""
SHARE_OF_MEMORY = 0.4  # of a device, that states may fill before they are dealt over fsdp


class Shapes(NamedTuple):
    """What a config's programs depend on besides the config: no weight and no file is read.

    teachers are by the name of their model; {None: None} is no teacher. teacher_stop_ids are those
    of all of them. reference is the shape of the reference model, if there is one. heads_alone:
    rollouts bring the teachers' states, so that of a teacher, which
    has no shape here, its LM head is read.
    """

    student: DecoderConfig
    teachers: dict[str | None, DecoderConfig | None]
    vocabulary: int
    stop_ids: tuple[int, ...]
    teacher_stop_ids: tuple[int, ...] = ()
    heads_alone: bool = False
    reference: DecoderConfig | None = None


class TeacherPrograms(NamedTuple):
    """What of a config's programs belongs to one teacher; without a teacher the steps alone.

    - steps: of each of the config's `methods` a step(state, teacher_params, rollout,
      heldout_entropy_nats, frozen) -> (state, metrics); the state holds what is trained, frozen the
      student's base where that is an adapter (`lora`).
    - model reads params (shapes here), sampler what `to_sampler` makes of them.
    - A teacher on a mesh of its own is read there: read(params, rollout) -> the rollout with its
      states, and give(params) -> what remains to be read of it (its head), both on the student's
      mesh. guide is the model of what is given: the step takes it in place of params.
    - Of a teacher whose states were kept (kdjax/prefixes.py) there is the guide alone.
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
    share it). Errors: ConfigError for what can't be dealt over them."""
    mesh, teacher_mesh = meshes
    check_layout(config, meshes, shapes)
    dtype, kv_cache = jnp.dtype(config.dtype), config.rollouts.kv_cache
    build = functools.partial(models.build, dtype=dtype, impl=config.attention)
    stops = Stops(config.stops, tuple(dict.fromkeys((*shapes.stop_ids, *shapes.teacher_stop_ids))))
    lora = lora_of(config, shapes.student)
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
        {name: taught_by(decoder) for name, decoder in shapes.teachers.items()},
        reference,
        reference_params,
    )


def teacher_shapes(config: Config, teacher: DecoderConfig, mesh: Mesh | None = None) -> Params:
    """Shapes of the teacher's parameters as the config holds them."""
    hold = TEACHER_WEIGHTS[config.teacher_weights]
    return models.abstract_params(teacher, jnp.dtype(config.dtype), mesh, hold=hold)


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


def choose_meshes(
    config: Config, devices: Sequence[jax.Device], shapes: Shapes
) -> tuple[Mesh, Mesh]:
    """The config's meshes over these devices: the student's and the teachers', which are one
    unless layout.teacher_devices parts them.

    fsdp, where the config leaves it open, is 1 if the training state and the teachers fill at most
    40 % of a device, else all devices that tensor leaves.
    """
    apart = config.layout.teacher_devices
    if apart and devices[0].process_index != devices[-1].process_index:
        raise ConfigError("layout.teacher_devices is for the devices of one process; leave it at 0")
    if apart >= len(devices):
        raise ConfigError(
            f"layout.teacher_devices {apart} leaves none of {len(devices)} devices to the student"
        )
    own, others = devices[: len(devices) - apart], devices[len(devices) - apart :]
    fsdp, tensor = config.layout.fsdp, config.layout.tensor
    if fsdp is None:
        fsdp = 1
        memory = topology.memory_bytes(devices[0])
        if memory is not None and held_bytes(config, shapes) / tensor > SHARE_OF_MEMORY * memory:
            fsdp = max(1, len(own) // tensor)
    mesh = make_mesh(own, fsdp=fsdp, tensor=tensor)
    return mesh, make_mesh(others, fsdp=apart) if apart else mesh


def held_bytes(config: Config, shapes: Shapes) -> float:
    """Bytes of the training state with its gradient, of the reference, and of the teachers, where
    they lie on the student's devices."""
    trained = jax.tree.leaves(models.abstract_params(shapes.student, jnp.float32))
    beside = [] if config.layout.teacher_devices else shapes.teachers.values()
    teachers = [teacher_shapes(config, decoder) for decoder in beside if decoder]
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(teachers))
    if shapes.reference is not None:
        held += jnp.dtype(config.dtype).itemsize * parameter_count(shapes.reference)
    kept = COPY_BYTES if config.curriculum.policy == "fall_back" else 0
    return (ADAM_BYTES + kept) * sum(x.size for x in trained) + held


def check_layout(config: Config, meshes: tuple[Mesh, Mesh], shapes: Shapes) -> None:
    """ConfigError where rows or heads can't be dealt over the meshes."""
    mesh, teacher_mesh = meshes
    if teacher_mesh is not mesh and config.batch_size % data_size(teacher_mesh):
        raise ConfigError(
            f"batch_size is {config.batch_size} rows, which can't be dealt over the teacher's"
            f" {data_size(teacher_mesh)} devices; make it a multiple of {data_size(teacher_mesh)}"
        )
    groups = config.batch_size // config.rl.group_size
    if groups % owners(mesh):
        raise ConfigError(
            f"batch_size / rl.group_size is {groups} problems, which can't be dealt to"
            f" {owners(mesh)} processes; make it a multiple of {owners(mesh)}"
        )
    rows = config.batch_size // config.micro_batches
    if rows % data_size(mesh):
        raise ConfigError(
            f"batch_size / micro_batches is {rows} rows, which can't be dealt over"
            f" {data_size(mesh)} devices; make it a multiple of {data_size(mesh)}"
        )
    teachers = [(f"teacher {name}", decoder) for name, decoder in shapes.teachers.items()]
    for name, model in (("student", shapes.student), *teachers, ("reference", shapes.reference)):
        if model and model.num_key_value_heads % config.layout.tensor:
            raise ConfigError(
                f"layout.tensor {config.layout.tensor} does not divide the {name}'s"
                f" {model.num_key_value_heads} key/value heads; choose a divisor"
            )


def head_chunk(config: Config, mesh: Mesh, vocabulary: int) -> int:
    """Tokens a chunk of the loss head: what fits head_memory_mib of each device, if it is given;
    else 8 % of the device's memory (128 MiB on CPU), and at most 1,024."""
    columns = vocabulary // config.layout.tensor
    if config.head_memory_mib is not None:
        return chunk_tokens(config.head_memory_mib * 2**20, columns)
    stated = topology.memory_bytes(mesh.devices.flat[0])
    return min(1024, chunk_tokens(0.08 * stated if stated else 128 * 2**20, columns))
