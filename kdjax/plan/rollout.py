"""The rollout of a plan: the sampler's programs at its longest level, compiled from shapes."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kdjax.base import Model, Params, random_key
from kdjax.config.schema import Config
from kdjax.models import flops
from kdjax.models.layers.cache import Recurrent, Slots
from kdjax.plan.phase import GIB, Phase, compiled_program, device_gib, largest_teacher, sent_gib
from kdjax.rollouts.decoding import Prompts, decoder
from kdjax.rollouts.levels import Level, levels, prefill_rows
from kdjax.rollouts.sampler import prefill_tokens
from kdjax.runtime import topology
from kdjax.sharding import batch_spec, data_size, replicated, rollout_mesh
from kdjax.storage.trajectories import CHUNK_ROWS
from kdjax.training.parts.memory import rows_at_once
from kdjax.training.parts.programs import Programs
from kdjax.training.parts.sampling import cache_bytes, to_sampler
from kdjax.training.parts.shapes import Shapes


def rollout_phase(config: Config, prefix: str, programs: Programs, shapes: Shapes) -> Phase:
    """The phase of a prefix's sampler: the student draws a step's batch, the teacher a chunk of
    trajectories, as many rows at a time as the cache may hold, all at the length limit."""
    model, source, rows, places = _sampled(config.batch_size, prefix, programs)
    response, data = config.curriculum.lengths[-1], config.data
    prompt = data.teacher_prompt_tokens if prefix == "teacher" else data.max_prompt_tokens
    mesh, began = rollout_mesh(places), time.perf_counter()
    convert = to_sampler(source, jnp.dtype(config.dtype), places)
    converted = compiled_program(convert.lower(source))
    params = _placed(jax.eval_shape(convert, source), converted.output_shardings)

    level = levels(response)[-1]
    slots = level.slots(prompt)
    size = rows_at_once(model, places, config.rollouts, rows, prompt, response)
    draws = decoder(model, config.sampling, shapes.vocabulary, mesh)
    made = compiled_program(draws.empty.lower(params, size, slots))
    state = _placed(made.out_info, made.output_shardings)
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
    key = jax.eval_shape(lambda: random_key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated(mesh))
    decode = compiled_program(draws.decode.lower(params, state, key, number, number, level.steps))
    tokens = prefill_tokens(model, cache_bytes(config.rollouts.cache_gib, places), mesh)
    prompts, wide = _prefixes(mesh, level, prompt, size, tokens)
    prefill = compiled_program(draws.prefill.lower(params, state, prompts, number, wide))

    batches = -(-rows // size)
    sent: dict[str, float] = defaultdict(float)
    for program, times in ((converted, 1), (decode, batches * response / level.steps)):
        for kind, gib in sent_gib(program.as_text(), 1).items():
            sent[kind] += gib * times
    weights, cache = device_gib(params), device_gib(state.cache)
    total = flops.response(model.config, rows * prompt, rows * response, prompt + response)
    chip = topology.chip(mesh.devices.flat[0])
    read = sum(_moved_gib(layer, prompt, response) for layer in state.cache)
    moved = batches * response * (weights + read) * GIB
    floor = chip and max(total / mesh.size / (chip.tflops * 1e12), moved / (chip.memory_gbps * 1e9))
    temporaries = max(p.memory_analysis().temp_size_in_bytes for p in (decode, prefill))
    return Phase(
        {"sampler's weights": weights, "KV cache": cache, "temporaries": temporaries / GIB},
        total / mesh.size,
        dict(sent),
        floor,
        time.perf_counter() - began,
    )


def _moved_gib(layer: Any, prompt: int, response: int) -> float:
    """GiB that a token moves of a layer's cache, in the mean over a response: of all slots those
    that are filled, a window whole, a state read and written."""
    if isinstance(layer, Slots):
        return device_gib(layer) * (prompt + response / 2) / (prompt + response)
    return device_gib(layer) * (2 if isinstance(layer, Recurrent) else 1)


def _placed(shapes: Any, places: Any) -> Any:
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        places,
    )


def _prefixes(
    mesh: Mesh, level: Level, prompt: int, size: int, tokens: float
) -> tuple[Prompts, int]:
    """(shapes of the prompts that are prefilled at a time when a level begins, their width).

    Args:
        mesh: of the sampler.
        level, prompt: with the longest prompt in tokens.
        size: rows decoded at a time.
        tokens: prefilled at a time on a device, at most.
    """
    wide, devices = prompt + level.first, data_size(mesh)
    rows = devices * min(prefill_rows(wide, tokens), size // devices)

    def array(*shape: int):
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_spec(mesh))

    return Prompts(array(rows, wide), array(rows), array(rows), array(rows)), wide


def _sampled(batch_size: int, prefix: str, programs: Programs) -> tuple[Model, Params, int, Mesh]:
    """(sampler, the shapes of the model's parameters, rows of a draw, the model's mesh)."""
    if prefix == "student":
        return programs.student.sampler, programs.student.params, batch_size, programs.mesh
    teacher = largest_teacher(programs)
    assert teacher.sampler is not None
    return teacher.sampler, teacher.params, CHUNK_ROWS, programs.teacher_mesh
