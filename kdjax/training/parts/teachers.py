"""Teachers and reference: the loaded weights of models that are not trained."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kdjax import models
from kdjax.base import Batch, Params, Rollout
from kdjax.config.schema import Config
from kdjax.config.teachers import SELF
from kdjax.data.alignment import SharedVocabulary
from kdjax.data.batches import Source
from kdjax.data.teacher_prompts import fields_of
from kdjax.errors import ConfigError, DataError, EngineError
from kdjax.models.lora import Student
from kdjax.numerics import LMHead
from kdjax.rollouts.engine_scores import Scorer, open_scorer
from kdjax.sharding import (
    data_size,
    head_sharding,
    owners,
    replicated,
    rows_on_host,
    shard_batch,
)
from kdjax.step.score import response_top_k
from kdjax.step.vocabulary import SharedHead, arranged, lay_out
from kdjax.training.parts.problems import Problems, encode
from kdjax.training.parts.programs import (
    Headed,
    Programs,
    TeacherPrograms,
    jitted_logp,
    jitted_score,
)
from kdjax.training.parts.roles import Role, Roles, title
from kdjax.training.parts.shapes import TEACHER_WEIGHTS


class Teacher(NamedTuple):
    """One teacher: its role, its programs, its weights, and the part of the weights that the step
    takes (given, of `TeacherPrograms.give`). Without a teacher all but the programs are None."""

    role: Role | None
    programs: TeacherPrograms
    params: Params | None = None
    given: Params | None = None


def load_teachers(
    roles: Roles, programs: Programs, dtype: str, teacher_weights: str
) -> dict[str, Teacher]:
    """Tag -> its teacher, in the compute dtype, stored as `teacher_weights` says; a model that
    several tags name is loaded once. Where stored outputs replace the model, only its LM head is
    loaded, if they are states, or nothing."""
    loaded = {}
    for name, role in roles.by_model().items():
        own, params, given = programs.teachers[name], None, None
        if role is not None and own.model is not None:
            hold, mesh = TEACHER_WEIGHTS[teacher_weights], programs.teacher_mesh
            _, params = models.load(role.folder, mesh, params_dtype=jnp.dtype(dtype), hold=hold)
            given = own.give(params)
            if role.shared is not None:
                given = _rearranged(given, role.shared, programs.mesh)
        elif role is not None and own.guide is not None:
            given = models.read_head(role.folder, role.shape, jnp.dtype(dtype), programs.mesh)
        loaded[name] = Teacher(role, own, params, given)
    return {tag: loaded[role.name if role else None] for tag, role in roles.teachers.items()}


def _rearranged(given: Headed | LMHead, vocabulary: SharedVocabulary, mesh: Mesh) -> Params:
    """The same with the LM head's rows in the student's order."""
    head: Any = given.head if isinstance(given, Headed) else given
    columns, shared = lay_out(vocabulary.teacher_of_v, vocabulary.size, vocabulary.stops)
    if not np.array_equal(columns, np.arange(len(columns))):
        place = head_sharding(mesh, (len(columns), head.weight_vd.shape[1]))
        head = jax.jit(arranged, out_shardings=place)(head, columns)
    if shared is not None:
        head = SharedHead(head, jax.device_put(shared, replicated(mesh)))
    return given._replace(head=head) if isinstance(given, Headed) else head


def open_served(config: Config, roles: Roles, live: bool) -> Callable[[Rollout], Rollout]:
    """serve(rollout of this process's rows) -> the rollout with the top k of the teacher that an
    engine scores as; the rollout as it is where none does, or its outputs were stored (not live).

    Errors: as `scorer_of`.
    """
    role = next(iter(roles.teachers.values()))
    if config.served.url is None or role is None or not live:
        return lambda rollout: rollout
    score = scorer_of(config, role, config.served.top_k)
    return lambda rollout: rollout._replace(teacher_top_k_bt=score(rollout))


def scorer_of(config: Config, role: Role, k: int) -> Scorer:
    """The engine of `config.served` as the teacher of this role, once its context holds the longest
    row and it has scored a token: one that lists its models may end there, or refuse k.

    Errors: ConfigError, EngineError.
    """
    served, rollouts = config.served, config.rollouts
    assert served.url is not None
    if k > role.tokenizer.size:
        raise ConfigError(
            f"served.top_k {k} is over the vocabulary of {role.tokenizer.size} tokens; ask for"
            " fewer"
        )
    score = open_scorer(
        served.url,
        served.model or role.name,
        k=k,
        vocabulary=role.tokenizer.size,
        speaks=served.speaks,
        longest=config.data.max_prompt_tokens + config.curriculum.lengths[-1] + 1,
        at_once=rollouts.engine_at_once,
        timeout_s=rollouts.engine_timeout_seconds,
        retries=rollouts.engine_retries,
    )
    one, two = jnp.ones(1, jnp.int32), jnp.zeros((1, 2), jnp.int32)
    try:
        score(Rollout(two, one, one, jnp.zeros((1, 1)), one > 1))
    except EngineError as error:
        raise EngineError(
            f"{error} (asked for one token first; docs/engines.md names what an engine refuses)"
        ) from None
    return score


LARGEST_GAP_NATS = 0.5
"""Between an engine's log-probabilities and those of the weights that it is said to serve: a wider
dtype, other kernels and int8 stay below; other weights don't."""


def both_ways(
    config: Config,
    roles: Roles,
    programs: Programs,
    student: Student,
    source: Source,
    serve: Callable[[Rollout], Rollout],
) -> str:
    """What scoring by the engine changes, in words: the weights are loaded to score the same. Every
    token of the first prompts but the first is a response here.

    Args:
        config: with `served`, whose check_rows is rounded up to all devices.
        roles, programs: of the run.
        student: as it begins.
        source: of the prompts.
        serve: as of `open_served`.

    Errors: DataError where the engine serves other weights.
    """
    role, mesh, k = roles.teachers[""], programs.mesh, config.served.top_k
    assert role is not None  # validate: one is named
    each = data_size(mesh) // owners(mesh)
    rows = np.arange(-(-config.served.check_rows // each) * each) % source.size
    batch = encode(source, roles.student.tokenizer, rows, config.data.max_prompt_tokens, 1)
    rollout = shard_batch(serve(as_responses(batch)), mesh)
    dtype, plan = jnp.dtype(config.dtype), programs.head
    model = models.build(role.shape, dtype=dtype, impl=config.attention, mesh=mesh)
    _, params = models.load(role.folder, mesh, params_dtype=dtype)
    own = jax.jit(functools.partial(response_top_k, model, k=k, plan=plan))(params, rollout)
    begun = student.whole(student.trained)
    learner, bare = programs.student.model, rollout._replace(teacher_top_k_bt=None)
    full = jitted_score(learner, model, plan, begun, params, bare)
    coarse = jitted_score(learner, None, plan, begun, None, rollout)
    top: Any = rows_on_host(rollout.teacher_top_k_bt)
    own, full, coarse = rows_on_host(own), rows_on_host(full), rows_on_host(coarse)
    gap = np.abs(top.sampled_logp - own.sampled_logp)[full.mask].max()
    if not gap <= LARGEST_GAP_NATS:
        raise DataError(
            f"served: the engine at {config.served.url} serves another model than {role.name}: its"
            f" log p differs by up to {gap:.3g} nats on {full.mask.sum()} tokens of prompts"
        )
    same = (np.sort(top.ids) == np.sort(own.ids)).all(-1)[full.mask].mean()
    kls = [[x.forward_kl[x.mask].mean(), x.reverse_kl[x.mask].mean()] for x in (coarse, full)]
    return (
        f"served: the top {k} of {full.mask.sum()} tokens of {len(full.mask)} prompts are the"
        f" weights' own at {same:.1%}, log p within {gap:.2g} nats; student to teacher forward KL"
        f" {kls[0][0]:.5g} of {kls[1][0]:.5g}, reverse {kls[0][1]:.5g} of {kls[1][1]:.5g}"
    ).replace("%", " %")


def as_responses(batch: Batch) -> Rollout:
    """Prompts as rows whose every token but the first is a response: text to score that is there
    before anything is drawn."""
    rows = len(batch.prompt_length_b)
    return Rollout(
        tokens_bs=jnp.asarray(batch.prompt_bp),
        prompt_length_b=jnp.ones(rows, jnp.int32),
        response_length_b=jnp.asarray(batch.prompt_length_b) - 1,
        sampler_logp_bt=jnp.zeros((rows, batch.prompt_bp.shape[1] - 1)),
        truncated_b=jnp.zeros(rows, bool),
    )


def open_reference(
    role: Role | None, programs: Programs, dtype: str, micro_batches: int
) -> Callable[[Rollout], Rollout]:
    """refer(rollout) -> the rollout with the reference's log-probability of each response token,
    under the run's stop policy; the rollout as it is where there is no reference."""
    if role is None or programs.reference is None:
        return lambda rollout: rollout
    model = programs.reference.model
    _, params = models.load(role.folder, programs.mesh, params_dtype=jnp.dtype(dtype))

    def refer(rollout: Rollout) -> Rollout:
        read = jitted_logp(model, params, rollout, micro_batches=micro_batches, plan=programs.head)
        return rollout._replace(reference_logp_bt=read)

    return refer


def about_what_teachers_read(config: Config, problems: Problems) -> Iterator[str]:
    """What teachers read that the student does not, and which student teaches itself, in words."""
    for tag, theirs in problems.theirs.items():
        first = theirs.source.problem(int(problems.groups[tag][0])).prompt
        shown = theirs.tokenizer.render(first)[:SHOWN]
        yield f"prompt of the {title(tag)} as rendered, of the first problem: {shown!r}"
    told = problems.source.problem(0).teacher_prompt is not None
    if told and "teacher_prompt" not in fields_of(config.data.teacher_prompt_template or ""):
        yield (
            "note: problems have a teacher_prompt, and nobody reads it; put {teacher_prompt} into"
            " data.teacher_prompt_template"
        )
    if config.teacher == SELF:
        which = {0.0: "as it is at each update", 1.0: "as it is at the start"}
        average = f"averaged over updates with decay {config.self_decay}"
        yield f"teacher: the student itself, {which.get(config.self_decay, average)}"


SHOWN = 400
"""Characters of a teacher's prompt that are shown."""
