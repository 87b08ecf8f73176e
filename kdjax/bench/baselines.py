"""What kdjax is compared with: the loss head dense and in checkpointed chunks."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kdjax.numerics import gather_last


def forward(logq: jax.Array, logp: jax.Array) -> jax.Array:
    """KL(teacher || student), from the definition."""
    return jnp.sum(jnp.exp(logp) * (logp - logq), axis=-1)


def reverse(logq: jax.Array, logp: jax.Array) -> jax.Array:
    """KL(student || teacher), from the definition."""
    return jnp.sum(jnp.exp(logq) * (logq - logp), axis=-1)


def dense(loss, hidden, weight_vd, teacher_hidden, teacher_weight_vd, targets, weights):
    """Autodiff of a loss of log-probabilities on whole logits: (total, statistics).

    Logits are float32 (float64 for float64 inputs), the statistics those of the loss head.
    """
    wide = jnp.promote_types(hidden.dtype, jnp.float32)

    def logp(states, weight):
        logits = jnp.einsum("nd,vd->nv", states, weight, preferred_element_type=wide)
        return jax.nn.log_softmax(logits, axis=-1)

    logq = logp(hidden, weight_vd)
    logp_teacher = jax.lax.stop_gradient(logp(teacher_hidden, teacher_weight_vd))
    statistics = {
        "forward_kl": forward(logq, logp_teacher),
        "reverse_kl": reverse(logq, logp_teacher),
        "student_entropy": -jnp.sum(jnp.exp(logq) * logq, -1),
        "teacher_entropy": -jnp.sum(jnp.exp(logp_teacher) * logp_teacher, -1),
        "student_logp": gather_last(logq, targets),
        "teacher_logp": gather_last(logp_teacher, targets),
        "top1_agreement": (logq.argmax(-1) == logp_teacher.argmax(-1)).astype(wide),
    }
    total = jnp.sum(weights * loss(logq, logp_teacher))
    return total, jax.lax.stop_gradient(statistics)


def checkpointed(
    loss, chunk: int, hidden, weight_vd, teacher_hidden, teacher_weight_vd, targets, weights
):
    """`dense` in a scan over chunks under `jax.checkpoint`: logits are formed again in backward."""

    def split(x):
        return x.reshape(-1, chunk, *x.shape[1:])

    @jax.checkpoint
    def body(total, piece):
        states, theirs, label, weight = piece
        more, statistics = dense(loss, states, weight_vd, theirs, teacher_weight_vd, label, weight)
        return total + more, statistics

    start = jnp.zeros((), jnp.promote_types(hidden.dtype, jnp.float32))
    pieces = jax.tree.map(split, (hidden, teacher_hidden, targets, weights))
    total, statistics = jax.lax.scan(body, start, pieces)
    return total, jax.tree.map(lambda x: x.reshape(-1), statistics)


def sampled_token(hidden, weight_vd, targets, weights):
    """Cross-entropy to the sampled token on whole student logits: what distillation without the
    vocabulary costs."""
    logits = jnp.einsum("nd,vd->nv", hidden, weight_vd, preferred_element_type=jnp.float32)
    return -jnp.sum(weights * gather_last(jax.nn.log_softmax(logits, axis=-1), targets))
