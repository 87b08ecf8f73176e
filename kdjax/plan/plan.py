"""The plan of a config (`kdjax plan`): will it fit, and how fast could it be?

Nothing is run and no weight is read: the training steps and rollouts of a config, and the reading
of a reference model and of the old policy, are compiled ahead of time for devices that need not be
here; their memory and communication are read off the compiled programs.
"""

from __future__ import annotations

import dataclasses

import jax

from kdjax import models
from kdjax.config.schema import Config
from kdjax.config.teachers import teacher_models
from kdjax.config.timetable import Timetable, timetable
from kdjax.data.tokenizer_folder import read_tokenizer, stop_ids
from kdjax.errors import ConfigError
from kdjax.models.known import KNOWN, Known
from kdjax.models.lora import join
from kdjax.plan.phase import GIB, Phase, Plan, device_gib
from kdjax.plan.rollout import rollout_phase
from kdjax.plan.show import advice, remarks
from kdjax.plan.step import reading_phase, step_phase
from kdjax.runtime import topology
from kdjax.training.parts.programs import Programs, compose
from kdjax.training.parts.shapes import Shapes, choose_meshes


def plan(config: Config, target: str) -> Plan:
    """Compile a config's programs for a target, each a phase: the steps and rollouts of its methods
    (`timetable.methods`), the reference's and the old policy's reading; of several teachers, those
    of the largest.

    Errors: ConfigError where the compiler is missing, a layout is impossible, or a model's shapes
    are not known.
    """
    shapes = shapes_of(config)
    devices = topology.devices(target)
    absent_gpu = devices[0].platform == "gpu" and devices[0] not in jax.devices()
    if config.attention == "auto" and absent_gpu:  # cuDNN compiles on the GPU itself alone
        config = dataclasses.replace(config, attention="chunked")
    if config.layout.teacher_devices:
        raise ConfigError("plan: layout.teacher_devices is not planned yet; leave it at 0")
    if config.least_aligned is not None:
        raise ConfigError("plan: a teacher of another tokenizer is not planned yet")
    if config.trajectories is not None:
        raise ConfigError("plan: trajectories are not planned yet; leave them out")
    meshes = choose_meshes(config, devices, shapes)
    mesh, table = meshes[0], timetable(config)
    programs = compose(config, table, meshes, shapes)
    state, reference = programs.student.state, programs.reference
    held = {
        "trained parameters": device_gib(state.params),
        "frozen base": device_gib(programs.student.frozen),
        "optimizer": device_gib(state.opt_state),
        "teacher": sum(device_gib(teacher.params) for teacher in programs.teachers.values()),
        "reference": device_gib(reference and reference.params),
    }
    with topology.uncached():
        phases, step_text = _phases(config, table, programs, shapes)
    memory = topology.memory_bytes(devices[0])
    made = Plan(
        target,
        devices[0].device_kind,
        {name: size for name, size in mesh.shape.items()},
        memory and memory / GIB,
        held,
        phases,
        programs.head.chunk,
        config.attention,
        [],
        list(remarks(config, table)),
        step_text,
    )
    return made._replace(advice=list(advice(config, made)))


def _phases(
    config: Config, table: Timetable, programs: Programs, shapes: Shapes
) -> tuple[dict[str, Phase], str]:
    """(the phases by name, the text of the first method's compiled step)."""
    phases, texts = {}, []
    for number, method in enumerate(table.methods):
        name = f"step of turn {number}" if number else "step"
        phases[name], text = step_phase(config, method, number, programs, shapes)
        texts.append(text)
    elsewhere = ("dataset", "teacher") if config.served.url else ("dataset",)
    drawn = dict.fromkeys(m.prefix for m in table.methods if m.prefix not in elsewhere)
    for prefix in drawn:
        name = "rollout" if len(drawn) == 1 else f"{prefix} rollout"
        phases[name] = rollout_phase(config, prefix, programs, shapes)
    if programs.reference is not None:
        phases["reference"] = reading_phase(config, table.methods[0], programs, *programs.reference)
    several = [method for method in table.methods if method.updates > 1]
    if several and not config.rollouts.ahead:
        own = programs.student
        trained = join(own.frozen, own.state.params)
        phases["old policy"] = reading_phase(config, several[0], programs, own.learner, trained)
    return phases, texts[0]


def shapes_of(config: Config) -> Shapes:
    """The shapes of a config's models: of released checkpoints by hub name, or of local folders."""
    student = _known(config.student)
    named = {name: name and _known(name) for name in teacher_models(config).values()}
    teachers = [known for known in named.values() if known]
    live = None if config.served.url else True
    reference = None if config.reference is None else _known(config.reference).config
    return Shapes(
        student.config,
        {name: known and live and known.config for name, known in named.items()},  # type: ignore[misc]
        min(known.tokens for known in (student, *teachers)),
        student.stop_ids,
        tuple(i for known in teachers for i in known.stop_ids),
        reference=reference,
    )


def _known(name: str) -> Known:
    if name in KNOWN:
        return KNOWN[name]
    folder = models.find(name)
    tokenizer = read_tokenizer(folder)  # a base model without a chat template is planned, too
    tokens = max(tokenizer.get_vocab().values()) + 1
    return Known(models.read_config(folder), stop_ids(folder, tokenizer), tokens)
