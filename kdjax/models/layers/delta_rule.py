"""The gated delta rule (arXiv 2412.06464), chunk by chunk and token by token, and its causal
convolution.

A head keeps a state S [Dk, Dv], a linear map from keys to values. Each position first lets it
fade, then corrects what it says of the position's key, then reads it:

    S <- exp(log_decay) S
    S <- S + k (beta (v - S^T k))^T
    out = S^T q / sqrt(Dk)

Everything is computed in float32, products too on devices whose default is less. A position with
beta 0 and log_decay 0 leaves the state as it is: padding is written so.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from kdjax.errors import ConfigError

CHUNK = 64
"""Positions that `chunked` solves for at once."""

_product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def chunked(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    beta: jax.Array,
    state: jax.Array | None = None,
    *,
    chunk: int = CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """The gated delta rule over whole rows -> (out [B, T, H, Dv] in v's dtype, the state after the
    last position, float32 [B, H, Dk, Dv]).

    Args:
        q, k: [B, T, K, Dk]; K divides H, and H / K consecutive value heads share a key head. q is
            scaled by 1 / sqrt(Dk) here; neither is normalised here (`normalised`).
        v: [B, T, H, Dv].
        log_decay: float32 [B, T, H], at most 0.
        beta: float32 [B, T, H].
        state: [B, H, Dk, Dv] before the first position; zeros by default.
        chunk: positions that are solved for at once: it changes time and memory, not the result.
            T need not be a multiple.

    Errors: ConfigError naming heads that don't divide, or a chunk below 1.

    >>> x, gate = jnp.ones((1, 5, 2, 4)), jnp.zeros((1, 5, 2))
    >>> [y.shape for y in chunked(x, x, x, gate, gate)]
    [(1, 5, 2, 4), (1, 2, 4, 4)]
    """
    if chunk < 1:
        raise ConfigError(f"delta rule: chunk must be at least 1, got {chunk}")
    (batch, length, heads, width), dtype = v.shape, v.dtype
    if state is None:
        state = jnp.zeros((batch, heads, k.shape[-1], width), jnp.float32)
    grouped = _grouped(q, k, v, log_decay, beta, state)
    in_chunks = functools.partial(_in_chunks, chunk=min(chunk, length))
    q, k, v, log_decay, beta = map(in_chunks, grouped[:5], (1, 1, 2, 2, 2))
    fade = _fade(log_decay)
    since_start = jnp.exp(jnp.cumsum(log_decay, axis=-1))[..., None]
    values, readers = _solved(k, v, beta[..., None], fade, since_start)
    writers = fade[..., -1, :, None] * k[:, :, :, None]
    to_end = since_start[..., -1:, :]
    last, (before, corrections) = jax.lax.scan(
        _next_chunk, grouped[5], (values, readers, writers, to_end)
    )
    seen = _product("nbkid,nbkjd->nbkij", q, k)[:, :, :, None] * fade
    out = _product("nbkgij,nbkgjv->nbkgiv", seen, corrections)
    out = out + since_start * _product("nbkid,nbkgdv->nbkgiv", q, before)
    out = jnp.moveaxis(out, (0, 4), (1, 2)).reshape(batch, -1, heads, width)
    return out[:, :length].astype(dtype), last.reshape(state.shape)


def _solved(k, v, beta, fade, since_start) -> tuple[jax.Array, jax.Array]:
    """(values [N, B, K, G, C, Dv], readers [N, B, K, G, C, Dk]): the corrections u of a chunk that
    starts with state S are `values - readers S`.

    u_i = beta_i (v_i - exp(c_i) S^T k_i - sum over j < i of exp(c_i - c_j) (k_i . k_j) u_j), c the
    running sum of log_decay: a unit lower triangular system, linear in S.
    """
    among = jnp.tril(_product("nbkid,nbkjd->nbkij", k, k), -1)[:, :, :, None]
    right = jnp.concatenate([beta * v, beta * since_start * k[:, :, :, None]], axis=-1)
    solved = _product("nbkgij,nbkgjd->nbkgid", _inverse(beta * fade * among), right)
    return solved[..., : v.shape[-1]], solved[..., v.shape[-1] :]


@jax.custom_jvp
def _inverse(below: jax.Array) -> jax.Array:
    """(I + below)^-1 of a strictly lower triangular matrix [..., C, C].

    Block after block of the diagonal is inverted, of twice the size each time: the corner under two
    of them, F and G, is -G^-1 corner F^-1. That is as stable as substitution, and nothing but
    products: jaxlib 0.10's own triangular solve can wait for ever on CPUs of few threads.
    """
    i = jnp.arange(below.shape[-1])
    inverse, size = jnp.broadcast_to(_like(jnp.eye(len(i)), below), below.shape), 1
    while size < len(i):
        block = i // size
        in_corner = (block[:, None] % 2 == 1) & (block[None] == block[:, None] - 1)
        corner = jnp.where(_like(in_corner, below), below, 0.0)
        inverse, size = inverse - _between(inverse, corner), 2 * size
    return inverse


@_inverse.defjvp
def _inverse_jvp(primals, tangents):
    inverse = _inverse(*primals)
    return inverse, -_between(inverse, *tangents)


def _between(outer: jax.Array, x: jax.Array) -> jax.Array:
    """outer x outer, of matrices."""
    return _product("...ij,...jk->...ik", outer, _product("...ij,...jk->...ik", x, outer))


def _next_chunk(state, chunk):
    """A chunk's step of the scan: the state after it; (the state before it, its corrections)."""
    values, readers, writers, to_end = chunk
    corrections = values - _product("bkgid,bkgdv->bkgiv", readers, state)
    written = _product("bkgid,bkgiv->bkgdv", writers, corrections)
    return to_end * state + written, (state, corrections)


def _fade(log_decay: jax.Array) -> jax.Array:
    """[..., C] -> [..., C, C]: what is left at i of what was written at j, 0 where j is after i.

    Each sum starts at its own j: a difference of running sums would round where they are large.
    Masked before exp, so that nothing overflows, in the gradient neither.
    """
    i = jnp.arange(log_decay.shape[-1])
    after = jnp.where(_like(i[:, None] > i[None], log_decay[..., None]), log_decay[..., None], 0.0)
    total = jnp.cumsum(after, axis=-2)
    return jnp.exp(jnp.where(_like(i[:, None] >= i[None], total), total, -jnp.inf))


def _like(mask: jax.Array, x: jax.Array) -> jax.Array:
    """A mask of the last two axes with leading axes of size 1, as many as x has."""
    return mask.reshape((1,) * (x.ndim - 2) + mask.shape)


def recurrent(q, k, v, log_decay, beta, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The gated delta rule a position at a time: arguments, result and errors as of `chunked`.

    T = 1 is a plain step without a loop, as decoding takes it.

    >>> x, gate = jnp.ones((1, 1, 2, 4)), jnp.ones((1, 1, 2))
    >>> out, state = recurrent(x / 2, x / 2, 3 * x, 0 * gate, gate, jnp.zeros((1, 2, 4, 4)))
    >>> out[0, 0, 0].tolist()
    [1.5, 1.5, 1.5, 1.5]
    """
    *rows, state_before = _grouped(q, k, v, log_decay, beta, state)
    rows = [jnp.moveaxis(x, 1, 0) for x in rows]
    if v.shape[1] == 1:
        after, out = _next_position(state_before, [x[0] for x in rows])
        out = out[None]
    else:
        after, out = jax.lax.scan(_next_position, state_before, rows)
    return jnp.moveaxis(out, 0, 1).reshape(v.shape).astype(v.dtype), after.reshape(state.shape)


def _next_position(state, position):
    """A position's step: the state after it; what it reads [B, K, G, Dv]."""
    q, k, v, log_decay, beta = position
    state = jnp.exp(log_decay)[..., None, None] * state
    correction = beta[..., None] * (v - _product("bkd,bkgdv->bkgv", k, state))
    state = state + k[:, :, None, :, None] * correction[..., None, :]
    return state, _product("bkd,bkgdv->bkgv", q, state)


def _grouped(q, k, v, log_decay, beta, state) -> list[jax.Array]:
    """All in float32 and q scaled, the value heads [.., H, ..] as [.., K, H / K, ..]."""
    key_heads, heads = k.shape[2], v.shape[2]
    if heads % key_heads or q.shape != k.shape:
        raise ConfigError(
            f"delta rule: {heads} value heads need as many query as key heads, a divisor of them;"
            f" got q {list(q.shape)} and k {list(k.shape)}"
        )
    q, k, *of_values = (x.astype(jnp.float32) for x in (q, k, v, log_decay, beta, state))
    split = [
        x.reshape(*x.shape[:axis], key_heads, heads // key_heads, *x.shape[axis + 1 :])
        for x, axis in zip(of_values, (2, 2, 2, 1), strict=True)
    ]
    return [q * q.shape[-1] ** -0.5, k, *split]


def _in_chunks(x: jax.Array, head_axes: int, *, chunk: int) -> jax.Array:
    """[B, T, heads, ...] -> [N, B, heads, C, ...]; padding is zeros, which leave a state alone."""
    padding = -x.shape[1] % chunk
    x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
    x = x.reshape(x.shape[0], -1, chunk, *x.shape[2:])
    return jnp.moveaxis(x, (1, 2), (0, 2 + head_axes))


def normalised(x: jax.Array) -> jax.Array:
    """x / sqrt(sum of x^2 + 1e-6) over the last axis, in float32: [..., D] -> the same shape.

    >>> [round(y, 3) for y in normalised(jnp.array([3.0, 4.0])).tolist()]
    [0.6, 0.8]
    """
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)


def causal_conv(x_btc: jax.Array, kernel_wc: jax.Array, tail: jax.Array | None = None) -> jax.Array:
    """Each channel's own causal convolution, y_t = sum over w of kernel_w x_(t - W + 1 + w), in
    float32: [B, T, C] -> the same shape and dtype.

    Args:
        x_btc: [B, T, C].
        kernel_wc: [W, C]; its last row is of the position itself.
        tail: [B, W - 1, C], the inputs before x (`conv_tail`); zeros by default.

    >>> causal_conv(jnp.array([[[1.0], [2.0], [3.0]]]), jnp.array([[10.0], [1.0]])).tolist()
    [[[1.0], [12.0], [23.0]]]
    """
    (batch, length, channels), width = x_btc.shape, kernel_wc.shape[0]
    if tail is None:
        tail = jnp.zeros((batch, width - 1, channels), x_btc.dtype)
    x = jnp.concatenate([tail.astype(jnp.float32), x_btc.astype(jnp.float32)], axis=1)
    kernel = kernel_wc.astype(jnp.float32)[:, None, None]
    terms = [kernel[w] * x[:, w : w + length] for w in range(width)]
    return sum(terms[1:], terms[0]).astype(x_btc.dtype)


def conv_tail(x_btc: jax.Array, length_b: jax.Array, width: int) -> jax.Array:
    """The last W - 1 inputs of each right-padded row, zeros before its start: what `causal_conv`
    needs to go on -> [B, W - 1, C] in x's dtype.

    Args:
        x_btc: [B, T, C]; after an earlier tail, the two concatenated, and the length of both.
        length_b: int [B], the inputs of each row.
        width: W, the positions of the kernel.

    >>> conv_tail(jnp.array([[[1.0], [2.0], [9.0]]]), jnp.array([2]), 4).tolist()
    [[[0.0], [1.0], [2.0]]]
    """
    place = length_b[:, None] + jnp.arange(1 - width, 0)[None]
    taken = jnp.take_along_axis(x_btc, jnp.maximum(place, 0)[..., None], axis=1)
    return jnp.where((place >= 0)[..., None], taken, jnp.zeros((), x_btc.dtype))
