"""The loss head: LM heads and loss in one pass over chunks of tokens; [tokens, V] never exists.

A chunk's logits are formed once; while they are alive the loss, its statistics and the chunk's part
of the gradient are made (docs/loss_head.md). Only the two head products are differentiated by
hand; between them is any per-token function of logits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import Mesh, PartitionSpec

from kdjax.base import TopK
from kdjax.errors import ConfigError
from kdjax.numerics import LMHead, is_perturbed, primal_values, product, project, shape_logits
from kdjax.sharding import collected_gradient, rows_spec, vocabulary_axis
from kdjax.step.vocabulary import Foreign, Shared

TokenFunction = Callable[[jax.Array, Any, Any], tuple[jax.Array, Any]]
"""(student_logits [c, V], teacher, auxiliaries) -> (loss [c], statistics, a pytree of [c]).

The teacher is logits [c, V], a `TopK` of [c, k], `Foreign` logits, or None. Each token's results
depend on that token alone. On a mesh with a vocabulary axis, logits are this device's columns.
"""


class TeacherStates(NamedTuple):
    """A teacher by its last hidden states [..., D], computed now or stored, and its LM head; any
    width D. shared: what the head's rows are (`SharedHead`), where its vocabulary is another."""

    hidden: jax.Array
    head: LMHead
    shared: Shared | None = None


class TeacherLogits(NamedTuple):
    """A teacher by the user's own logits [..., V] (which are then in memory in full)."""

    logits: jax.Array


CACHED_LOGITS = 2**19
"""Logits of one array that a CPU reads at a time, 2 MiB of float32."""

Teacher = TeacherStates | TeacherLogits | TopK | None


def head_loss(
    function: TokenFunction,
    hidden: jax.Array,
    head: LMHead,
    teacher: Teacher,
    auxiliaries: Any,
    weights: jax.Array,
    mask: jax.Array,
    *,
    chunk: int = 1024,
    vocabulary: int | None = None,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, Any]:
    """(sum over the mask of weight * loss, statistics of [...]).

    With G = weight * dloss/dlogits, the gradients are dH = G W and dW = G^T H; they are made in the
    forward pass, so differentiating costs V (6 D + 2 D_teacher) FLOPs a token and recomputes
    nothing. Only gradients that are asked for are made: a frozen head costs 4 D in place of 6 D,
    undifferentiated calls 2 D. Logits, softmax and the sum of dW are float32 whatever the inputs (G
    takes the hidden states' dtype). Only total is differentiable, by `hidden` and `head`, once:
    statistics and the teacher are constants.

    Args:
        function: the loss and statistics of a chunk's logits.
        hidden: [..., D], the student's last hidden states.
        head: the student's LM head, weight [V, D].
        teacher: the same tokens' states [..., D], logits [..., V] or top-k [..., k]; or None.
        auxiliaries: a pytree of [...], passed to `function` chunk by chunk.
        weights: float [...].
        mask: bool [...]. Tokens outside it cost nothing, and their statistics are 0.
        chunk: tokens (of one device) whose logits are alive; any size gives the same to rounding.
        vocabulary: columns that exist (by default those that both heads have); the rest are
            padding, with zero probability and zero gradient on both sides.
        mesh: shards the first axis over data and fsdp, and head rows over tensor. Without it,
            sharded arrays are gathered by XLA: right values, wasted devices.

    Errors: ConfigError for a chunk below 1, or heads that can't be sharded over the mesh.

    >>> from kdjax.step.closed_forms import compare
    >>> def cross_entropy(logits, teacher, target):
    ...     comparison = compare(logits, teacher, target)
    ...     return -comparison.student_logp, comparison.student_entropy
    >>> h, w, target = jnp.ones((6, 4)), jnp.ones((10, 4)), jnp.zeros(6, jnp.int32)
    >>> loss = lambda h: head_loss(cross_entropy, h, LMHead(w), None, target, jnp.ones(6),
    ...                            jnp.ones(6, bool), chunk=4)[0]
    >>> (round(float(loss(h)), 3), jax.grad(loss)(h).shape)
    (13.816, (6, 4))
    """
    if chunk < 1:
        raise ConfigError(f"head chunk must be at least 1 token, got {chunk}")
    rows = _check_rows(head, teacher, mesh)
    if vocabulary is not None and not 1 <= vocabulary <= rows:
        raise ConfigError(f"vocabulary must be in 1..{rows} (the heads' rows), got {vocabulary}")
    settings = _Settings(function, vocabulary or rows, chunk, vocabulary_axis(mesh))
    run = _pass if mesh is None else functools.partial(_sharded_pass, mesh)

    @jax.custom_vjp
    def loss(hidden, head, constants):
        made = run(settings, _Asked(), hidden, head, constants)
        return made.total, made.statistics

    def forward(*primals):
        hidden, head, constants = primal_values(primals)
        asked = _Asked(*map(is_perturbed, primals[:2]))
        made = run(settings, asked, hidden, head, constants)

        def narrowed(by, primal):
            return None if by is None else jax.tree.map(lambda g, x: g.astype(x.dtype), by, primal)

        gradients = (narrowed(made.by_hidden, hidden), narrowed(made.by_head, head))
        return (made.total, made.statistics), gradients

    def backward(gradients, cotangents):
        by_total, by_statistics = cotangents
        leaves = jax.tree.leaves(by_statistics, is_leaf=lambda x: isinstance(x, SymbolicZero))
        if not all(isinstance(leaf, SymbolicZero) for leaf in leaves):
            raise ConfigError(
                "head: statistics (Scores) carry no gradient; put what is minimised into the"
                " objective, or wrap the rest in jax.lax.stop_gradient"
            )
        scaled = jax.tree.map(lambda g: (g * by_total).astype(g.dtype), gradients)
        return (*scaled, None)

    loss.defvjp(forward, backward, symbolic_zeros=True)
    return loss(*jax.tree.map(jnp.asarray, (hidden, head, (teacher, auxiliaries, weights, mask))))


def chunk_tokens(memory_bytes: float, vocabulary: int) -> int:
    """The largest power of two of tokens whose two float32 logits fit the budget, at least 1.

    >>> chunk_tokens(128 * 2**20, 151_936)
    64
    """
    return 2 ** max(0, int(memory_bytes / (8 * vocabulary)).bit_length() - 1)


class _Settings(NamedTuple):
    """The settings of a pass: the function, the columns that exist, the chunk, the mesh axis of the
    vocabulary."""

    function: TokenFunction
    columns: int
    chunk: int
    axis: str | None


class _Asked(NamedTuple):
    """The gradients that are asked for."""

    by_hidden: bool = False
    by_head: bool = False


class _Made(NamedTuple):
    """The results of a pass, of a chunk or of all; gradients that are not asked for are None."""

    total: jax.Array
    statistics: Any
    by_hidden: Any = None
    by_head: Any = None


def _check_rows(head: LMHead, teacher: Teacher, mesh: Mesh | None) -> int:
    """The rows that both heads have. Errors: ConfigError where they can't be sharded over the
    mesh."""
    rows = [head.weight_vd.shape[0]]
    if isinstance(teacher, TeacherStates):
        rows.append(teacher.head.weight_vd.shape[0])
    elif isinstance(teacher, TeacherLogits):
        rows.append(teacher.logits.shape[-1])
    axis = vocabulary_axis(mesh)
    pieces = 1 if mesh is None or axis is None else mesh.shape[axis]
    if pieces > 1 and (len({*rows}) > 1 or rows[0] % pieces):
        raise ConfigError(
            f"heads of {rows} rows can't be sharded over {pieces} vocabulary pieces;"
            " pad them to one multiple of it and say vocabulary"
        )
    return min(rows)


def _sharded_pass(mesh: Mesh, settings: _Settings, asked: _Asked, hidden, head, constants) -> _Made:
    """`_pass` on each device's tokens and head rows; gradients are summed once, after the loop.

    By `shard_map`, because a chunk loop under automatic sharding makes XLA gather all hidden
    states, and every data shard compute every chunk.

    Args:
        mesh, hidden, head: as in `head_loss`.
        settings, asked, constants: as in `_pass`.
    """
    tokens, rows = rows_spec(mesh), PartitionSpec(settings.axis)
    teacher, *rest = constants
    head, teacher = _cast_head(head, hidden.dtype), _cast_teacher(teacher)
    teacher_specs: Any = jax.tree.map(lambda _: tokens, teacher)
    if isinstance(teacher, TeacherStates):
        replicated = jax.tree.map(lambda _: PartitionSpec(), teacher.shared)
        heads = jax.tree.map(lambda _: rows, teacher.head)
        teacher_specs = teacher_specs._replace(head=heads, shared=replicated)
    elif isinstance(teacher, TeacherLogits):
        between = (None,) * (teacher.logits.ndim - 2)
        teacher_specs = TeacherLogits(PartitionSpec(*tokens, *between, settings.axis))  # type: ignore[arg-type]

    collect, head_spec = collected_gradient(mesh, head.weight_vd.shape, settings.axis)

    def local(hidden, head, constants) -> _Made:
        made = _pass(settings, asked, hidden, head, constants)
        made = made._replace(total=jax.lax.psum(made.total, tokens[0]))
        by_hidden = (
            made.by_hidden if settings.axis is None else jax.lax.psum(made.by_hidden, settings.axis)
        )
        return made._replace(by_hidden=by_hidden, by_head=collect(made.by_head))

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(tokens, rows, (teacher_specs, *(tokens for _ in rest))),
        out_specs=_Made(PartitionSpec(), tokens, tokens, head_spec),  # type: ignore[arg-type]
        check_vma=False,
    )(hidden, head, (teacher, *rest))


def _cast_head(head: LMHead, dtype) -> LMHead:
    """The head in its hidden states' dtype, cast before devices send each other their shards."""
    return jax.tree.map(lambda w: w.astype(dtype), head)


def _cast_teacher(teacher: Teacher) -> Teacher:
    if not isinstance(teacher, TeacherStates):
        return teacher
    return teacher._replace(head=_cast_head(teacher.head, teacher.hidden.dtype))


def _pass(settings: _Settings, asked: _Asked, hidden, head, constants) -> _Made:
    """The chunk loop over this device's tokens, those of the mask alone.

    Args:
        settings: of the pass.
        asked: the gradients that are made.
        hidden: [..., D].
        head: weight [V, D], this device's rows.
        constants: (teacher, auxiliaries, weights, mask) of `head_loss`.
    """
    teacher, auxiliaries, weights, mask = constants
    work, own = _chunk_work(settings, asked, hidden.dtype, head, teacher)
    count = max(1, mask.size)  # of no tokens there is a row to take shapes from, never visited

    def flat(x):
        row = x.shape[mask.ndim :]
        return x.reshape(-1, *row) if mask.size else jnp.zeros((count, *row), x.dtype)

    tokens = jax.tree.map(flat, (hidden, own, auxiliaries, weights))
    chunk = _local_chunk(settings, count)
    slots = -(-count // chunk) * chunk
    (order,) = jnp.nonzero(mask.reshape(-1), size=slots, fill_value=mask.size)

    def made_by(number) -> _Made:
        index = jax.lax.dynamic_slice(order, (number * chunk,), (chunk,))
        return work(*jax.tree.map(lambda x: x.at[index].get(mode="fill", fill_value=0), tokens))

    def body(carry):
        number, so_far = carry
        new = made_by(number)

        def put(old, rows):
            return jax.lax.dynamic_update_slice_in_dim(old, rows, number * chunk, axis=0)

        return number + 1, _Made(
            so_far.total + new.total,
            jax.tree.map(put, so_far.statistics, new.statistics),
            jax.tree.map(put, so_far.by_hidden, new.by_hidden),
            jax.tree.map(jnp.add, so_far.by_head, new.by_head),
        )

    shapes = jax.eval_shape(made_by, jnp.int32(0))
    rows = jax.tree.map(lambda s: jnp.zeros((slots, *s.shape[1:]), s.dtype), shapes)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    start = zeros._replace(statistics=rows.statistics, by_hidden=rows.by_hidden)
    kept = mask.sum()
    _, made = jax.lax.while_loop(lambda c: c[0] * chunk < kept, body, (jnp.int32(0), start))

    place = jnp.maximum(jnp.cumsum(mask.reshape(-1)) - 1, 0).reshape(mask.shape)

    def unpack(rows):
        kept = mask.reshape(*mask.shape, *(1,) * (rows.ndim - 1))
        return jnp.where(kept, rows[place], jnp.zeros((), rows.dtype))

    return made._replace(
        statistics=jax.tree.map(unpack, made.statistics),
        by_hidden=jax.tree.map(unpack, made.by_hidden),
    )


def _chunk_work(settings: _Settings, asked: _Asked, dtype, head: LMHead, teacher: Teacher):
    """(work(states, teacher, auxiliaries, weight) -> _Made of a chunk, the arrays of the teacher
    that are cut into chunks). Heads are cast to their hidden states' dtypes once, before the loop.

    Args:
        settings, asked, head: as in `_pass`.
        dtype: of the hidden states.
        teacher: as in `head_loss`.
    """
    own: Any = teacher
    weight_vd, teacher_head, shared = _cast_head(head, dtype).weight_vd, None, None
    teacher = _cast_teacher(teacher)
    if isinstance(teacher, TeacherStates):
        own, teacher_head, shared = teacher

    def sweep(raw, theirs, extra, weight):
        """((total, statistics), the gradient by raw logits or ()) of a chunk's raw logits."""

        def weighted(raw):
            logits = _existing(shape_logits(raw, head), settings)
            against = theirs if shared is None else Foreign(theirs, shared)
            loss, statistics = settings.function(logits, against, extra)
            return jnp.sum(jnp.where(weight != 0, loss, 0.0) * weight), statistics

        if not any(asked):
            return weighted(raw), ()
        made, by_logits = jax.value_and_grad(weighted, has_aux=True)(raw)
        return made, jnp.where(weight[:, None] != 0, by_logits, 0.0).astype(dtype)

    def work(states, theirs, extra, weight) -> _Made:
        if teacher_head is not None:
            theirs = project(theirs, teacher_head)
            theirs = theirs if shared is not None else _existing(theirs, settings)
        elif isinstance(theirs, TeacherLogits):
            theirs = _existing(theirs.logits, settings)
        rows = (product(states, weight_vd), theirs, extra, weight)
        made, by_logits = sweep(*rows) if settings.axis else _sweep_in_cache(sweep, *rows)
        by_hidden = by_head = None
        if asked.by_hidden:
            by_hidden = _contract("cv,vd->cd", by_logits, weight_vd)
            if settings.axis is None:  # else shards are summed first, in full precision
                by_hidden = by_hidden.astype(dtype)
        if asked.by_head:
            by_head = jax.tree.map(lambda _: _contract("cv,cd->vd", by_logits, states), head)
        return _Made(made[0], made[1], by_hidden, by_head)

    return work, own


def _sweep_in_cache(sweep, raw: jax.Array, *others):
    """The sweep; on a CPU in blocks of rows that fit its cache: products are fast with many rows,
    sweeps over their results with few (4 against 18 ns an entry at V = 18,992)."""
    chunk, vocabulary = raw.shape
    if chunk * vocabulary <= CACHED_LOGITS:
        return sweep(raw, *others)
    block = math.gcd(chunk, 2 ** max(0, (CACHED_LOGITS // vocabulary).bit_length() - 1))

    def in_blocks(*rows):
        split = jax.tree.map(lambda x: x.reshape(-1, block, *x.shape[1:]), rows)
        (totals, statistics), by_logits = jax.lax.map(lambda piece: sweep(*piece), split)
        merged = jax.tree.map(lambda x: x.reshape(chunk, *x.shape[2:]), (statistics, by_logits))
        return (totals.sum(), merged[0]), merged[1]

    return jax.lax.platform_dependent(raw, *others, cpu=in_blocks, default=sweep)


def _local_chunk(settings: _Settings, tokens: int) -> int:
    """The chunk in use: at most the tokens there are, a multiple of the vocabulary's shards."""
    pieces = 1 if settings.axis is None else jax.lax.axis_size(settings.axis)
    return -(-max(1, min(settings.chunk, tokens)) // pieces) * pieces


def _existing(logits: jax.Array, settings: _Settings) -> jax.Array:
    """Only the columns that exist; on a shard of the vocabulary, -inf in the others."""
    width = logits.shape[-1]
    if settings.axis is None:
        return logits[..., : settings.columns]
    if settings.columns == width * jax.lax.axis_size(settings.axis):
        return logits
    column = jax.lax.axis_index(settings.axis) * width + jnp.arange(width)
    return jnp.where(column[None] < settings.columns, logits, -jnp.inf)


def _contract(spelled: str, by_logits: jax.Array, other: jax.Array) -> jax.Array:
    accumulator = jnp.promote_types(other.dtype, jnp.float32)
    return jnp.einsum(spelled, by_logits, other, preferred_element_type=accumulator)
