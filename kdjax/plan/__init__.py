"""`kdjax plan`: will it fit, and how fast could it be? The real programs, compiled ahead of time.

Nothing is run and no weight is read: the step and the rollout of a config are compiled for devices
that need not be here, and asked what they hold and send.
"""

from __future__ import annotations

import dataclasses

import jax

from kdjax import models, topology
from kdjax.base import ConfigError
from kdjax.config import Config, teacher_models
from kdjax.models.known import KNOWN, Known
from kdjax.plan.phase import GIB, Phase, Plan, device_gib
from kdjax.plan.rollout import rollout_phase
from kdjax.plan.show import advice, show, to_json
from kdjax.plan.step import step_phase
from kdjax.programs import Shapes, choose_meshes, compose, head_chunk
from kdjax.tokenizer import load_tokenizer

__all__ = ["GIB", "Phase", "Plan", "device_gib", "plan", "shapes_of", "show", "to_json"]


def plan(config: Config, target: str) -> Plan:
    """Compile a config's step and rollout for a target; of several teachers, those of the largest.

    Errors: ConfigError where the compiler is missing, a layout can't be, or a model's shapes are
    not known.
    """
    shapes = shapes_of(config)
    devices = topology.devices(target)
    absent_gpu = devices[0].platform == "gpu" and devices[0] not in jax.devices()
    if config.attention == "auto" and absent_gpu:  # cuDNN compiles on the card alone
        config = dataclasses.replace(config, attention="chunked")
    if config.layout.teacher_devices:
        raise ConfigError("plan: layout.teacher_devices is not planned yet; leave it at 0")
    if config.turns:
        raise ConfigError("plan: turns are not planned yet; plan each method alone")
    if config.trajectories is not None:
        raise ConfigError("plan: trajectories are not planned yet; leave them out")
    meshes = choose_meshes(config, devices, shapes)
    mesh, programs = meshes[0], compose(config, meshes, shapes)
    held = {
        "trained parameters": device_gib(programs.state.params),
        "frozen base": device_gib(programs.frozen),
        "optimizer": device_gib(programs.state.opt_state),
        "teacher": sum(device_gib(teacher.params) for teacher in programs.teachers.values()),
        "reference": device_gib(programs.reference_params),
    }
    with topology.uncached():
        step, step_text = step_phase(config, programs, shapes)
        phases = {"step": step}
        if config.prefix != "dataset":
            phases["rollout"] = rollout_phase(config, programs, shapes)
    memory = topology.memory_bytes(devices[0])
    made = Plan(
        target,
        devices[0].device_kind,
        {name: size for name, size in mesh.shape.items()},
        memory and memory / GIB,
        held,
        phases,
        head_chunk(config, mesh, shapes.vocabulary),
        config.attention,
        [],
        step_text,
    )
    return made._replace(advice=list(advice(config, made)))


def shapes_of(config: Config) -> Shapes:
    """A config's shapes: of released checkpoints by their hub names, or of local folders."""
    student = _known(config.student)
    named = {name: name and _known(name) for name in teacher_models(config).values()}
    teachers = [known for known in named.values() if known]
    reference = None if config.reference is None else _known(config.reference).config
    return Shapes(
        student.config,
        {name: known and known.config for name, known in named.items()},  # type: ignore[misc]
        min(known.tokens for known in (student, *teachers)),
        student.stop_ids,
        tuple(i for known in teachers for i in known.stop_ids),
        reference=reference,
    )


def _known(name: str) -> Known:
    if name in KNOWN:
        return KNOWN[name]
    folder = models.find(name)
    tokenizer = load_tokenizer(folder)
    return Known(models.read_config(folder), tokenizer.stop_ids, tokenizer.size)
