"""The start-up report of a run: an error for whatever would corrupt it, and lines on the rest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.base import Model, Params, Rollout
from kdjax.config.evaluated import evaluated_at
from kdjax.config.schema import Data
from kdjax.config.teachers import SELF
from kdjax.data.fitting import about_shared
from kdjax.data.tokenizer import Tokenizer
from kdjax.errors import DataError
from kdjax.losses.combinators import closed_form
from kdjax.losses.composition import describe
from kdjax.models.hf.stored import about_left_out, about_untied
from kdjax.models.quantized import parameter_total
from kdjax.rollouts.levels import levels
from kdjax.runtime.files import json_object
from kdjax.sharding import (
    data_size,
    device_bytes,
    owners,
    rows_on_host,
    shard_batch,
    vocabulary_axis,
)
from kdjax.step.score import HeadPlan
from kdjax.step.stops import Stops
from kdjax.step.vocabulary import SharedHead
from kdjax.storage.trajectories import CHUNK_ROWS
from kdjax.training.parts import precomputed
from kdjax.training.parts.build import Parts, rows_needed
from kdjax.training.parts.memory import activation_bytes, rows_at_once, sampling_bytes
from kdjax.training.parts.programs import Headed, jitted_score
from kdjax.training.parts.published import about_engines
from kdjax.training.parts.roles import title
from kdjax.training.parts.shapes import about_context
from kdjax.training.parts.teachers import about_what_teachers_read, both_ways

PROMPT = "1+1="
SELF_TEST_TOKENS = 8
LARGEST_SELF_KL_NATS = 1e-6


def report(parts: Parts) -> str:
    """The start-up report of a run; every line names its subject, so that it can be read alone.

    Errors: DataError where a model has fewer vocabulary rows than its tokenizer tokens in use, or
    where the self-test fails.
    """
    programs, own, plan = parts.programs, parts.roles.student.tokenizer, parts.programs.head
    first = {teacher.role: tag for tag, teacher in reversed(parts.teachers.items())}
    once = {title(t): teacher for t, teacher in parts.teachers.items() if first[teacher.role] == t}
    live = {name: t for name, t in once.items() if t.programs.model is not None}
    heads = [t.given for t in once.values() if t.params is None and t.given is not None]
    heads += [t.given for t in live.values() if isinstance(t.given, SharedHead)]
    heads += [t.given.head for t in live.values() if isinstance(t.given, Headed)]
    read: dict[str, tuple[Any, Params]] = {
        "student": (programs.student.model, programs.student.params)
    }
    read |= {name: (t.programs.model, t.params) for name, t in live.items()}
    others = {
        name: t.role.tokenizer for name, t in live.items() if t.role and t.role.shared is None
    }
    reads = {"student": own} | {
        name: t.role.tokenizer if t.role and name not in others else own for name, t in live.items()
    }
    sizes = {name: tokenizer.size for name, tokenizer in reads.items()}
    lines = [
        *_about_problems(parts),
        *_about_prompts(own, others, parts.config.data),
        *about_what_teachers_read(parts.config, parts.problems),
        *_about_stops(own, others, plan.stops, parts.table.learns_from_teacher()),
        *_about_shapes(parts, live),
        _about_vocabulary(read, sizes),
        *_about_method(parts, bool(live)),
        _about_sizes(parts, read, heads),
    ]
    if programs.teacher_mesh is not programs.mesh:
        lines.append(f"teacher's devices: {programs.teacher_mesh.size} more, for the teacher alone")
    there = plan._replace(mesh=programs.teacher_mesh)
    for name in live:
        plan = there._replace(vocabulary=sizes[name])
        kl = self_test(*read[name], reads[name], plan, name=name)
        lines.append(f"self-test: the {name} as its own student has KL {kl:g}")
    if parts.config.served.check_rows:
        known = parts.student, parts.problems.source, parts.serve
        lines.append(both_ways(parts.config, parts.roles, programs, *known))
    return "".join(line + "\n" for line in lines)


def evaluation_context(parts: Parts) -> Iterator[str]:
    """A warning for each model whose context is too short for the evaluation's limits."""
    teachers = {title(tag): teacher.role for tag, teacher in parts.teachers.items()}
    read = {"student": parts.roles.student} | {n: r for n, r in teachers.items() if r}
    shapes = {name: role.shape for name, role in read.items()}
    longest = {"evaluation.max_new_tokens": parts.config.evaluation.max_new_tokens}
    return about_context(parts.config.data, shapes, longest)


def _about_problems(parts: Parts) -> Iterator[str]:
    """The problems of each teacher, and the remarks of their sources."""
    for tag, teacher in parts.teachers.items():
        if tag and teacher.role is not None:
            rows = len(parts.problems.groups[tag])
            yield f"{title(tag)}: {teacher.role.name}, for {rows} problems"
    trained, heldout, test = parts.problems.source, parts.problems.heldout, parts.problems.test
    of = {"problems": trained, "held-out problems": heldout, "test problems": test}
    for what, source in of.items():
        if source is not None and source.about:
            yield f"{what}: {source.about}"
    yield from about_shared({"trained on": trained, "held out": heldout, "tested on": test})


def _about_shapes(parts: Parts, live: dict[str, Any]) -> Iterator[str]:
    """What the models' shapes give reason to say."""
    student, reference = parts.roles.student, parts.roles.reference
    read = {"student": student} | {name: t.role for name, t in live.items() if t.role}
    read |= {"reference": reference} if reference else {}
    shapes = {name: role.shape for name, role in read.items()}
    longest = {"curriculum.lengths": parts.config.curriculum.lengths[-1]}
    data, own = parts.config.data, parts.config.teacher == SELF
    yield from about_context(data, shapes, longest)
    if data.max_teacher_prompt_tokens is not None:
        taught = {"student": student.shape} if own else {n: shapes[n] for n in live if n in shapes}
        yield from about_context(data, taught, longest, "max_teacher_prompt_tokens")
    yield from evaluation_context(parts)
    for role in {role.folder: role for role in read.values()}.values():
        declared = json_object(role.folder, "config.json").get("tie_word_embeddings")
        if declared and not role.shape.tie_word_embeddings:
            yield about_untied(role.folder)
        if left := about_left_out(role.folder, role.shape.model_type):
            yield left


def _about_method(parts: Parts, taught: bool) -> Iterator[str]:
    """The loss, sampling, precision and devices."""
    config, mesh = parts.config, parts.mesh
    way = "in closed form" if closed_form(config.token_loss) else "by autodiff from chunk logits"
    loss = describe(config.token_loss)
    tempered = "as at_temperature says, else " if "at_temperature(" in loss else ""
    yield (
        f"loss: token loss {loss} (gradients {way}), objective {describe(config.objective)},"
        f" reduction {describe(config.reduction)}"
    )
    yield from about_engines(config, parts.roles.teachers, draws=parts.published is not None)
    if (stored := precomputed.describe(config.trajectories, parts.responses.stored)) is not None:
        yield f"trajectories: {stored}"
    evaluated = " and ".join(map(str, evaluated_at(config.evaluation)))
    yield (
        f"sampling: rollouts {config.sampling}; evaluation {evaluated};"
        f" temperature of the loss {tempered}1.0"
    )
    lora = f", LoRA of rank {config.lora.rank}" if config.lora.rank else ""
    yield f"layers: attention {config.attention}, remat {config.remat}{lora}"
    yield (
        f"precision: computes in {config.dtype}, trained parameters float32"
        + (f", the teacher's {config.dtype}" if taught else "")
        + (", kernels of its layers int8" if config.teacher_weights == "int8" else "")
    )
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    yield f"devices: {mesh.size} x {mesh.devices.flat[0].device_kind}, mesh {axes}"


def self_test(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    plan: HeadPlan,
    *,
    name: str = "teacher",
) -> float:
    """The largest KL, in nats, of a model against itself on a few tokens of a rendered prompt: 0.

    Both sides are computed separately, as in training; the program is compiled once a model.

    Args:
        model, params: the model, layers stacked.
        tokenizer: that whose ids it reads.
        plan: how its LM head is read; with a mesh.
        name: of the model, for the error.

    Errors: DataError above LARGEST_SELF_KL_NATS, and where it is NaN.
    """
    mesh = plan.mesh
    assert mesh is not None
    ids = jnp.asarray(tokenizer.encode_prompt(PROMPT)[: SELF_TEST_TOKENS + 1], jnp.int32)
    rows, length = data_size(mesh) // owners(mesh), len(ids) - 1
    rollout = Rollout(
        tokens_bs=jnp.tile(ids, (rows, 1)),
        prompt_length_b=jnp.ones(rows, jnp.int32),
        response_length_b=jnp.full(rows, length, jnp.int32),
        sampler_logp_bt=jnp.zeros((rows, length)),
        truncated_b=jnp.zeros(rows, bool),
    )
    # the parameters are two arguments: of one, the compiler would compute one side only
    scores = jitted_score(model, model, plan, params, params, shard_batch(rollout, mesh))
    kls = rows_on_host((scores.forward_kl, scores.reverse_kl))
    largest = float(np.max(kls))  # on the host: XLA's maximum may drop a NaN
    if not largest <= LARGEST_SELF_KL_NATS:
        raise DataError(
            f"self-test: the {name} as its own student has KL {largest:g} nats, which must be 0;"
            f" its numbers can't be trusted on this backend ({jax.default_backend()}):"
            " check its weights, or try dtype float32 or another jax version"
        )
    return largest


def _about_prompts(own: Tokenizer, others: dict[str, Tokenizer], data: Data) -> list[str]:
    rendered, named = own.render(PROMPT), data.chat_template
    reads = "the student's" if data.teacher_prompt_template is None else "its prompts in that"
    lines = [f"prompt as rendered: {rendered!r}"]
    if named is not None:
        lines.append(
            f"chat template: {named} (data.chat_template), of student, teachers and evaluation; an"
            " export holds it"
        )
    for name, other in others.items():
        elsewhere = other.render(PROMPT)
        if elsewhere != rendered:
            lines.append(f"note: the {name}'s own template renders {elsewhere!r}; it reads {reads}")
        if named is None and own.template_folder == other.folder != own.folder:
            lines.append(f"note: the student has no chat template; the {name}'s is used")
        if named is None and other.template_folder != other.folder:
            lines.append(f"note: the {name} has no chat template; it reads the student's")
        if own.full_size == other.full_size == own.size:
            lines.append(f"tokenizers: student and {name} agree id by id ({own.size} tokens)")
        else:
            lines.append(
                f"tokenizers: student ({own.full_size} tokens) and {name} ({other.full_size}) agree"
                f" on the first {own.size} ids, which are in use"
            )
    return lines


def _about_stops(
    own: Tokenizer, others: dict[str, Tokenizer], stops: Stops, learns: bool
) -> list[str]:
    """The stop ids and what the templates put after an answer, with token texts.

    Args:
        own: the student's tokenizer, with the stop ids at which it draws.
        others: the teachers' by their names.
        stops: the policy.
        learns: whether anything is learned from a teacher.
    """
    lines = []
    for name, tokenizer in ({"student": own} | others).items():
        end = tokenizer.turn_end_id
        ends = "nothing" if end is None else _spelled(tokenizer, (end,))
        lines.append(
            f"stop tokens: {name} {_spelled(tokenizer, tokenizer.stop_ids)};"
            f" its template ends an answer with {ends}"
        )
        if end is not None and end not in tokenizer.stop_ids:
            lines.append(
                f"warning: the {name} does not stop at {ends}, where its template ends an answer;"
                " add the id to eos_token_id in its generation_config.json"
            )
        foreign = tuple(i for i in tokenizer.stop_ids if i not in own.stop_ids)
        if foreign and stops.policy == "raw" and learns:
            lines.append(
                f"warning: the {name} stops at {_spelled(tokenizer, foreign)}, where the student"
                " does not: with stops raw the student learns to write it as any other token and to"
                " go on, so responses run to the limit (docs/study.md); --stops merge makes one"
                " event of all stop tokens, in the loss and where the student draws"
            )
        elif {*tokenizer.stop_ids} != {*own.stop_ids}:
            lines.append(
                f"note: student and {name} stop at other tokens; each samples with its own"
            )
    meaning = {
        "raw": "stop tokens count like any other",
        "mask": f"tokens {list(stops.ids)} are left out of loss and statistics",
        "merge": f"tokens {list(stops.ids)} are one event, and the student draws up to any of them",
    }[stops.policy]
    return [*lines, f"stop policy: {stops.policy}, {meaning}"]


def _spelled(tokenizer: Tokenizer, ids: tuple[int, ...]) -> str:
    return ", ".join(f"{i} {tokenizer.token(i)!r}" for i in ids)


def _about_vocabulary(models: dict[str, Any], sizes: dict[str, int]) -> str:
    rows = {
        name: jax.eval_shape(model.head, params).weight_vd.shape[0]
        for name, (model, params) in models.items()
    }
    for name, count in rows.items():
        if count < sizes[name]:
            raise DataError(
                f"the {name} has {count} vocabulary rows, its tokenizer {sizes[name]} tokens;"
                " put the tokenizer that it was trained with into its folder"
            )
    shown = ", ".join(f"{name} {count}" for name, count in rows.items())
    size = " and ".join(map(str, dict.fromkeys(sizes.values())))
    return f"vocabulary: {size} tokens in use; rows beyond have no probability ({shown} rows)"


def _about_sizes(parts: Parts, models: dict[str, Any], heads: list[Params]) -> str:
    """Parameters, and the memory on a device that shapes tell: what is held, what a step adds, and
    what drawing does."""
    counts = {name: parameter_total(params) for name, (_, params) in models.items()}
    shown = ", ".join(f"{name} {count:,} parameters" for name, count in counts.items())
    held = _held(parts, models, heads)
    taught = len(models) > 1 or bool(heads) or parts.config.teacher == SELF
    phases = {"a step": _of_step(parts, taught)} | _of_draws(parts)
    total = sum(held.values()) + max(sum(own.values()) for own in phases.values())
    said = "; ".join(f"{name} adds {_mebibytes(own)}" for name, own in phases.items())
    return (
        f"size: {shown}; at least {total / 2**20:,.1f} MiB a device (held: {_mebibytes(held)};"
        f" {said}; what compiled programs take beside these comes on top: kdjax plan counts it)"
    )


def _mebibytes(parts: dict[str, float]) -> str:
    return ", ".join(f"{name} {count / 2**20:,.1f}" for name, count in parts.items())


def _held(parts: Parts, models: dict[str, Any], heads: list[Params]) -> dict[str, float]:
    """Bytes of training state and models."""
    student = parts.programs.student
    trained = 4.0 * device_bytes(student.state.params, 4)
    held = {"what is trained, its gradient and Adam moments": trained}
    if parts.config.self_decay:
        held["its average"] = trained / 4
    if student.frozen is not None:
        held["frozen student"] = device_bytes(student.frozen)
    held |= {
        name: device_bytes(params) for name, (_, params) in models.items() if name != "student"
    }
    return held | ({"teachers' LM heads": device_bytes(heads)} if heads else {})


def _of_step(parts: Parts, taught: bool) -> dict[str, float]:
    """Bytes that a step adds; taught: whether a teacher's logits are made beside the student's."""
    config, plan = parts.config, parts.programs.head
    axis, mesh = vocabulary_axis(plan.mesh), plan.mesh
    assert mesh is not None
    assert plan.vocabulary is not None
    rows, length = config.batch_size // config.micro_batches, config.curriculum.lengths[-1]
    width = config.data.max_prompt_tokens + length
    logits = 4 * (1 + taught) * plan.chunk * plan.vocabulary / (mesh.shape[axis] if axis else 1)
    return {
        f"activations of {rows} rows of {width} tokens": activation_bytes(
            parts.programs, rows, width
        ),
        f"head chunk of {plan.chunk} tokens": logits,
    }


def _of_draws(parts: Parts) -> dict[str, dict[str, float]]:
    """Bytes that each kind of draw adds: rollouts by whose they are, and the evaluation."""
    config, programs, table = parts.config, parts.programs, parts.table
    drawn = {m.prefix for m in table.methods if config.trajectories is None}
    drawn = drawn if config.rollouts.engine is None else set()
    test = parts.problems.test.size * config.evaluation.samples
    length, last = config.curriculum.lengths[-1], config.evaluation.max_new_tokens
    student = programs.student.sampler, programs.student.params, programs.mesh
    taught = next(iter(programs.teachers.values()))
    teacher = taught.sampler, taught.params, programs.teacher_mesh
    draws: dict[str, tuple[Any, int, int]] = {"the evaluation": (student, test, last)}
    if "student" in drawn:
        draws["a rollout"] = student, config.batch_size, length
    if "teacher" in drawn and taught.sampler is not None:
        most = max(len(rows_needed(parts, tag)) for tag in parts.teachers)
        draws["drawing the teacher's responses"] = teacher, min(CHUNK_ROWS, most), length
    found = {}
    for name, ((model, params, mesh), rows, response) in draws.items():
        data, theirs = config.data, model is taught.sampler
        prompt = data.teacher_prompt_tokens if theirs else data.max_prompt_tokens
        size = rows_at_once(model, mesh, config.rollouts, rows, prompt, response)
        slots, columns = levels(response)[-1].slots(prompt), parts.roles.student.tokenizer.size
        found[name] = sampling_bytes(model, params, mesh, config.dtype, size, slots, columns)
    return found
