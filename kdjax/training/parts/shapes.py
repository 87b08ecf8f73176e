"""The shapes that a config's programs are made of: its models, its meshes, its rollouts."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kdjax import models
from kdjax.base import PLAIN, Params, Rollout, Sampling, TeacherRows, TopK
from kdjax.config.schema import Config, Data
from kdjax.config.timetable import Method
from kdjax.errors import ConfigError, DataError
from kdjax.grading.rewards import math
from kdjax.models.parameters import parameter_count
from kdjax.models.shape import WITHIN_CONTEXT, DecoderConfig, context_tokens
from kdjax.runtime import topology
from kdjax.sharding import batch_spec, data_size, make_mesh, owners

ADAM_BYTES = 16  # float32 parameter, gradient and two moments
COPY_BYTES = 4  # the parameter that the entropy gate may fall back to, or that is averaged
TEACHER_WEIGHTS: dict[str, models.Hold | None] = {"compute": None, "int8": models.int8}
"""How the teacher's parameters are stored, by the config's `teacher_weights`."""
GREEDY = Sampling(0.0)
SHARE_OF_MEMORY = 0.4  # of a device, for states; larger ones are sharded over fsdp


class Shapes(NamedTuple):
    """The shapes that a config's programs depend on; to have them, no weight is read.

    teachers: by the name of their model; {None: None} is no teacher. teacher_stop_ids: those of all
    teachers. reference: the reference model's, if there is one. heads_alone: rollouts have the
    teachers' states, so only the LM head of a teacher is used, and its shape here is None.
    """

    student: DecoderConfig
    teachers: dict[str | None, DecoderConfig | None]
    vocabulary: int
    stop_ids: tuple[int, ...]
    teacher_stop_ids: tuple[int, ...] = ()
    heads_alone: bool = False
    reference: DecoderConfig | None = None


def choose_meshes(
    config: Config, devices: Sequence[jax.Device], shapes: Shapes
) -> tuple[Mesh, Mesh]:
    """(the student's mesh, the teachers' mesh) over these devices: the same mesh, unless
    layout.teacher_devices sets devices aside for the teachers.

    fsdp, where the config does not set it, is 1 if the training state and the teachers fill at most
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
    """Bytes on the student's devices of the training state with its gradient, of the reference, and
    of the teachers without devices of their own."""
    trained = jax.tree.leaves(models.abstract_params(shapes.student, jnp.float32))
    beside = [] if config.layout.teacher_devices else shapes.teachers.values()
    held_as = config.dtype, config.teacher_weights
    teachers = [teacher_shapes(decoder, *held_as) for decoder in beside if decoder]
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(teachers))
    if shapes.reference is not None:
        held += jnp.dtype(config.dtype).itemsize * parameter_count(shapes.reference)
    copies = (config.curriculum.policy == "fall_back") + (config.self_decay > 0)
    return (ADAM_BYTES + copies * COPY_BYTES) * sum(x.size for x in trained) + held


def check_layout(config: Config, meshes: tuple[Mesh, Mesh], shapes: Shapes) -> None:
    """Errors: ConfigError where rows or heads can't be sharded over the meshes."""
    mesh, teacher_mesh = meshes
    if teacher_mesh is not mesh and config.batch_size % data_size(teacher_mesh):
        raise ConfigError(
            f"batch_size is {config.batch_size} rows, which can't be sharded over the teacher's"
            f" {data_size(teacher_mesh)} devices; make it a multiple of {data_size(teacher_mesh)}"
        )
    groups = config.batch_size // config.rl.group_size
    if groups % owners(mesh):
        raise ConfigError(
            f"batch_size / rl.group_size is {groups} problems, which can't be split among"
            f" {owners(mesh)} processes; make it a multiple of {owners(mesh)}"
        )
    rows = config.batch_size // config.micro_batches
    if rows % data_size(mesh):
        raise ConfigError(
            f"batch_size / micro_batches is {rows} rows, which can't be sharded over"
            f" {data_size(mesh)} devices; make it a multiple of {data_size(mesh)}"
        )
    teachers = [(f"teacher {name}", decoder) for name, decoder in shapes.teachers.items()]
    for name, model in (("student", shapes.student), *teachers, ("reference", shapes.reference)):
        if model and model.num_key_value_heads % config.layout.tensor:
            raise ConfigError(
                f"layout.tensor {config.layout.tensor} does not divide the {name}'s"
                f" {model.num_key_value_heads} key/value heads; choose a divisor"
            )


def teacher_shapes(
    teacher: DecoderConfig, dtype: str, teacher_weights: str, mesh: Mesh | None = None
) -> Params:
    """Shapes of the teacher's parameters as they are stored on devices (TEACHER_WEIGHTS)."""
    hold = TEACHER_WEIGHTS[teacher_weights]
    return models.abstract_params(teacher, jnp.dtype(dtype), mesh, hold=hold)


def expected_rollout(config: Config, method: Method, mesh: Mesh) -> Rollout:
    """The shapes of a method's rollout at full length, with every field that it will have when its
    responses are drawn, not read from a folder."""
    prompt, response = config.data.max_prompt_tokens, config.curriculum.lengths[-1]
    rows = config.batch_size

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
    if config.data.teacher_prompt_template is not None:
        theirs = config.data.teacher_prompt_tokens + response
        rows_of = TeacherRows(array(jnp.int32, theirs), array(jnp.int32, response))
        made = made._replace(teacher_rows=rows_of)
    if method.prefix == "student":
        rollouts, plain = config.rollouts, config.sampling in (PLAIN, GREEDY)
        known = rollouts.engine is None or plain  # an engine says what it draws from alone
        own = a_token() if known else None
        made = made._replace(own_logp_bt=own)
        if rollouts.engine is None:
            made = made._replace(entropy_bt=a_token())
        if rollouts.ahead or rollouts.engine is not None:
            made = made._replace(staleness_b=array(jnp.int32))
        if rollouts.ahead or (rollouts.engine is not None and rollouts.engine_every > 1):
            made = made._replace(old_logp_bt=own)
    if config.served.url is not None:
        named = response, config.served.top_k
        ids, logp = array(jnp.int32, *named), array(jnp.float32, *named)
        made = made._replace(teacher_top_k_bt=TopK(ids, logp, a_token(), a_token()))
    if config.reference is not None:
        made = made._replace(reference_logp_bt=a_token())
    if method.rewarded:
        made = made._replace(advantage_bt=a_token(), reward_b=a_row(), pass_rate_b=a_row())
        made = made._replace(draws_b=array(jnp.int32), signal_b=array(jnp.bool_))
        if config.rl.reward is math:
            made = made._replace(not_scored_b=array(jnp.bool_))
        if method.updates > 1:
            made = made._replace(old_logp_bt=a_token())
    return made


def about_context(
    data: Data,
    shapes: dict[str, DecoderConfig],
    longest: dict[str, int],
    limit: str = "max_prompt_tokens",
) -> Iterator[str]:
    """A warning for each model, by its role, that may read more tokens than it was made for; with
    the longest response by its field, and the limit of a prompt by its. Errors: DataError where it
    would be computed otherwise there than here."""
    prompt = getattr(data, limit)
    for role, shape in shapes.items():
        context, scaling = context_tokens(shape), shape.rope_scaling
        for field, response in longest.items():
            if prompt + response <= context:
                continue
            said = (
                f"the {role} may read {prompt} + {response} tokens (data.{limit} +"
                f" {field}), and its context is {context}"
            )
            if scaling is not None and scaling.rope_type in WITHIN_CONTEXT:
                raise DataError(
                    f"{said}: its rope_scaling of type {scaling.rope_type} is computed up to there"
                    " alone; lower the limits"
                )
            yield (
                f"warning: {said} (max_position_embeddings): beyond it a model's text is often"
                " worthless; lower the limits, or take one of a longer context"
            )
