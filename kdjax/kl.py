"""Token losses: how two next-token distributions are compared. [..., V], [..., V] -> [...], in nats.

The argument order is (student, teacher) everywhere; q is the student's distribution, p the teacher's.
Every public function of this module is a `TokenLoss`, usable by name in a config and on the command line.
"""

from __future__ import annotations

import jax

from kdjax.numerics import expectation


def forward_kl(student_logp: jax.Array, teacher_logp: jax.Array) -> jax.Array:
    """KL(teacher || student) = sum_v p (log p - log q), in nats. [..., V], [..., V] -> [...]

    Its gradient with respect to the student's logits is q - p: cross-entropy with the teacher's soft
    targets (arXiv 2605.16826, the forward-KL column of the 2x2). It asks the student to cover every mode
    of the teacher. Zero-probability teacher entries (padded vocabulary) add exactly 0.

    >>> import jax.numpy as jnp
    >>> uniform, certain = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([1.0, 0.0]))
    >>> round(float(forward_kl(uniform, certain)), 4)
    0.6931
    """
    return expectation(teacher_logp, teacher_logp - student_logp)


def reverse_kl(student_logp: jax.Array, teacher_logp: jax.Array) -> jax.Array:
    """KL(student || teacher) = sum_v q (log q - log p), in nats. [..., V], [..., V] -> [...]

    Its gradient with respect to the student's logits is q_i ((log q_i - log p_i) - KL): REINFORCE with the
    dense reward log p - log q, summed over the vocabulary (arXiv 2605.16826, the reverse-KL column). It
    asks the student to put its mass where the teacher has some. Infinite where the student has mass on
    an entry that the teacher excludes.

    >>> import jax.numpy as jnp
    >>> uniform, skewed = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.75, 0.25]))
    >>> round(float(reverse_kl(uniform, skewed)), 4)
    0.1438
    """
    return expectation(student_logp, student_logp - teacher_logp)
