"""Closed forms: two next-token distributions compared by two sweeps over their logits.

One sweep for the maxima and one for a handful of sums give both KLs, both entropies, the target
token's log-probabilities and top-1 agreement; the gradient by the student's logits has a closed
form in those sums, for any objective made of them (docs/loss_head.md has the derivation).
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from kdjax.numerics import gather_last, primal_values


class Comparison(NamedTuple):
    """Statistics of next-token distributions, [...], in nats; None without a teacher."""

    student_logp: jax.Array
    student_entropy: jax.Array
    teacher_logp: jax.Array | None = None
    teacher_entropy: jax.Array | None = None
    forward_kl: jax.Array | None = None
    reverse_kl: jax.Array | None = None
    top1_agreement: jax.Array | None = None
    teacher_top1: jax.Array | None = None


class _Normalizers(NamedTuple):
    """The numbers that turn logits [..., V] into log-probabilities; each [..., 1]."""

    student_top: jax.Array
    student_log_sum: jax.Array  # of e^(logit - top)
    teacher_top: jax.Array | None = None
    teacher_log_sum: jax.Array | None = None
    log_ratio: jax.Array | None = None  # teacher_log_sum - student_log_sum, 0 for equal logits


def compare(
    student_logits: jax.Array,
    teacher_logits: jax.Array | None,
    targets: jax.Array,
    *,
    axis: str | None = None,
) -> Comparison:
    """The `Comparison` of logits [..., V] and [..., V], with targets int [...] -> fields [...].

    With q the student's softmax and p the teacher's, the gradients by the student's logits are

        forward KL   q - p                         reverse KL   q ((log q - log p) - KL)
        log q(k)     onehot_k - q                  entropy H    -q (log q + H)

    (arXiv 2605.16826 for the two KLs); those of top-1 have none, and nothing flows to the teacher.
    Not twice differentiable. Equal logits give KL and gradient exactly 0. Entries of -inf on one
    side are excluded by it: they add nothing where the other excludes them too (padding).
    Top-1 agrees where some entry is a maximum of both, to rounding, and teacher_top1 is 1 where the
    target is one of the teacher's. `axis` is the mesh axis that
    the vocabulary is sharded over inside `shard_map`, in equal pieces in order; then targets count
    over all pieces, and the collectives are one pmax of [2, ...] and one psum of [10, ...].

    >>> comparison = compare(jnp.zeros((1, 2)), jnp.log(jnp.array([[0.75, 0.25]])), jnp.array([1]))
    >>> round(float(comparison.reverse_kl[0]), 4)
    0.1438
    """
    return _compare(student_logits, teacher_logits, targets, axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _compare(student_logits, teacher_logits, targets, axis):
    return _sweep(student_logits, teacher_logits, targets, axis)[0]


def _compare_fwd(student, teacher, labels, axis):
    student_logits, teacher_logits, targets = primal_values((student, teacher, labels))
    comparison, normalizers = _sweep(student_logits, teacher_logits, targets, axis)
    return comparison, (student_logits, teacher_logits, targets, normalizers, comparison)


def _sweep(student_logits, teacher_logits, targets, axis) -> tuple[Comparison, _Normalizers]:
    if teacher_logits is None:
        return _sweep_alone(student_logits, targets, axis)
    tops = jnp.stack([student_logits.max(-1), teacher_logits.max(-1)])
    student_top, teacher_top = tops if axis is None else jax.lax.pmax(tops, axis)
    u, v = student_logits - student_top[..., None], teacher_logits - teacher_top[..., None]
    student, teacher, difference = _unnormalized(u, v)
    student_sum, teacher_sum, by_difference, a, b, student_u, teacher_v, hits, label_u, label_v = (
        _sums(
            [
                student,
                teacher,
                difference,
                jnp.where(_is_normal(u), student * (u - v), 0.0),
                jnp.where(_is_normal(v), teacher * (u - v), 0.0),
                jnp.where(_is_normal(u), student * u, 0.0),
                jnp.where(_is_normal(v), teacher * v, 0.0),
                jnp.where(is_top(u, student_top) & is_top(v, teacher_top), 1.0, 0.0),
            ],
            [
                _at_target(student_logits, student_top, targets, axis),
                _at_target(teacher_logits, teacher_top, targets, axis),
            ],
            axis,
        )
    )
    student_log_sum, teacher_log_sum = jnp.log(student_sum), jnp.log(teacher_sum)
    excess = by_difference / student_sum
    log_ratio = jnp.where(
        jnp.abs(excess) < 0.5,
        jnp.log1p(jnp.maximum(excess, -0.5)),
        teacher_log_sum - student_log_sum,
    )
    comparison = Comparison(
        student_logp=label_u - student_log_sum,
        student_entropy=student_log_sum - student_u / student_sum,
        teacher_logp=label_v - teacher_log_sum,
        teacher_entropy=teacher_log_sum - teacher_v / teacher_sum,
        # rounding may leave a KL of -1e-11; it is not negative
        forward_kl=jnp.maximum(-b / teacher_sum - log_ratio, 0.0),
        reverse_kl=jnp.maximum(a / student_sum + log_ratio, 0.0),
        top1_agreement=(hits > 0).astype(u.dtype),
        teacher_top1=is_top(label_v[..., None], teacher_top)[..., 0].astype(u.dtype),
    )
    normalizers = (student_top, student_log_sum, teacher_top, teacher_log_sum, log_ratio)
    return comparison, _Normalizers(*(x[..., None] for x in normalizers))


def _sweep_alone(student_logits, targets, axis) -> tuple[Comparison, _Normalizers]:
    top = student_logits.max(-1)
    top = top if axis is None else jax.lax.pmax(top, axis)
    u = student_logits - top[..., None]
    weight = jnp.exp(u)
    total, weighted_u, label_u = _sums(
        [weight, jnp.where(_is_normal(u), weight * u, 0.0)],
        [_at_target(student_logits, top, targets, axis)],
        axis,
    )
    log_sum = jnp.log(total)
    comparison = Comparison(label_u - log_sum, log_sum - weighted_u / total)
    return comparison, _Normalizers(top[..., None], log_sum[..., None])


def _unnormalized(u, v) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(e^u, e^v, e^v - e^u). The difference comes from v - u: two exponentials of one number may be
    rounded differently, and equal logits must differ by exactly 0."""
    student, teacher = jnp.exp(u), jnp.exp(v)
    return student, teacher, jnp.where(_is_normal(u), student * jnp.expm1(v - u), teacher)


def _is_normal(logarithm: jax.Array) -> jax.Array:
    """True where e^x is a normal number; elsewhere 0 times an infinite logarithm is avoided."""
    return logarithm >= math.log(jnp.finfo(logarithm.dtype).tiny)


def is_top(below: jax.Array, top: jax.Array) -> jax.Array:
    """True where logits - top is 0, to the rounding by which two fusions of one product differ."""
    unit = jnp.finfo(top.dtype).eps
    return below >= -8 * unit * (1 + jnp.abs(top))[..., None]


def _sums(terms: list[jax.Array], ready: list[jax.Array], axis) -> list[jax.Array]:
    """Sums of terms [..., V] over the vocabulary, and of `ready` [...] over the mesh axis alone."""
    pieces = [term.sum(-1) for term in terms] + ready
    return pieces if axis is None else list(jax.lax.psum(jnp.stack(pieces), axis))


def _at_target(logits: jax.Array, top: jax.Array, targets: jax.Array, axis) -> jax.Array:
    """logits [..., V] - top at the target [...]; 0 where another shard of the vocabulary has it.

    It reads the logits, which are in memory: reading logits - top would write that array too."""
    index, width = _local(targets, logits.shape[-1], axis), logits.shape[-1]
    found = gather_last(logits, jnp.clip(index, 0, width - 1)) - top
    return jnp.where((index >= 0) & (index < width), found, 0.0)


def _local(targets: jax.Array, width: int, axis) -> jax.Array:
    return targets if axis is None else targets - jax.lax.axis_index(axis) * width


def _compare_bwd(axis, residual, cotangents):
    """The closed-form gradient; terms that the loss does not use cost nothing."""
    student_logits, teacher_logits, targets, normalizers, comparison = residual
    u = student_logits - normalizers.student_top
    logq = u - normalizers.student_log_sum
    q, possible = jnp.exp(logq), _is_normal(logq)
    factor, outside = jnp.zeros_like(q), jnp.zeros_like(q)

    def given(name: str):
        cotangent = getattr(cotangents, name)
        absent = cotangent is None or isinstance(cotangent, SymbolicZero)
        return None if absent else cotangent[..., None]

    if teacher_logits is not None:
        v = teacher_logits - normalizers.teacher_top
        log_ratio = u - v + normalizers.log_ratio
        if (by_forward := given("forward_kl")) is not None:
            factor -= by_forward * jnp.expm1(-log_ratio)
            outside -= by_forward * jnp.exp(v - normalizers.teacher_log_sum)
        if (by_reverse := given("reverse_kl")) is not None:
            factor += by_reverse * (log_ratio - comparison.reverse_kl[..., None])
    if (by_entropy := given("student_entropy")) is not None:
        factor -= by_entropy * (logq + comparison.student_entropy[..., None])
    if (by_logp := given("student_logp")) is not None:
        factor -= by_logp
    gradient = jnp.where(possible, q * factor, outside)
    if by_logp is not None:
        columns = jax.lax.broadcasted_iota(targets.dtype, q.shape, q.ndim - 1)
        hit = columns == _local(targets, q.shape[-1], axis)[..., None]
        gradient += jnp.where(hit, by_logp, 0.0)
    return gradient, None, None


_compare.defvjp(_compare_fwd, _compare_bwd, symbolic_zeros=True)
