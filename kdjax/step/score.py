"""Scores of a rollout, and the total to minimise: both models read the same tokens, once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kdjax.base import (
    Model,
    Objective,
    Params,
    Reduction,
    Rollout,
    Scores,
    TokenLoss,
    TopK,
    WeightedSum,
)
from kdjax.losses.combinators import closed_form, terms
from kdjax.losses.composition import describe
from kdjax.losses.kl import forward_kl, reverse_kl
from kdjax.losses.objectives import (
    divergence,
    forward_divergence,
    negative_log_likelihood,
    reverse_divergence,
)
from kdjax.losses.reductions import reads_scores, sequence_mean, token_mean
from kdjax.losses.topk import buckets, residual, top_k
from kdjax.numerics import LMHead, gather_last, log_probs
from kdjax.sharding import (
    collect_rows,
    micro_batched,
    own_rows,
    vocabulary_axis,
    whole_batch,
    whole_rows,
)
from kdjax.step.closed_forms import Comparison, compare, is_top
from kdjax.step.head import Teacher, TeacherStates, TokenFunction, head_loss
from kdjax.step.stops import RAW, Stops, kept, merged
from kdjax.step.vocabulary import Foreign, side_by_side


class HeadPlan(NamedTuple):
    """How the LM heads are read: `chunk`, `vocabulary` and `mesh` as in `head_loss`; `stops` is
    the stop-token policy."""

    chunk: int = 1024
    vocabulary: int | None = None
    mesh: Mesh | None = None
    stops: Stops = RAW

    def for_head(self) -> dict[str, Any]:
        """The keyword arguments of `head_loss`."""
        return {"chunk": self.chunk, "vocabulary": self.vocabulary, "mesh": self.mesh}


PLAIN_HEAD = HeadPlan()


def scored_loss(
    student: Model,
    student_params: Params,
    teacher: Model | None,
    teacher_params: Params | None,
    rollout: Rollout,
    *,
    token_loss: TokenLoss = forward_kl,
    objective: Objective = divergence,
    reduction: Reduction = sequence_mean,
    plan: HeadPlan = PLAIN_HEAD,
) -> tuple[WeightedSum, Scores]:
    """(the objective summed by the reduction's weights, Scores [B, T] of every response token).

    Position t of the response is predicted from the token before it, so t = 0 reads the last prompt
    token, and nothing after the stop token is scored. The gradient flows to the student's
    parameters through the loss's total alone; Scores are constants, 0 outside the mask.

    A reduction that reads the Scores is given those of a pass of its own over the LM heads, without
    a gradient; then those tokens alone are read whose weight is not 0. With a share s of them the
    heads cost V (2 D + 2 D_teacher) + s V (6 D + 2 D_teacher) FLOPs a token.

    Args:
        student, student_params: the model that is trained, layers stacked.
        teacher, teacher_params: the model to learn from, or None. Where the rollout has the
            teacher's states, only its head is used; where it has its top-k, neither.
        rollout: B rows of T response positions.
        token_loss: the divergence at a token.
        objective: what is minimised at a token.
        reduction: the weights [B, T] of the tokens.
        plan: how the LM heads are read.
    """
    targets, mask = _trained_tokens(rollout, plan.stops)
    known = {"targets": targets, "sampler_logp": rollout.sampler_logp_bt}
    before = {name: getattr(rollout, f"{name}_bt") for name in KNOWN_BEFORE}
    known |= {name: value for name, value in before.items() if value is not None}
    theirs = _guide(teacher, teacher_params, rollout)
    function = token_function(token_loss, objective, vocabulary_axis(plan.mesh), stops=plan.stops)

    def read(states, head, weights, mask) -> tuple[jax.Array, Scores]:
        return head_loss(function, states, head, theirs, known, weights, mask, **plan.for_head())

    own = response_states(student, student_params, rollout), student.head(student_params)
    if not reads_scores(reduction):
        weights = reduction(mask, rollout)
        total, scores = read(*own, weights, mask)
    else:
        _, scores = read(*jax.lax.stop_gradient(own), jnp.zeros(mask.shape), mask)
        weights = jax.lax.stop_gradient(reduction(mask, rollout, scores))
        total, _ = read(*own, weights, mask & (weights != 0))
    return WeightedSum(total, jnp.sum(weights)), scores


def _trained_tokens(rollout: Rollout, stops: Stops) -> tuple[jax.Array, jax.Array]:
    """(the response tokens, the mask of those that are trained on), [B, T] each."""
    steps = jnp.arange(rollout.sampler_logp_bt.shape[1])[None]
    targets = jnp.take_along_axis(rollout.tokens_bs, _response_slots(rollout), axis=1)
    mask = kept(stops, targets, steps < rollout.response_length_b[:, None])
    if rollout.teacher_rows is not None:
        mask &= rollout.teacher_rows.slot_bt >= 0
    return targets, mask


def _guide(teacher: Model | None, teacher_params: Params | None, rollout: Rollout) -> Teacher:
    """The teacher as the loss head takes it, a constant: its top-k or states of the rollout, or
    states that it computes now."""
    if rollout.teacher_top_k_bt is not None or teacher is None:
        return rollout.teacher_top_k_bt
    constant = jax.lax.stop_gradient(teacher_params)
    states = rollout.teacher_states_btd
    if states is None:
        states = teacher_states(teacher, constant, rollout)
    head = teacher.head(constant)
    return TeacherStates(states, *((head,) if isinstance(head, LMHead) else head))


def response_states(model: Model, params: Params, rollout: Rollout) -> jax.Array:
    """A model's last hidden state before each response token, [B, T, D]."""
    states = model.hidden(params, rollout.tokens_bs)
    return jnp.take_along_axis(states, (_response_slots(rollout) - 1)[..., None], axis=1)


def teacher_states(model: Model, params: Params, rollout: Rollout) -> jax.Array:
    """The teacher's last hidden state before each response token, [B, T, D], by the rows that it
    reads; zeros where these have none for the token."""
    rows = rollout.teacher_rows
    if rows is None:
        return response_states(model, params, rollout)
    states = model.hidden(params, rows.tokens_bs)
    found = jnp.take_along_axis(states, jnp.maximum(rows.slot_bt, 0)[..., None], axis=1)
    return jnp.where(rows.slot_bt[..., None] < 0, 0.0, found).astype(states.dtype)


def response_top_k(
    model: Model,
    params: Params,
    rollout: Rollout,
    *,
    k: int,
    plan: HeadPlan = PLAIN_HEAD,
) -> TopK:
    """A teacher's k most probable tokens at each response token, [B, T, k], and that token's own
    log-probability; zeros beyond the response. [B, T, V] is not made.

    Args:
        model, params: the model, layers stacked.
        rollout: B rows of T response positions.
        k: tokens, of those that exist (`HeadPlan.vocabulary`).
        plan: how its LM head is read.
    """
    axis = vocabulary_axis(plan.mesh)

    def best(logits, teacher, targets):
        logp = log_probs(whole_rows(logits, axis))
        own = top_k(logp, k)._replace(sampled_logp=gather_last(logp, own_rows(targets, axis)))
        return jnp.zeros(logits.shape[0]), jax.tree.map(lambda x: collect_rows(x, axis), own)

    steps = jnp.arange(rollout.sampler_logp_bt.shape[1])[None]
    mask = steps < rollout.response_length_b[:, None]
    targets = jnp.take_along_axis(rollout.tokens_bs, _response_slots(rollout), axis=1)
    states, head = teacher_states(model, params, rollout), model.head(params)
    weights = jnp.zeros(mask.shape)
    return head_loss(best, states, head, None, targets, weights, mask, **plan.for_head())[1]


def _response_slots(rollout: Rollout) -> jax.Array:
    """The position in its row of each response token, int [B, T]; past the response, one within
    the row."""
    steps = jnp.arange(rollout.sampler_logp_bt.shape[1])[None]
    last = rollout.tokens_bs.shape[1] - 1
    return jnp.minimum(rollout.prompt_length_b[:, None] + steps, last)


def score(
    student: Model,
    student_params: Params,
    teacher: Model | None,
    teacher_params: Params | None,
    rollout: Rollout,
    token_loss: TokenLoss = forward_kl,
    *,
    plan: HeadPlan = PLAIN_HEAD,
) -> Scores:
    """The Scores of a rollout alone, [B, T], for evaluation: no gradient is made.

    Its KLs and entropies follow the plan's stop policy, as the loss's do.

    Args:
        student, student_params, teacher, teacher_params, rollout: as in `scored_loss`.
        token_loss: what `Scores.divergence` is.
        plan: how the LM heads are read.
    """
    return scored_loss(
        student,
        student_params,
        teacher,
        teacher_params,
        rollout,
        token_loss=token_loss,
        objective=negative_log_likelihood,
        reduction=token_mean,
        plan=plan,
    )[1]


def sampled_logp(
    model: Model,
    params: Params,
    rollout: Rollout,
    *,
    micro_batches: int = 1,
    plan: HeadPlan = PLAIN_HEAD,
) -> jax.Array:
    """A model's log-probability of each response token, [B, T] in nats, 0 beyond the response: of
    an old policy or a reference model, which are not trained.

    Args:
        model, params: the model, layers stacked.
        rollout: B rows of T response positions.
        micro_batches: into how many B is split; they are read one after another, as in the step.
        plan: how its LM head is read.
    """

    def of(rows: Rollout) -> jax.Array:
        return score(model, params, None, None, rows, plan=plan).student_logp

    if micro_batches == 1:
        return of(rollout)
    pieces = jax.tree.map(lambda x: micro_batched(x, micro_batches), rollout)
    return whole_batch(jax.lax.map(of, pieces))


def token_function(
    token_loss: TokenLoss, objective: Objective, axis: str | None = None, *, stops: Stops = RAW
) -> TokenFunction:
    """The function that the loss head computes at a token: the objective, with `Scores` as its
    statistics.

    KLs made of `forward_kl` and `reverse_kl` take their closed forms (`closed_form`); any other
    token loss is differentiated automatically, down to the chunk's logits. Against a `TopK`
    teacher, divergences compare k + 1 buckets (so each is at most the full one); the teacher's
    entropy is then not known, and None, and so is its log-probability of the response token where
    the `TopK` does not have it. Under policy merge of `stops` all Scores are of merged
    distributions (`kdjax.step.stops.merged`). Against `Foreign` logits they are of the tokens that
    both vocabularies have and of the events of `side_by_side`, but for the student's
    log-probability, which is over its whole vocabulary.
    """

    def function(logits, teacher, extra) -> tuple[jax.Array, Scores]:
        more: dict[str, Any] = {}
        whole, targets, shares = logits, extra["targets"], None
        if isinstance(teacher, Foreign):
            logits, teacher, targets, shares = side_by_side(logits, teacher, targets)
        logits, teacher, targets = merged(stops, logits, teacher, targets, axis)
        if isinstance(teacher, TopK):
            comparison, against, more = _against_top_k(logits, teacher, targets, axis)
        else:
            comparison = compare(logits, teacher, targets, axis=axis)
            against = functools.partial(_divergence, logits, teacher, comparison, axis)
        if shares is not None:
            whole, _, at = merged(stops, whole, None, extra["targets"], axis)
            comparison = comparison._replace(student_logp=compare(whole, None, at).student_logp)
        scores = Scores(
            sampler_logp=extra["sampler_logp"],
            **{name: extra.get(name) for name in KNOWN_BEFORE},
            mask=jnp.ones(targets.shape, bool),
            divergence=None if teacher is None else against(token_loss),
            teacher_shared=shares,
            **comparison._asdict() | more,
        )
        parts = {describe(part): part(scores) for part in _parts(objective)}
        if teacher is not None:
            parts |= {describe(part): against(part) for part in _parts(token_loss)}
        return objective(scores), jax.lax.stop_gradient(scores._replace(parts=parts or None))

    return function


def _parts(loss: Callable) -> list[Callable]:
    """The terms of a loss that is a sum, without those that are among the `Scores` already."""
    summed = terms(loss)
    return [one for one in summed if one not in SCORED] if len(summed) > 1 else []


KNOWN_BEFORE = ("reference_logp", "old_logp", "advantage")
"""The `Scores` that a rollout may have."""

SCORED = (
    forward_kl,
    reverse_kl,
    divergence,
    negative_log_likelihood,
    forward_divergence,
    reverse_divergence,
)


def _divergence(student, teacher, plain: Comparison, axis, token_loss: TokenLoss) -> jax.Array:
    """The token loss [...] between two logits [..., V].

    Args:
        student, teacher: their logits, of this device's columns.
        plain: their `compare`, which gives KLs at temperature 1.
        axis: the vocabulary's mesh axis, if it is sharded.
        token_loss: the loss.
    """
    closed = closed_form(token_loss)
    if closed is None:
        whole = (log_probs(whole_rows(logits, axis)) for logits in (student, teacher))
        return collect_rows(token_loss(*whole), axis)

    def at(temperature: float) -> Comparison:
        if isinstance(temperature, int | float) and temperature == 1:
            return plain
        nowhere = jnp.zeros(student.shape[:-1], jnp.int32)
        return compare(student / temperature, teacher / temperature, nowhere, axis=axis)

    return closed(at)


def _against_top_k(logits, teacher: TopK, targets, axis):
    """(Comparison, a function token loss -> divergence, the `Scores` that the sampled token's
    log-probability gives): the student's statistics are over the vocabulary, all others over the
    buckets."""
    whole = whole_rows(logits, axis)
    own = jax.tree.map(lambda x: own_rows(x, axis), teacher)
    both = buckets(whole, own)
    coarse = compare(*both, jnp.zeros(whole.shape[:-1], jnp.int32))
    best, own_targets = gather_last(own.ids, own.logp.argmax(-1)), own_rows(targets, axis)
    top = whole.max(-1)
    agrees = is_top((gather_last(whole, best) - top)[..., None], top)[..., 0].astype(whole.dtype)
    comparison = compare(logits, None, targets, axis=axis)._replace(
        forward_kl=collect_rows(coarse.forward_kl, axis),
        reverse_kl=collect_rows(coarse.reverse_kl, axis),
        top1_agreement=collect_rows(agrees, axis),
        teacher_top1=collect_rows((best == own_targets).astype(whole.dtype), axis),
    )
    more = {}
    if teacher.sampled_logp is not None:
        rest = jax.lax.stop_gradient(residual(whole, own, own_rows(targets, axis)))
        more = {"teacher_logp": teacher.sampled_logp, "residual": collect_rows(rest, axis)}

    def against(token_loss: TokenLoss) -> jax.Array:
        return collect_rows(_divergence(*both, coarse, None, token_loss), axis)

    return comparison, against, more
