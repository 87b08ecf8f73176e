"""The training step: one pure function from (state, teacher, rollout) to (state, metrics)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from kdjax.base import (
    Model,
    Objective,
    Params,
    Reduction,
    Rollout,
    Scores,
    TokenLoss,
    TrainState,
    WeightedSum,
)
from kdjax.errors import ConfigError
from kdjax.losses.composition import at_progress, schedules
from kdjax.losses.kl import forward_kl
from kdjax.losses.objectives import divergence
from kdjax.losses.reductions import reduce, sequence_mean, token_mean
from kdjax.losses.topk import TAIL_FLOOR
from kdjax.losses.trial import require_per_token
from kdjax.models.lora import join
from kdjax.sharding import micro_batched, replicated
from kdjax.step.optimizer import decision
from kdjax.step.score import PLAIN_HEAD, HeadPlan, scored_loss

LEAST_TAIL = math.log(TAIL_FLOOR) * (1 - 1e-6)
"""The largest log-probability of a tail that may have been raised to the floor, to rounding."""

Metrics = dict[str, jax.Array]
Step = Callable[..., tuple[TrainState, Metrics]]


def init_state(params: Params, optimizer: optax.GradientTransformationExtraArgs) -> TrainState:
    """Step 0: the student's parameters as float32 masters, and a fresh optimizer state."""
    masters = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), params)
    return TrainState(jnp.int32(0), masters, optimizer.init(masters))


def abstract_state(params: Params, optimizer: Any, mesh: Mesh | None = None) -> TrainState:
    """Shapes of the state that `init_state` makes of parameters of these shapes.

    On a mesh, moments are sharded like their parameters, and everything else is replicated.
    """
    whole = None if mesh is None else replicated(mesh)

    def like(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    state = jax.eval_shape(lambda params: init_state(params, optimizer), params)
    opt_state = optax.tree_map_params(
        optimizer,
        lambda leaf, parameter: like(leaf, getattr(parameter, "sharding", None)),
        state.opt_state,
        params,
        transform_non_params=lambda leaf: like(leaf, whole),
    )
    masters = jax.tree.map(
        lambda leaf, parameter: like(leaf, getattr(parameter, "sharding", None)),
        state.params,
        params,
    )
    return TrainState(like(state.step, whole), masters, opt_state)


def make_step(
    student: Model,
    teacher: Model | None,
    optimizer: optax.GradientTransformationExtraArgs,
    *,
    token_loss: TokenLoss = forward_kl,
    objective: Objective = divergence,
    reduction: Reduction = sequence_mean,
    plan: HeadPlan = PLAIN_HEAD,
    micro_batches: int = 1,
    steps: int | None = None,
    of_state: Callable[[TrainState, Params], Params] | None = None,
) -> Step:
    """step(state, teacher_params, rollout, heldout_entropy_nats=nan, frozen=None) -> (state,
    metrics).

    Pure: jit it. The loss is sum(weight * objective) / sum(weight) over the full batch, however
    many micro-batches are accumulated. Metrics are token means over the batch (nats, or shares in
    [0, 1]), lengths in tokens; stop policy mask leaves stop tokens out of them too. The present
    values of schedules, and the terms of losses that are sums, are metrics by their text.

    frozen: parameters of the student that are not trained (of any dtype): the student reads their
    union with `state.params`; gradients and optimizer state are of the latter alone.

    Args:
        student: the model to train.
        teacher: the model to learn from; None without one (plain SFT, RL).
        optimizer: its updates may contain the entropy gate; what its guard decided is the metric
            skipped_in_a_row (`make_optimizer`).
        token_loss, objective, reduction: as in `scored_loss`.
        plan: how the LM heads are read; with its mesh wherever the batch is sharded.
        micro_batches: how many a batch is split into; they are accumulated.
        steps: of the run, over which schedules of token loss and objective go.
        of_state: (state, frozen) -> the teacher's parameters, where the student teaches itself;
            the step is then given None as its teacher_params.

    Errors: ConfigError for an objective whose value at a token depends on other tokens.
    """
    require_per_token(objective)
    if not steps and (schedules(token_loss) or schedules(objective)):
        raise ConfigError("make_step: a loss has a schedule; give `steps`, those of the whole run")
    moving = schedules(token_loss) | schedules(objective)
    loss_of = functools.partial(scored_loss, reduction=reduction, plan=plan)

    def totals(params: Params, frozen: Params, teacher_params: Params, progress, rollout: Rollout):
        loss, scores = loss_of(
            student,
            join(frozen, params),
            teacher,
            teacher_params,
            rollout,
            token_loss=at_progress(token_loss, progress),
            objective=at_progress(objective, progress),
        )
        if plan.stops.policy == "merge":  # of other distributions than the sampler's
            rollout = rollout._replace(own_logp_bt=None)
        return loss.total, {"loss": loss, **_summaries(scores, rollout)}

    gradient = jax.grad(totals, has_aux=True)

    def step(
        state: TrainState,
        teacher_params: Params,
        rollout: Rollout,
        heldout_entropy_nats=jnp.nan,
        frozen: Params = None,
    ):
        if of_state is not None:
            teacher_params = of_state(state, frozen)
        progress = state.step / (steps or 1)
        gradient_of = functools.partial(gradient, state.params, frozen, teacher_params, progress)
        total_gradient, sums = _accumulated(gradient_of, rollout, micro_batches)
        weight = jnp.where(sums["loss"].weight == 0, 1.0, sums["loss"].weight)
        grads = jax.tree.map(lambda g: g / weight, total_gradient)
        metrics = _with_entropy_excess({name: s.mean() for name, s in sums.items()})
        new = _updated(optimizer, state, grads, metrics["loss"], heldout_entropy_nats)
        metrics |= {text: schedule.at(progress) for text, schedule in moving.items()}
        metrics |= {
            "gradient_norm": optax.global_norm(grads),
            "response_tokens": sums["student_entropy"].weight,
        } | decision(new.opt_state)
        return new, metrics

    return step


def _updated(optimizer, state: TrainState, grads: Params, loss, heldout_entropy_nats) -> TrainState:
    """The state after one update.

    Args:
        optimizer: as in `make_step`.
        state: before it.
        grads: a tree like `state.params`.
        loss: scalar.
        heldout_entropy_nats: scalar, NaN where it was not measured.
    """
    updates, opt_state = optimizer.update(
        grads,
        state.opt_state,
        state.params,
        loss=loss,
        heldout_entropy_nats=heldout_entropy_nats,
    )
    return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state)


def _accumulated(function: Callable[[Rollout], Any], rollout: Rollout, micro_batches: int) -> Any:
    """function(micro-batch), accumulated over all micro-batches, one after another."""
    if micro_batches == 1:
        return function(rollout)
    pieces = jax.tree.map(lambda x: micro_batched(x, micro_batches), rollout)
    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], pieces))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def body(carry, piece):
        return jax.tree.map(jnp.add, carry, function(piece)), None

    return jax.lax.scan(body, zeros, pieces)[0]


def _with_entropy_excess(metrics: Metrics) -> Metrics:
    """Metrics with entropy_excess, H(student) - H(teacher) - KL(teacher || student) in nats a
    token, where the three are known.

    It is minus the derivative of forward KL by the log of an inverse temperature of the student's
    logits: 0 where forward KL stands still (arXiv 2610.03529), over 0 where a sharper student had a
    lower one.
    """
    names = ("student_entropy", "teacher_entropy", "forward_kl")
    if not all(name in metrics for name in names):
        return metrics
    student, teacher, kl = (metrics[name] for name in names)
    return metrics | {"entropy_excess": student - teacher - kl}


def _summaries(scores: Scores, rollout: Rollout) -> dict[str, WeightedSum]:
    """Token means of every statistic, and sequence means of length and truncation."""
    weights = token_mean(scores.mask)
    statistics = scores._asdict() | (scores.parts or {})
    token_level = {
        name: reduce(value, scores.mask, weights)
        for name, value in statistics.items()
        if value is not None and name not in ("mask", "parts", "divergence")
    }
    rows = jnp.float32(rollout.truncated_b.shape[0])
    if rollout.own_logp_bt is not None:
        gap = jnp.abs(scores.student_logp - rollout.own_logp_bt)
        token_level["sampler_gap"] = reduce(gap, scores.mask, weights)
        # mean squares show tails that means hide, and add up over micro-batches as a maximum can't
        token_level["sampler_gap_squared"] = reduce(gap**2, scores.mask, weights)
    if rollout.teacher_top_k_bt is not None:
        tail = rollout.teacher_top_k_bt.tail_logp
        token_level["teacher_tail"] = reduce(jnp.exp(tail), scores.mask, weights)
        least = (tail <= LEAST_TAIL).astype(jnp.float32)
        token_level["teacher_tail_floored"] = reduce(least, scores.mask, weights)
    if rollout.old_logp_bt is not None:
        moved = jnp.abs(scores.student_logp - rollout.old_logp_bt)
        token_level["policy_drift"] = reduce(moved, scores.mask, weights)
    for name in ("staleness", "reward", "draws", "not_scored"):
        value = getattr(rollout, f"{name}_b")
        if value is not None:
            token_level[name] = WeightedSum(jnp.sum(value.astype(jnp.float32)), rows)
    if rollout.teacher_rows is not None:
        steps = jnp.arange(scores.mask.shape[1])[None] < rollout.response_length_b[:, None]
        found = jnp.sum(steps & (rollout.teacher_rows.slot_bt >= 0))
        token_level["aligned"] = WeightedSum(found.astype(jnp.float32), jnp.sum(steps) * 1.0)
    if rollout.signal_b is not None:
        signal = rollout.signal_b.astype(jnp.float32)
        token_level["reward_signal"] = WeightedSum(jnp.sum(signal), rows)
    return token_level | {
        "response_length": WeightedSum(
            jnp.sum(rollout.response_length_b.astype(jnp.float32)), rows
        ),
        "truncated": WeightedSum(jnp.sum(rollout.truncated_b.astype(jnp.float32)), rows),
        "empty": WeightedSum(jnp.sum((rollout.response_length_b == 0).astype(jnp.float32)), rows),
    }
