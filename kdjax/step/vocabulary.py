"""Two vocabularies side by side: the tokens that both have, and one event for the rest of each.

The teacher's LM head is arranged once, its rows in the student's order, so that a chunk's logits
lie side by side without a gather, and [tokens, V] never exists.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.base import Array
from kdjax.numerics import LMHead


class Event(NamedTuple):
    """Tokens that count as one: bool [V] of the student's columns, bool [W] of the teacher's, and
    the student's column that stands for them, int32 []."""

    student_v: Array
    teacher_w: Array
    column: Array


class Shared(NamedTuple):
    """How a teacher's W columns lie beside the student's V. Column v < V is the student's token v
    in both; from V on are the teacher's stop tokens, where they are one event, and those that the
    student has not.

    shared_v: bool [V], both have the token.
    kept_w: bool [W], the teacher's tokens that are shared, or are its stop.
    own_w: bool [W], those that only it has.
    stop: the stop tokens of both, where each model has its own.
    rest: what only one has, on each side; None where one of them has all of the other's. The
        other's own tokens are then left out, and its probabilities are of the rest of it.
    """

    shared_v: Array
    kept_w: Array
    own_w: Array
    stop: Event | None = None
    rest: Event | None = None


class SharedHead(NamedTuple):
    """A teacher's LM head with its rows in the student's order, [W, D], and what they are."""

    head: LMHead
    shared: Shared


class Foreign(NamedTuple):
    """A teacher's logits [..., W] of such a head."""

    logits: jax.Array
    shared: Shared


def lay_out(
    teacher_of_v: np.ndarray, size: int, stops: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
) -> tuple[np.ndarray, Shared | None]:
    """(int32 [W], the teacher's token of each column, -1 for none; what they are, or None where
    both have the same tokens).

    Args:
        teacher_of_v: int [V], the teacher's id of each of the student's tokens; -1 for none.
        size: tokens of the teacher.
        stops: (the student's, the teacher's) ids of the event stop, if it is one.

    >>> columns, shared = lay_out(np.array([2, -1, 0]), 4)
    >>> columns.tolist(), shared.shared_v.tolist(), shared.own_w.tolist()
    ([2, -1, 0, 1, 3], [True, False, True], [False, False, False, True, True])
    """
    count = len(teacher_of_v)
    stop_v = np.isin(np.arange(count), stops[0])
    shared_v = (teacher_of_v >= 0) & ~stop_v
    named = [*teacher_of_v[shared_v], *stops[1]]
    own = np.setdiff1d(np.arange(size), named)
    beyond = np.array([*stops[1], *own], np.int32)
    columns = np.concatenate([np.where(shared_v, teacher_of_v, -1), beyond]).astype(np.int32)
    if shared_v.all() and not len(beyond):
        return columns, None
    numbers = np.arange(len(columns))
    stop_w = (numbers >= count) & (numbers < count + len(stops[1]))
    own_w = numbers >= count + len(stops[1])
    shared = Shared(shared_v, np.pad(shared_v, (0, len(beyond))) | stop_w, own_w)
    if stops[0]:
        shared = shared._replace(stop=Event(stop_v, stop_w, np.asarray(stops[0][0], np.int32)))
    own_v = ~shared_v & ~stop_v
    if own_v.any() and own_w.any():
        rest = Event(own_v, own_w, np.asarray(np.flatnonzero(own_v)[0], np.int32))
        shared = shared._replace(rest=rest)
    return columns, shared


def arranged(head: LMHead, columns_w: jax.Array) -> LMHead:
    """The LM head with row columns_w[w] at w, and zeros where that is -1: [V', D] -> [W, D].

    >>> arranged(LMHead(jnp.array([[1.0], [2.0]])), jnp.array([1, -1, 0])).weight_vd[:, 0].tolist()
    [2.0, 0.0, 1.0]
    """
    rows = head.weight_vd[jnp.maximum(columns_w, 0)]
    rows = jnp.where(columns_w[:, None] < 0, 0, rows).astype(head.weight_vd.dtype)
    return LMHead(rows, head.scale, head.softcap)


def side_by_side(
    student: jax.Array, teacher: Foreign, targets: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(the student's logits, the teacher's, targets, the teacher's probability of what is shared):
    [..., V], [..., W] and [...] -> [..., V] twice, and [...] twice.

    An event's column holds the logsumexp of its tokens, and their other columns -inf, on both
    sides. A teacher's column without a token is -inf.
    """
    logits, shared = teacher
    events = [event for event in (shared.stop, shared.rest) if event is not None]

    def joined(logits, members):
        width = shared.shared_v.shape[0]
        made = jnp.where(shared.shared_v, logits[..., :width], -jnp.inf)
        column = jax.lax.broadcasted_iota(jnp.int32, made.shape, made.ndim - 1)
        for event, member in zip(events, members, strict=True):
            total = _log_sum(logits, member)[..., None]
            made = jnp.where(column == event.column, total, made)
        return made

    kept = _log_sum(logits, shared.kept_w) - _log_sum(logits, shared.kept_w | shared.own_w)
    for event in events:
        targets = jnp.where(jnp.asarray(event.student_v)[targets], event.column, targets)
    own = joined(student, [event.student_v for event in events])
    theirs = joined(logits, [event.teacher_w for event in events])
    return own, theirs, targets, jnp.exp(kept)


def _log_sum(logits: jax.Array, member) -> jax.Array:
    return jax.nn.logsumexp(jnp.where(member, logits, -jnp.inf), axis=-1)
