"""The LM heads and the token loss together, in chunks: [B, T, V] never exists.

A chunk is a few response positions of every row, so the batch axis stays dealt over the devices (a
scan over flattened tokens would make every data shard compute every chunk). Logits are formed again
in the backward pass.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kdjax.base import ConfigError, TokenLoss
from kdjax.kl import forward_kl, reverse_kl
from kdjax.numerics import entropy, gather_last, log_probs, project


def token_statistics(
    student_hidden_btd: jax.Array,
    student_head_vd: jax.Array,
    teacher_hidden_btd: jax.Array | None,
    teacher_head_vd: jax.Array | None,
    targets_bt: jax.Array,
    token_loss: TokenLoss,
    *,
    chunk: int = 16,
) -> dict[str, jax.Array]:
    """Log-probabilities, entropies and divergences, [B, T] float32, by the names of `Scores`.

    Without a teacher only the student's own. The gradient flows to the student's hidden states and
    head through `divergence` and `student_logp` alone; everything else is a statistic.
    """
    if chunk < 1:
        raise ConfigError(f"head chunk must be at least 1 position, got {chunk}")
    length = targets_bt.shape[1]
    pieces = -(-length // chunk)

    def split(x):
        x = jnp.pad(x, [(0, 0), (0, pieces * chunk - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], pieces, chunk, *x.shape[2:]), 1, 0)

    def merge(x):
        return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], pieces * chunk)[:, :length]

    @jax.checkpoint
    def body(carry, piece):
        student_hidden, teacher_hidden, targets = piece
        student_logp = log_probs(project(student_hidden, student_head_vd))
        own = _student_statistics(student_logp, targets)
        if teacher_head_vd is None:
            return carry, own
        teacher_logp = jax.lax.stop_gradient(log_probs(project(teacher_hidden, teacher_head_vd)))
        return carry, own | _teacher_statistics(student_logp, teacher_logp, targets, token_loss)

    teacher_pieces = None if teacher_hidden_btd is None else split(teacher_hidden_btd)
    _, statistics = jax.lax.scan(
        body, None, (split(student_hidden_btd), teacher_pieces, split(targets_bt))
    )
    return jax.tree.map(merge, statistics)


def _student_statistics(student_logp: jax.Array, targets: jax.Array) -> dict[str, jax.Array]:
    return {
        "student_logp": gather_last(student_logp, targets),
        "student_entropy": entropy(jax.lax.stop_gradient(student_logp)),
    }


def _teacher_statistics(
    student_logp, teacher_logp, targets, token_loss: TokenLoss
) -> dict[str, jax.Array]:
    constant = jax.lax.stop_gradient(student_logp)
    return {
        "divergence": token_loss(student_logp, teacher_logp),
        "teacher_logp": gather_last(teacher_logp, targets),
        "teacher_entropy": entropy(teacher_logp),
        "forward_kl": forward_kl(constant, teacher_logp),
        "reverse_kl": reverse_kl(constant, teacher_logp),
        "top1_agreement": (constant.argmax(-1) == teacher_logp.argmax(-1)).astype(jnp.float32),
    }
