"""The prefix axis: whose sequences the student is trained on.

`from_dataset`, `from_student`, `from_teacher` and `from_trajectories` are, or return, a
`PrefixSource`: (batch, student parameters, key, max_new_tokens) -> Rollout, where the parameters
are as the student's sampler reads them.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.base import (
    Array,
    Batch,
    Key,
    Params,
    PrefixSource,
    Rollout,
    Sampler,
    Samples,
    TeacherRows,
    Trajectories,
)


def from_dataset(batch: Batch, params: Params, key: Key, max_new_tokens: int) -> Rollout:
    """The dataset's own worked responses, cut at max_new_tokens; no model is run."""
    del params, key
    return assemble_samples(batch, dataset_samples(batch, max_new_tokens))


def dataset_samples(batch: Batch, max_new_tokens: int) -> Samples:
    """The dataset's own worked responses as samples; no model drew them, so logp_bt and entropy_bt
    are None and sampler_logp_bt is 0."""
    response = batch.response_bt[:, :max_new_tokens]
    length = jnp.minimum(batch.response_length_b, max_new_tokens)
    last = jnp.take_along_axis(response, jnp.maximum(length - 1, 0)[:, None], axis=1)[:, 0]
    truncated = batch.response_truncated_b | (batch.response_length_b > length)
    logp = jnp.zeros(response.shape, jnp.float32)
    return Samples(response, length, None, logp, None, jnp.where(truncated, -1, last))


def from_student(generate: Sampler) -> PrefixSource:
    """The student's own responses, drawn with its present parameters (on-policy)."""

    def draw(batch: Batch, params: Params, key: Key, max_new_tokens: int) -> Rollout:
        samples = generate(params, batch, key, max_new_tokens)
        own = samples.logp_bt, samples.entropy_bt
        logp, entropy = (None if x is None else jnp.asarray(x) for x in own)
        rollout = assemble_samples(batch, samples)
        return rollout._replace(own_logp_bt=logp, entropy_bt=entropy)

    return draw


def from_teacher(read: Callable[[np.ndarray], Samples]) -> PrefixSource:
    """The teacher's responses (off-policy), drawn once and read by row number.

    A response drawn at a longer limit and cut is distributed as one drawn at the shorter limit.
    """
    return from_trajectories(lambda rows: Trajectories(read(rows)))


def from_trajectories(read: Callable[[np.ndarray], Trajectories]) -> PrefixSource:
    """Stored responses of any source, read by row number, with the teacher's outputs on them where
    these are stored."""

    def look_up(batch: Batch, params: Params, key: Key, max_new_tokens: int) -> Rollout:
        del params, key
        kept = read(np.asarray(batch.row_b))
        theirs = jax.tree.map(lambda x: x[:, :max_new_tokens], (kept.states_btd, kept.top_k_bt))
        rollout = assemble_samples(batch, cut(kept.samples, max_new_tokens))
        return rollout._replace(teacher_states_btd=theirs[0], teacher_top_k_bt=theirs[1])

    return look_up


def cut(samples: Samples, max_new_tokens: int) -> Samples:
    """The same responses under a shorter limit; those over it are truncated."""
    shorter = jax.tree.map(lambda x: x[:, :max_new_tokens] if x.ndim == 2 else x, samples)
    over = samples.length_b > max_new_tokens
    return shorter._replace(
        length_b=jnp.minimum(samples.length_b, max_new_tokens),
        stop_b=jnp.where(over, -1, samples.stop_b),
    )


def assemble_samples(batch: Batch, samples: Samples) -> Rollout:
    """Prompts and drawn responses as one Rollout."""
    return assemble(
        batch, samples.tokens_bt, samples.length_b, samples.sampler_logp_bt, samples.truncated_b
    )


def assemble(
    batch: Batch,
    response_bt: Array,
    length_b: Array,
    sampler_logp_bt: Array,
    truncated_b: Array,
) -> Rollout:
    """A Rollout: rows of prompt, response, padding, without a gap; padding is id 0, always masked.
    Where the teacher reads other prompts, its rows are the same responses behind those.

    Args:
        batch: the prompts.
        response_bt: int32 [B, T], right-padded.
        length_b: int32 [B], with the stop token.
        sampler_logp_bt: float32 [B, T], as in `Rollout`.
        truncated_b: bool [B].
    """
    theirs = batch.teacher_prompts
    return Rollout(
        tokens_bs=_joined(batch.prompt_bp, batch.prompt_length_b, response_bt, length_b),
        prompt_length_b=jnp.asarray(batch.prompt_length_b),
        response_length_b=jnp.asarray(length_b),
        sampler_logp_bt=jnp.asarray(sampler_logp_bt),
        truncated_b=jnp.asarray(truncated_b),
        teacher_rows=None if theirs is None else _rows(*theirs, response_bt, length_b),
    )


def _rows(prompt_bp: Array, prompt_length_b: Array, response_bt: Array, length_b: Array):
    """The responses behind other prompts; each token's slot is that of the token before it."""
    steps = jnp.arange(response_bt.shape[1], dtype=jnp.int32)[None]
    slot = jnp.where(steps < length_b[:, None], prompt_length_b[:, None] - 1 + steps, -1)
    return TeacherRows(_joined(prompt_bp, prompt_length_b, response_bt, length_b), slot)


def _joined(
    prompt_bp: Array, prompt_length_b: Array, response_bt: Array, length_b: Array
) -> jax.Array:
    """int32 [B, P + T]: prompt, response, padding, without a gap."""
    width, length = prompt_bp.shape[1], response_bt.shape[1]
    both = jnp.concatenate([prompt_bp, response_bt], axis=1)
    slot, start = jnp.arange(width + length)[None], prompt_length_b[:, None]
    source = jnp.where(slot < start, slot, slot - start + width)
    tokens = jnp.take_along_axis(both, jnp.minimum(source, width + length - 1), axis=1)
    return jnp.where(slot < start + length_b[:, None], tokens, 0)
