"""A config's programs, from shapes alone: models on a mesh, the sampler, the training step.

What trains, what is planned ahead of time and what is measured are these same functions.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kdjax import models, topology
from kdjax.base import ConfigError, Model, Params
from kdjax.config import Config, as_dict
from kdjax.head import chunk_tokens
from kdjax.models import DecoderConfig
from kdjax.models.linear import LoRA
from kdjax.models.lora import adapter_of
from kdjax.optimizer import make_optimizer
from kdjax.sampler import generate
from kdjax.sharding import data_size, make_mesh, rollout_mesh, shardings
from kdjax.step import abstract_state, make_step
from kdjax.stops import Stops
from kdjax.student import lora_of

ADAM_BYTES = 16  # float32 parameter, gradient and two moments
TEACHER_WEIGHTS: dict[str, models.Hold | None] = {"compute": None, "int8": models.int8}
"""How the teacher's parameters are held, by the config's `teacher_weights`."""
SHARE_OF_MEMORY = 0.4  # of a device, that states may fill before they are dealt over fsdp


class Shapes(NamedTuple):
    """What a config's programs depend on besides the config: no weight and no file is read.

    teachers are by the name of their model; {None: None} is no teacher. teacher_stop_ids are those
    of all of them.
    """

    student: DecoderConfig
    teachers: dict[str | None, DecoderConfig | None]
    vocabulary: int
    stop_ids: tuple[int, ...]
    teacher_stop_ids: tuple[int, ...] = ()


class TeacherPrograms(NamedTuple):
    """What of a config's programs belongs to one teacher; without a teacher the step alone.

    - step(state, teacher_params, rollout, heldout_entropy_nats, frozen) -> (state, metrics); the
      state holds what is trained, frozen the student's base where that is an adapter (`lora`).
    - model reads params (shapes here), sampler what `to_sampler` makes of them.
    """

    step: Any
    model: Model | None = None
    sampler: Model | None = None
    params: Params | None = None


class Programs(NamedTuple):
    """Jitted functions of a config on a mesh, and the shapes (with shardings) that they take.

    - learner is the student as the step differentiates it (remat, adapters).
    - to_sampler(student parameters) -> parameters as the sampler reads them: narrowed to the
      compute dtype, and whole on each device but for the tensor axis.
    - student_sampler: the model that reads those.
    - teachers: by the name of their model; those of one shape share their programs.
    """

    mesh: Mesh
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


def compose(config: Config, mesh: Mesh, shapes: Shapes) -> Programs:
    """The programs of a config. Errors: ConfigError for what can't be dealt over the mesh."""
    check_layout(config, mesh, shapes)
    dtype = jnp.dtype(config.dtype)
    build = functools.partial(models.build, dtype=dtype, impl=config.attention)
    sampler = functools.partial(build, mesh=rollout_mesh(mesh))
    stops = Stops(config.stops, tuple(dict.fromkeys((*shapes.stop_ids, *shapes.teacher_stop_ids))))
    lora = lora_of(config, shapes.student)
    learner = build(shapes.student, remat=config.remat, mesh=mesh, lora=lora)
    optimizer = make_optimizer(
        steps=config.steps,
        lengths=config.curriculum.lengths,
        entropy_threshold_nats=config.curriculum.entropy_threshold_nats,
        **as_dict(config.optimizer),
    )
    whole = models.abstract_params(shapes.student, jnp.float32, mesh)
    trained, frozen = whole, None
    if lora is not None:
        trained = adapter_of(models.abstract_params(shapes.student, jnp.float32, mesh, lora))
        frozen = models.abstract_params(shapes.student, dtype, mesh)
    state = abstract_state(trained, optimizer, mesh)
    placed = jax.tree.map(lambda leaf: leaf.sharding, state)

    @functools.cache
    def taught_by(decoder: DecoderConfig | None) -> TeacherPrograms:
        model = None if decoder is None else build(decoder, mesh=mesh)
        step = make_step(
            learner,
            model,
            optimizer,
            token_loss=config.token_loss,
            objective=config.objective,
            reduction=config.reduction,
            stops=stops,
            micro_batches=config.micro_batches,
            chunk=head_chunk(config, mesh, shapes.vocabulary),
            vocabulary=shapes.vocabulary,
            mesh=mesh,
        )
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(placed, None))
        if decoder is None:
            return TeacherPrograms(jitted)
        params = teacher_shapes(config, decoder, mesh)
        return TeacherPrograms(jitted, model, sampler(decoder), params)

    return Programs(
        mesh,
        learner,
        build(shapes.student, mesh=mesh),
        sampler(shapes.student),
        optimizer,
        stops,
        lora,
        state,
        frozen,
        whole,
        to_sampler(whole, dtype, mesh),
        {name: taught_by(decoder) for name, decoder in shapes.teachers.items()},
    )


def teacher_shapes(config: Config, teacher: DecoderConfig, mesh: Mesh | None = None) -> Params:
    """Shapes of the teacher's parameters as the config holds them."""
    hold = TEACHER_WEIGHTS[config.teacher_weights]
    return models.abstract_params(teacher, jnp.dtype(config.dtype), mesh, hold=hold)


def to_sampler(params: Params, dtype, mesh: Mesh) -> Any:
    """How a model's parameters on `mesh`, of the shapes of `params`, become those that its sampler
    reads."""
    places = shardings(rollout_mesh(mesh), params, models.logical_axes(params))
    return jax.jit(functools.partial(models.narrow, dtype=dtype), out_shardings=places)


@functools.lru_cache(maxsize=8)  # programs compiled for one cell serve the next
def sampling(model: Model, stop_ids: tuple[int, ...], vocabulary: int, temperature: float):
    """The sampler of a model, jitted: (params, batch, key, max_new_tokens) -> Samples."""
    draw = functools.partial(
        generate, model, stop_ids=stop_ids, temperature=temperature, vocabulary=vocabulary
    )
    return jax.jit(draw, static_argnames="max_new_tokens")


def choose_mesh(config: Config, devices: Sequence[jax.Device], shapes: Shapes) -> Mesh:
    """The config's mesh over these devices.

    fsdp, where the config leaves it open, is 1 if the training state and the teachers fill at most
    40 % of a device, else all devices that tensor leaves.
    """
    fsdp, tensor = config.layout.fsdp, config.layout.tensor
    if fsdp is None:
        fsdp = 1
        memory = topology.memory_bytes(devices[0])
        if memory is not None and held_bytes(config, shapes) / tensor > SHARE_OF_MEMORY * memory:
            fsdp = max(1, len(devices) // tensor)
    return make_mesh(devices, fsdp=fsdp, tensor=tensor)


def held_bytes(config: Config, shapes: Shapes) -> float:
    """Bytes of the training state with its gradient, and of the teachers, on all devices."""
    trained = jax.tree.leaves(models.abstract_params(shapes.student, jnp.float32))
    teachers = [teacher_shapes(config, decoder) for decoder in shapes.teachers.values() if decoder]
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(teachers))
    return ADAM_BYTES * sum(x.size for x in trained) + held


def check_layout(config: Config, mesh: Mesh, shapes: Shapes) -> None:
    """ConfigError where rows or heads can't be dealt over the mesh."""
    rows = config.batch_size // config.micro_batches
    if rows % data_size(mesh):
        raise ConfigError(
            f"batch_size / micro_batches is {rows} rows, which can't be dealt over"
            f" {data_size(mesh)} devices; make it a multiple of {data_size(mesh)}"
        )
    teachers = [(f"teacher {name}", decoder) for name, decoder in shapes.teachers.items()]
    for name, model in (("student", shapes.student), *teachers):
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
