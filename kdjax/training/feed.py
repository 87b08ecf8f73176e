"""The feed of a training step: its problems, their responses and rewards, as a sharded rollout."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.base import Batch, Params, Rollout, TeacherRows, TrainState
from kdjax.data import batches
from kdjax.data.alignment import teacher_rows
from kdjax.grading.rewards import Rewards, overlong_penalty
from kdjax.losses.grpo import have_signal
from kdjax.models.lora import join
from kdjax.rollouts.widths import longest, trim
from kdjax.runtime import processes
from kdjax.sharding import shard_batch
from kdjax.step.gate import FALL_BACK, last_decision, rollout_length
from kdjax.step.optimizer import gate_state
from kdjax.training.parts.build import Parts
from kdjax.training.parts.problems import ROLLOUT, encode, run_key
from kdjax.training.parts.programs import jitted_logp


def length_of(parts: Parts, state: TrainState) -> int:
    """The length limit of the next rollout's responses, in tokens."""
    return rollout_length(gate_state(state.opt_state), parts.config.curriculum.lengths)


def fell_back(state: TrainState) -> bool:
    """Whether the newest measurement of the gate returned to parameters of before."""
    return last_decision(gate_state(state.opt_state)) == FALL_BACK


def draw(parts: Parts, params: Params, number: int, length: int, staleness: int) -> Rollout:
    """The rollout of step `number`, sharded over the mesh: a pure function of its arguments.

    Args:
        parts: of the run.
        params: the student's trained parameters to draw with.
        number: of the step.
        length: limit of a response in tokens.
        staleness: updates since those parameters.
    """
    reads = sampler_params(parts, params, number)
    own = draw_own(parts, reads, number, length, staleness)
    return parts.profile.timed("input", on_mesh, parts, own)


def sampler_params(parts: Parts, params: Params, number: int) -> Params | None:
    """The sampler's parameters for step `number`; None where the student does not draw, or behind
    an engine, which is then given its weights if that is due."""
    if parts.table.at(number).prefix != "student" or parts.responses.stored:
        return None
    if parts.published is None:
        return parts.sampler_params(params)
    parts.profile.timed("publish", parts.published.publish, params, number)
    return None


def draw_own(
    parts: Parts, reads: Params | None, number: int, length: int, staleness: int
) -> Rollout:
    """This process's rows of the rollout of step `number`, scored where the teacher is served; no
    other process is needed.

    Args:
        parts, number, length, staleness: as in `draw`.
        reads: what `sampler_params` returns.
    """
    config, method = parts.config, parts.table.at(number)
    if method.rewarded:
        rollout = _rewarded(parts, reads, number, length)
    else:
        tag, indices = own_batch_at(parts, number)
        if method.prefix == "dataset":
            batches.require_solutions(parts.problems.source, indices)
        batch = _encode(parts, tag, indices, length)
        source = parts.responses.sources[method.prefix][tag]
        rollout = source(batch, reads, run_key(config.seed, ROLLOUT, number), length)
        rollout = _with_teacher_rows(parts, tag, indices, rollout)
    rollout = parts.profile.timed("teacher", parts.serve, rollout)
    if method.prefix != "student" or not (config.rollouts.ahead or parts.published):
        return rollout
    if parts.published is not None:
        since = range(parts.published.drawn_since(), number)
        staleness += sum(parts.table.at(step).updates for step in since)
    stale = jnp.full(len(rollout.tokens_bs), staleness, jnp.int32)
    rollout = rollout._replace(staleness_b=stale)
    older = config.rollouts.ahead or config.rollouts.engine_every > 1
    return rollout._replace(old_logp_bt=rollout.own_logp_bt) if older else rollout


def own_batch_at(parts: Parts, number: int, redraw: int = 0) -> tuple[str, list[int]]:
    """(tag, this process's rows of the source) of step `number`; of a rewarded step its problems,
    for each of which it draws a full group; at each redraw other problems."""
    config = parts.config
    tag, indices = parts.problems.batch_at(number, redraw)
    if parts.table.at(number).rewarded:
        indices = indices[: config.batch_size // config.rl.group_size]
    return tag, batches.rows_of_process(indices, jax.process_index(), jax.process_count())


def on_mesh(parts: Parts, own: Rollout) -> Rollout:
    """The rows of all processes as one rollout on the mesh, as wide as the longest of them."""
    widest = [max(column) for column in zip(*processes.gather(longest(own)), strict=True)]
    return shard_batch(trim(own, (widest[0], widest[1])), parts.mesh)


def with_old_policy(parts: Parts, params: Params, rollout: Rollout) -> Rollout:
    """The rollout with its log-probabilities under these trained parameters: the old policy of
    several updates over one rollout."""
    # by what is trained: an adapter merged and rounded is another function
    learner, whole = parts.programs.student.learner, join(parts.student.frozen, params)
    split = parts.config.micro_batches
    old = jitted_logp(learner, whole, rollout, micro_batches=split, plan=parts.programs.head)
    return rollout._replace(old_logp_bt=old)


def _rewarded(parts: Parts, reads: Params, number: int, length: int) -> Rollout:
    """Groups of responses with their advantages. In place of a group without signal, up to
    `rl.redraws` times, one of another problem is drawn with another key; where that does not help
    the first stays, with advantages of 0 whatever its lengths."""
    rl, key = parts.config.rl, run_key(parts.config.seed, ROLLOUT, number)
    tag, indices = own_batch_at(parts, number)
    problems = np.repeat(indices, rl.group_size)
    rollout = _attempt(parts, reads, (tag, problems, np.arange(len(problems))), key, length)
    draws = np.ones(len(problems), np.int32)
    for again in range(1, rl.redraws + 1):
        rows = np.flatnonzero(~_have_signal(rollout.reward_b, rl.group_size))
        if not len(rows):
            break
        draws[rows] += 1
        others = np.repeat(own_batch_at(parts, number, again)[1], rl.group_size)
        asked = tag, others[rows], rows
        fresh = _attempt(parts, reads, asked, jax.random.fold_in(key, again), length)
        useful = _have_signal(fresh.reward_b, rl.group_size)
        for old, drawn in zip(jax.tree.leaves(rollout), jax.tree.leaves(fresh), strict=True):
            old[rows[useful]] = drawn[useful]
    reward, lengths = rollout.reward_b, rollout.response_length_b
    penalty = overlong_penalty(lengths, length, rl.overlong_buffer_tokens)
    shaped = reward + rl.overlong_penalty * penalty
    signal = _have_signal(reward, rl.group_size)
    advantage = rl.advantage(shaped.reshape(-1, rl.group_size)).reshape(-1, 1)
    advantage = np.where(signal[:, None], advantage, 0.0)
    passed = (reward > 0).reshape(-1, rl.group_size)
    rate = np.repeat(passed.mean(axis=1), rl.group_size)
    tokens = np.broadcast_to(advantage, rollout.sampler_logp_bt.shape)
    return rollout._replace(
        advantage_bt=jnp.asarray(tokens, jnp.float32),
        reward_b=jnp.asarray(reward, jnp.float32),
        pass_rate_b=jnp.asarray(rate, jnp.float32),
        draws_b=draws,
        signal_b=jnp.asarray(signal),
    )


def _have_signal(reward_b: np.ndarray, group_size: int) -> np.ndarray:
    """The rows [B] of groups whose rewards differ."""
    return np.repeat(have_signal(reward_b.reshape(-1, group_size)), group_size)


def _attempt(
    parts: Parts, reads: Params, asked: tuple[str, np.ndarray, np.ndarray], key: Any, length: int
) -> Any:
    """Responses with their rewards (float64): a Rollout of writable host arrays.

    Args:
        parts, length: as in `draw`.
        reads: what `sampler_params` returns.
        asked: (tag, the problem of each row, the row's number in this process's share).
        key: of the draw.
    """
    (tag, problems, rows), config = asked, parts.config
    batch = _encode(parts, tag, problems, length)
    samples = problems * config.rl.group_size + rows % config.rl.group_size
    batch = batch._replace(row_b=samples.astype(np.int32))
    rollout = parts.responses.sources["student"][tag](batch, reads, key, length)
    rollout = jax.tree.map(np.array, _with_teacher_rows(parts, tag, problems, rollout))
    made = parts.profile.timed("verify", _rewards, parts, problems, rollout)
    return rollout._replace(reward_b=made.value_b, not_scored_b=made.not_scored_b)


def _rewards(parts: Parts, problems: np.ndarray, rollout: Rollout) -> Rewards:
    starts, counts = rollout.prompt_length_b, rollout.response_length_b
    own = parts.tokenizer
    texts = [
        own.graded_text(own.decode(tokens[start : start + count].tolist()))
        for tokens, start, count in zip(rollout.tokens_bs, starts, counts, strict=True)
    ]
    asked = [parts.problems.source.problem(int(index)) for index in problems]
    return parts.rewarder.of_all(asked, texts)


def _with_teacher_rows(parts: Parts, tag: str, indices: Any, rollout: Rollout) -> Rollout:
    """The rollout with the rows that a teacher of another tokenizer reads: each problem's prompt in
    its own template, and the response in its own tokens."""
    role, source = parts.teachers[tag].role, parts.problems.source
    if role is None or (shared := role.shared) is None:
        return rollout

    def rows() -> TeacherRows:
        tokens, starts, counts = (
            np.asarray(x)
            for x in (rollout.tokens_bs, rollout.prompt_length_b, rollout.response_length_b)
        )
        responses = [
            row[start : start + count].tolist()
            for row, start, count in zip(tokens, starts, counts, strict=True)
        ]
        prompts = batches.encode_prompts(source, [int(i) for i in indices], role.tokenizer)
        return teacher_rows(
            parts.tokenizer, role.tokenizer, shared, prompts, responses,
            width=LONGER * tokens.shape[1], length=rollout.sampler_logp_bt.shape[1],
        )  # fmt: skip

    return rollout._replace(teacher_rows=parts.profile.timed("input", rows))


LONGER = 2
"""A teacher's rows in its own tokens are at most so many times as long as the student's can be."""


def _encode(parts: Parts, tag: str, indices: Any, length: int) -> Batch:
    most, source = parts.config.data.max_prompt_tokens, parts.problems.source
    reads = parts.teachers[tag].programs.shape is not None  # else its outputs are stored, or none
    theirs = parts.problems.theirs.get(tag) if reads else None
    asked = source, parts.tokenizer, indices, most, length, theirs
    return parts.profile.timed("input", encode, *asked)
