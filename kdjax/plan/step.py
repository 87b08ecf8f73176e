"""The phases of a training step: its update, with activations counted separately, and the other
models' reading; compiled from shapes."""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp

from kdjax.base import Model
from kdjax.config.schema import Config
from kdjax.config.timetable import Method
from kdjax.models import flops
from kdjax.plan.phase import GIB, Phase, compiled_program, largest_teacher, sent_gib
from kdjax.runtime import topology
from kdjax.sharding import data_size, replicated
from kdjax.training.parts.memory import activation_bytes
from kdjax.training.parts.programs import Programs, jitted_logp
from kdjax.training.parts.shapes import Shapes, expected_rollout


def step_phase(
    config: Config, method: Method, number: int, programs: Programs, shapes: Shapes
) -> tuple[Phase, str]:
    """(the phase of one update, the text of its program).

    Args:
        config: what is planned.
        method: of the timetable, its `number`.
        programs, shapes: of the config.
    """
    prompt, response = config.data.max_prompt_tokens, config.curriculum.lengths[-1]
    rows, length = config.batch_size, prompt + response
    mesh, began, teacher = programs.mesh, time.perf_counter(), largest_teacher(programs)
    own = programs.student

    rollout = expected_rollout(config, method, mesh)
    entropy = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))
    compiled = compiled_program(
        teacher.steps[number].lower(own.state, teacher.params, rollout, entropy, own.frozen)
    )
    activations = activation_bytes(programs, rows // config.micro_batches, length) / GIB
    temporaries = compiled.memory_analysis().temp_size_in_bytes / GIB
    sizes = rows * prompt, rows * response, length
    total = sum(flops.student(shapes.student, *sizes))
    if teacher.shape is not None:
        theirs = config.data.teacher_prompt_tokens
        total += flops.response(teacher.shape, rows * theirs, rows * response, theirs + response)
    text = compiled.as_text()
    extra = {
        "activations": min(activations, temporaries),
        "temporaries": max(temporaries - activations, 0.0),
    }
    return _phase(config, programs, extra, total, text, began), text


def reading_phase(
    config: Config, method: Method, programs: Programs, model: Model, params: Any
) -> Phase:
    """The phase of a model that reads a step's rows for log-probabilities (`score.sampled_logp`).

    Args:
        config, method, programs: as in `step_phase`.
        model, params: the model, and its parameters' shapes.
    """
    prompt, response = config.data.max_prompt_tokens, config.curriculum.lengths[-1]
    rows, began = config.batch_size, time.perf_counter()
    rollout = expected_rollout(config, method, programs.mesh)
    split, plan = config.micro_batches, programs.head
    compiled = compiled_program(
        jitted_logp.lower(model, params, rollout, micro_batches=split, plan=plan)
    )
    total = flops.response(model.config, rows * prompt, rows * response, prompt + response)
    extra = {"temporaries": compiled.memory_analysis().temp_size_in_bytes / GIB}
    return _phase(config, programs, extra, total, compiled.as_text(), began)


def _phase(
    config: Config,
    programs: Programs,
    extra_gib: dict[str, float],
    total: float,
    text: str,
    began: float,
) -> Phase:
    """The phase of a program that reads a step's rows.

    Args:
        config, programs: as in `step_phase`.
        extra_gib: of a device, by what it is.
        total: FLOPs on all devices.
        text: of the compiled program.
        began: seconds (`time.perf_counter`).
    """
    mesh, tokens = programs.mesh, config.batch_size * config.curriculum.lengths[-1]
    chunks = tokens / data_size(mesh) / programs.head.chunk
    chip = topology.chip(mesh.devices.flat[0])
    return Phase(
        extra_gib,
        total / mesh.size,
        sent_gib(text, chunks / config.micro_batches),
        chip and total / mesh.size / (chip.tflops * 1e12),
        time.perf_counter() - began,
    )
