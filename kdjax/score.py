"""Rollout + token loss -> Scores: both models read the same tokens, once each."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kdjax.base import Model, Params, Rollout, Scores, TokenLoss
from kdjax.head import token_statistics
from kdjax.kl import forward_kl


def score(
    student: Model,
    student_params: Params,
    teacher: Model | None,
    teacher_params: Params | None,
    rollout: Rollout,
    token_loss: TokenLoss = forward_kl,
    *,
    chunk: int = 16,
) -> Scores:
    """Scores of every response token, [B, T]. The teacher is a constant: no gradient reaches it.

    Position t of the response is predicted from the token before it, so t = 0 reads the last prompt
    token, and nothing after the stop token is scored.
    """
    length = rollout.sampler_logp_bt.shape[1]
    steps = jnp.arange(length)[None]
    mask = steps < rollout.response_length_b[:, None]
    last = rollout.tokens_bs.shape[1] - 1
    here = jnp.minimum(rollout.prompt_length_b[:, None] + steps, last)
    targets = jnp.where(mask, jnp.take_along_axis(rollout.tokens_bs, here, axis=1), 0)

    def response_states(model: Model, params: Params) -> jax.Array:
        states = model.hidden(params, rollout.tokens_bs)
        states = jnp.take_along_axis(states, (here - 1)[..., None], axis=1)
        return jnp.where(mask[..., None], states, 0)  # keeps padding out of the loss's gradient

    teacher_states = teacher_head = None
    if teacher is not None:
        constant = jax.lax.stop_gradient(teacher_params)
        teacher_states, teacher_head = response_states(teacher, constant), teacher.head(constant)
    statistics = token_statistics(
        response_states(student, student_params),
        student.head(student_params),
        teacher_states,
        teacher_head,
        targets,
        token_loss,
        chunk=chunk,
    )
    sampler_logp = jnp.where(mask, rollout.sampler_logp_bt, 0.0)
    return Scores(sampler_logp=sampler_logp, mask=mask, **statistics)
