"""`kdjax plan`: will it fit, and how fast could it be? The real programs, compiled ahead of time.

Nothing is run and no weight is read: the step and the rollout of a config are compiled for devices
that need not be here, and asked what they hold and send.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from kdjax import flops, hlo, models, topology
from kdjax.base import Batch, ConfigError, Model, Params, Rollout
from kdjax.config import Config, teacher_models
from kdjax.models.known import KNOWN, Known
from kdjax.models.lora import join
from kdjax.programs import (
    Programs,
    Shapes,
    TeacherPrograms,
    choose_meshes,
    compose,
    head_chunk,
    sampling,
    to_sampler,
)
from kdjax.sharding import (
    BATCH,
    KV_HEADS,
    batch_spec,
    data_size,
    device_bytes,
    replicated,
    rollout_mesh,
    spec,
)
from kdjax.tokenizer import load_tokenizer

GIB = 2**30


class Phase(NamedTuple):
    """One program on one device: what it holds beyond the training state and the teacher, its
    FLOPs, the bytes it sends by kind, and seconds that it can't fall below (the larger of
    arithmetic and memory traffic, None for a chip without published figures)."""

    extra_gib: dict[str, float]
    flops: float
    sent_gib: dict[str, float]
    floor_seconds: float | None
    compile_seconds: float


class Plan(NamedTuple):
    """A config on a target, per device; held_gib lies there in every phase."""

    target: str
    kind: str
    mesh: dict[str, int]
    memory_gib: float | None
    held_gib: dict[str, float]
    phases: dict[str, Phase]
    head_chunk: int
    attention: str
    advice: list[str]
    step_text: str

    def total_gib(self, phase: str) -> float:
        """Everything that a phase has in a device's memory."""
        return sum(self.held_gib.values()) + sum(self.phases[phase].extra_gib.values())

    @property
    def fits(self) -> bool:
        """Whether every phase fits; True where the memory is not known."""
        return self.memory_gib is None or all(
            self.total_gib(phase) <= self.memory_gib for phase in self.phases
        )


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
    if config.trajectories is not None:
        raise ConfigError("plan: trajectories are not planned yet; leave them out")
    meshes = choose_meshes(config, devices, shapes)
    mesh, programs = meshes[0], compose(config, meshes, shapes)
    held = {
        "trained parameters": device_gib(programs.state.params),
        "frozen base": device_gib(programs.frozen),
        "optimizer": device_gib(programs.state.opt_state),
        "teacher": sum(device_gib(teacher.params) for teacher in programs.teachers.values()),
    }
    with topology.uncached():
        step, step_text = _step_phase(config, programs, shapes)
        phases = {"step": step}
        if config.prefix != "dataset":
            phases["rollout"] = _rollout_phase(config, programs, shapes)
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
    return made._replace(advice=list(_advice(config, made)))


def shapes_of(config: Config) -> Shapes:
    """A config's shapes: of released checkpoints by their hub names, or of local folders."""
    student = _known(config.student)
    named = {name: name and _known(name) for name in teacher_models(config).values()}
    teachers = [known for known in named.values() if known]
    return Shapes(
        student.config,
        {name: known and known.config for name, known in named.items()},  # type: ignore[misc]
        min(known.tokens for known in (student, *teachers)),
        student.stop_ids,
        tuple(i for known in teachers for i in known.stop_ids),
    )


def _known(name: str) -> Known:
    if name in KNOWN:
        return KNOWN[name]
    folder = models.find(name)
    tokenizer = load_tokenizer(folder)
    return Known(models.read_config(folder), tokenizer.stop_ids, tokenizer.size)


def device_gib(tree: Any) -> float:
    """GiB of one device's shards of a tree of arrays or of shapes with shardings."""
    return device_bytes(tree) / GIB


def to_json(made: Plan) -> dict[str, Any]:
    """A plan as JSON values, without the program's text."""
    fields = made._asdict()
    del fields["step_text"]
    fields["phases"] = {name: phase._asdict() for name, phase in made.phases.items()}
    fields["total_gib"] = {name: made.total_gib(name) for name in made.phases}
    return fields


def show(made: Plan) -> None:
    """Print a plan: a column a phase, GiB of one device."""
    from rich.console import Console
    from rich.table import Table

    shape = " x ".join(f"{name} {size}" for name, size in made.mesh.items())
    memory = "not known" if made.memory_gib is None else f"{made.memory_gib:.2f} GiB"
    table = Table(title=f"{made.target}: {made.kind}, {shape}; memory of a device {memory}")
    table.add_column("a device")
    for name in made.phases:
        table.add_column(name, justify="right")
    for name, gib in made.held_gib.items():
        if gib == 0:
            continue
        table.add_row(f"{name} GiB", *(f"{gib:.2f}" for _ in made.phases))
    extras = dict.fromkeys(n for phase in made.phases.values() for n in phase.extra_gib)
    for name in extras:
        values = [phase.extra_gib.get(name) for phase in made.phases.values()]
        table.add_row(f"{name} GiB", *("" if v is None else f"{v:.2f}" for v in values))
    totals = [made.total_gib(name) for name in made.phases]
    over = [made.memory_gib is not None and total > made.memory_gib for total in totals]
    table.add_row(
        "total GiB",
        *(f"{t:.2f}{' DOES NOT FIT' if o else ''}" for t, o in zip(totals, over, strict=True)),
        end_section=True,
    )
    phases = made.phases.values()
    table.add_row("TFLOP", *(f"{phase.flops / 1e12:.1f}" for phase in phases))
    for kind in dict.fromkeys(k for phase in phases for k in phase.sent_gib):
        table.add_row(f"{kind} GiB", *(f"{p.sent_gib.get(kind, 0.0):.2f}" for p in phases))
    floors = [phase.floor_seconds for phase in phases]
    table.add_row("floor, s", *("" if f is None else f"{f:.2f}" for f in floors))
    table.add_row("compiled in, s", *(f"{phase.compile_seconds:.0f}" for phase in phases))
    console = Console()
    console.width = max(console.width, 100)
    console.print(table)
    print(
        "Rows at their full length. Floor: arithmetic at the published bfloat16 rate (rollout: or"
        " weights and KV cache read at the published bandwidth); a real step takes longer."
    )
    print(f"attention {made.attention}; {made.head_chunk} tokens a chunk of the loss head")
    for line in made.advice:
        print(f"to make it fit: {line}")


def _step_phase(config: Config, programs: Programs, shapes: Shapes) -> tuple[Phase, str]:
    prompt, response = config.data.max_prompt_tokens, config.curriculum.lengths[-1]
    rows, length = config.batch_size, prompt + response
    mesh, began, teacher = programs.mesh, time.perf_counter(), _largest(programs)

    array = functools.partial(_rows, mesh)
    rollout = Rollout(
        array(jnp.int32, rows, length),
        array(jnp.int32, rows),
        array(jnp.int32, rows),
        array(jnp.float32, rows, response),
        array(jnp.bool_, rows),
    )
    entropy = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))
    compiled = _compiled(
        teacher.step.lower(programs.state, teacher.params, rollout, entropy, programs.frozen)
    )
    activations = _activation_gib(programs, rows // config.micro_batches, length)
    temporaries = compiled.memory_analysis().temp_size_in_bytes / GIB
    decoder = teacher.model and teacher.model.config
    total = flops.training(shapes.student, decoder, rows * prompt, rows * response, length)
    chunks = rows * response / data_size(mesh) / head_chunk(config, mesh, shapes.vocabulary)
    text = compiled.as_text()
    chip = topology.chip(mesh.devices.flat[0])
    return Phase(
        {
            "activations": min(activations, temporaries),
            "temporaries": max(temporaries - activations, 0.0),
        },
        total / mesh.size,
        _sent(text, chunks / config.micro_batches),
        chip and total / mesh.size / (chip.tflops * 1e12),
        time.perf_counter() - began,
    ), text


def _rows(mesh: Mesh, dtype, *shape: int) -> Any:
    """An array whose rows are dealt over a mesh."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_spec(mesh))


def _activation_gib(programs: Programs, rows: int, length: int) -> float:
    """What the student's layers keep for the backward pass, on a device: residuals with the rows
    of a micro-batch in them, dealt like the rows."""
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
        (programs.state.params, programs.frozen or {}),
    )

    def residuals(trained, frozen, tokens):
        return jax.vjp(lambda t: programs.learner.hidden(join(frozen, t), tokens), trained)[1]

    kept = jax.eval_shape(residuals, *shapes, tokens)
    total = sum(
        np.prod(leaf.shape, dtype=float) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(kept)
        if (rows, length) in zip(leaf.shape, leaf.shape[1:], strict=False)
    )
    return total / data_size(programs.mesh) / GIB


def _rollout_phase(config: Config, programs: Programs, shapes: Shapes) -> Phase:
    """The sampler of the prefix source: the student's batch, or a batch of teacher trajectories."""
    model, source, rows = _sampled(config, programs)
    prompt, response = config.data.max_prompt_tokens, config.curriculum.lengths[-1]
    mesh, began = rollout_mesh(programs.mesh), time.perf_counter()
    convert = to_sampler(source, jnp.dtype(config.dtype), programs.mesh)
    converted = _compiled(convert.lower(source))
    params = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        jax.eval_shape(convert, source),
        converted.output_shardings,
    )

    array = functools.partial(_rows, mesh)
    batch = Batch(
        array(jnp.int32, rows, prompt),
        array(jnp.int32, rows),
        array(jnp.int32, rows, 1),
        array(jnp.int32, rows),
        array(jnp.bool_, rows),
        array(jnp.int32, rows),
    )
    draw = sampling(model, shapes.stop_ids, shapes.vocabulary, config.sampling)
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated(mesh))
    compiled = _compiled(draw.lower(params, batch, key, max_new_tokens=response))
    cache = _cache_gib(model, rows, prompt + response, mesh)
    memory = compiled.memory_analysis()
    sent: dict[str, float] = defaultdict(float)
    for text, trips in ((converted.as_text(), 1), (compiled.as_text(), response / 16)):
        for kind, gib in _sent(text, trips).items():
            sent[kind] += gib
    weights = device_gib(params)
    total = flops.sampling(model.config, rows * prompt, rows * response, prompt + response)
    chip = topology.chip(programs.mesh.devices.flat[0])
    moved = response * (weights + cache / 2) * GIB  # each token reads all weights and half a cache
    floor = chip and max(total / mesh.size / (chip.tflops * 1e12), moved / (chip.memory_gbps * 1e9))
    temporaries = (memory.temp_size_in_bytes + memory.output_size_in_bytes) / GIB
    return Phase(
        {
            "sampler's weights": weights,
            "KV cache": cache,
            "temporaries": max(temporaries - cache, 0.0),
        },
        total / mesh.size,
        dict(sent),
        floor,
        time.perf_counter() - began,
    )


def _sampled(config: Config, programs: Programs) -> tuple[Model, Params, int]:
    """(sampler, parameters that it is made of, rows)."""
    if config.prefix == "student":
        return programs.student_sampler, programs.student_params, config.batch_size
    teacher = _largest(programs)
    assert teacher.sampler is not None
    dealt = data_size(programs.mesh)
    rows = -(-config.evaluation.batch_size // dealt) * dealt
    return teacher.sampler, teacher.params, rows


def _largest(programs: Programs) -> TeacherPrograms:
    return max(programs.teachers.values(), key=lambda teacher: device_gib(teacher.params))


def _cache_gib(model: Model, rows: int, slots: int, mesh) -> float:
    config = model.config
    shape = (rows, config.num_key_value_heads, slots, config.head_dim)
    cache = jax.eval_shape(lambda: model.init_cache(rows, slots))
    place = NamedSharding(mesh, spec(mesh, shape, (BATCH, KV_HEADS, None, None)))
    return device_gib(
        jax.tree.map(lambda c: jax.ShapeDtypeStruct(c.shape, c.dtype, sharding=place), cache)
    )


def _compiled(lowered) -> Any:
    try:
        return lowered.compile()
    except Exception as error:
        first = str(error).splitlines()[0][:300]
        raise ConfigError(f"the compiler refuses this program: {first}") from error


def _sent(text: str, unknown_trips: float) -> dict[str, float]:
    sent: dict[str, float] = defaultdict(float)
    for collective in hlo.collectives(text, max(1.0, unknown_trips)):
        sent[collective.kind] += collective.total_bytes / GIB
    return dict(sent)


def _advice(config: Config, made: Plan) -> Iterator[str]:
    """What to change, most useful first, where a phase does not fit."""
    if made.fits:
        return
    devices = made.mesh["data"] * made.mesh["fsdp"] * made.mesh["tensor"]
    held = sum(made.held_gib.values())
    over = {p: made.total_gib(p) - (made.memory_gib or 0) for p in made.phases}
    if held > 0.5 * (made.memory_gib or 0) and made.mesh["fsdp"] < devices:
        yield f"--layout.fsdp {devices}: deal the {held:.1f} GiB of states over all devices"
    if over["step"] > 0:
        extra = made.phases["step"].extra_gib
        if config.remat != "full":
            yield f"--remat full: {extra['activations']:.1f} GiB are kept for the backward pass"
        if config.batch_size // config.micro_batches > devices // made.mesh["tensor"]:
            yield f"--micro_batches {config.micro_batches * 2}: half the rows at a time"
        if extra["temporaries"] > 2:
            yield "--head_memory_mib: a smaller chunk of the loss head"
    if over.get("rollout", 0) > 0:
        cache = made.phases["rollout"].extra_gib["KV cache"]
        yield f"--layout.tensor 2: deal heads and the KV cache ({cache:.1f} GiB) over more devices"
        rows = "batch_size" if config.prefix == "student" else "evaluation.batch_size"
        yield f"--{rows}: fewer rows decoded at once, or shorter --curriculum.lengths"
    if held > 0.8 * (made.memory_gib or 0) and made.mesh["fsdp"] == devices:
        yield "more devices, or smaller models: the states alone fill them"
