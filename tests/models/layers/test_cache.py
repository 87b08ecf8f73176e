"""Caches of a window: a ring of slots is plain windowed attention, prompts land where they must."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.models.layers.attention import attend_next
from kdjax.models.layers.cache import CACHES, Recurrent, Slots, Window, aligned, empty, int8

SLOTS, HEADS, KV_HEADS, WIDTH = 23, 4, 2, 8
STARTS = [0, 3, 11]
"""Each row's first slot that is not padding."""


def random_qkv(slots: int = SLOTS, rows: int = len(STARTS)):
    """(q, k, v), scores of a few units."""
    rng = np.random.default_rng(slots)
    return [
        jnp.float32(1.5 * rng.normal(size=(rows, slots, n, WIDTH)))
        for n in (HEADS, KV_HEADS, KV_HEADS)
    ]


def restored(kept) -> np.ndarray:
    """What a cache stands for, in float64."""
    values, scale = (kept.values, kept.scale) if hasattr(kept, "scale") else (kept, 1)
    return np.asarray(values, np.float64) * np.asarray(scale, np.float64)


def oracle(q, k, v, slot: int, starts, window: int | None) -> np.ndarray:
    """Attention of the queries at a slot, a row and a head at a time, in float64 [B, H, D]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q[:, slot])
    for b, h in np.ndindex(*out.shape[:2]):
        if slot < starts[b]:
            continue
        first = starts[b] if window is None else max(starts[b], slot - window + 1)
        near, kv = slice(first, slot + 1), h * KV_HEADS // HEADS
        scores = k[b, near, kv] @ q[b, slot, h] / np.sqrt(WIDTH)
        weights = np.exp(scores - scores.max())
        out[b, h] = weights / weights.sum() @ v[b, near, kv]
    return out


@functools.partial(jax.jit, static_argnames=("window", "keep"))
def attended(cache, q, k, v, first, starts, *, window, keep):
    """[B, T, H, D] of tokens written one by one from slot `first` on, and the cache after them."""

    def step(cache, token):
        out, cache = attend_next(
            cache, *(x[:, None] for x in token[:3]), pointer=token[3], start_b=starts,
            window=window, scale=WIDTH**-0.5, keep=CACHES[keep],
        )  # fmt: skip
        return cache, out[:, 0]

    slots = first + jnp.arange(q.shape[1])
    cache, out = jax.lax.scan(step, cache, (*(x.swapaxes(0, 1) for x in (q, k, v)), slots))
    return out.swapaxes(0, 1), cache


def zeros(slots: int = SLOTS, rows: int = len(STARTS)) -> jax.Array:
    return jnp.zeros((rows, KV_HEADS, slots, WIDTH))


def as_kept(keep: str, *arrays):
    """Keys and values [B, T, K, D] as a cache gives them back, float64."""
    return [restored(CACHES[keep](x.swapaxes(1, 2))).swapaxes(1, 2) for x in arrays]


@pytest.mark.parametrize("keep", CACHES)
@pytest.mark.parametrize("window", [1, 5, 22, 23, None])
def test_the_next_token_attends_to_its_window(window, keep):
    """23 tokens through a ring (wrapped up to 22 times) or all slots: float64 attention of the keys
    and values as they are kept, rows from their own first slot on."""
    q, k, v = random_qkv()
    cache = empty(zeros(), window, CACHES[keep])
    assert isinstance(cache, Window if window is not None and window < SLOTS else Slots)
    out, _ = attended(cache, q, k, v, 0, jnp.array(STARTS), window=window, keep=keep)
    keys, values = as_kept(keep, k, v)
    for slot in range(SLOTS):
        expected = oracle(q, keys, values, slot, STARTS, window)
        real = np.array(STARTS) <= slot
        np.testing.assert_allclose(out[real, slot], expected[real], atol=1e-5)


def test_all_slots_serve_a_window_too():
    """A cache of all slots, which `empty` makes for no shorter window, is masked by it."""
    q, k, v = random_qkv()
    cache = empty(zeros(), None, CACHES["compute"])
    out, _ = attended(cache, q, k, v, 0, jnp.array(STARTS), window=5, keep="compute")
    for slot in range(max(STARTS), SLOTS):
        np.testing.assert_allclose(out[:, slot], oracle(q, k, v, slot, STARTS, 5), atol=1e-5)


def test_what_stands_in_a_ring_is_not_seen_before_it_is_written():
    """Whatever a ring held before, of an earlier prompt say, changes nothing."""
    q, k, v = random_qkv()
    found = []
    for rubbish in (0.0, 50.0):
        cache = empty(jnp.full_like(zeros(), rubbish), 5, CACHES["compute"])
        out, _ = attended(cache, q, k, v, 0, jnp.array(STARTS), window=5, keep="compute")
        found.append([row[start:] for row, start in zip(np.asarray(out), STARTS, strict=True)])
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_window_of_memory_is_held():
    """A ring is as large as its window, all slots where the window is no shorter; int8 too."""
    for keep in CACHES.values():
        for window, slots in ((5, 5), (22, 22), (23, 23), (40, 23), (None, 23)):
            cache = empty(zeros(), window, keep)
            assert {x.shape[2] for x in jax.tree.leaves(cache)} == {slots}
            assert not any(np.any(x) for x in jax.tree.leaves(cache))


LENGTHS = [1, 4, 9]


@pytest.mark.parametrize("keep", CACHES)
@pytest.mark.parametrize("end", [9, 14])
@pytest.mark.parametrize("window", [3, 9, 12, None])
def test_prompts_are_moved_to_the_slots_before_their_end(window, end, keep):
    """Token i of n stands at slot end - n + i, in a ring at that modulo the window and only if it
    is among the last; `end` is the prompts' width, or beyond it."""
    _, k, v = random_qkv(9)
    old = empty(zeros(end + 9), window, CACHES[keep])
    moved, first = aligned(old, _kept(keep, k, v), jnp.array(LENGTHS), end)
    assert type(moved) is type(old)
    ring = isinstance(old, Window)
    assert first == (0 if ring else end - 9)
    for kept, given in zip(moved, as_kept(keep, k, v), strict=True):
        found = restored(kept)
        assert found.shape[2] == (window if ring else 9)
        for b, length in enumerate(LENGTHS):
            for i in range(max(0, length - window) if ring else 0, length):
                slot = end - length + i
                place = slot % window if ring else slot - first
                np.testing.assert_array_equal(found[b, :, place], given[b, i])


@pytest.mark.parametrize("window", [3, 9, 12, None])
def test_a_moved_prompt_goes_on(window):
    """Tokens after a moved prompt attend to it as if all had been written one by one."""
    q, k, v = random_qkv(9 + SLOTS)
    starts, end = 11 - np.array(LENGTHS), 11
    prompts = [x[:, :9] for x in (k, v)]
    old = empty(zeros(end + SLOTS), window, CACHES["compute"])
    moved, first = aligned(old, _kept("compute", *prompts), jnp.array(LENGTHS), end)
    cache = jax.tree.map(
        lambda o, n: jax.lax.dynamic_update_slice(o, n, (0, 0, first, 0)), old, moved
    )
    rest = [x[:, 9:] for x in (q, k, v)]
    out, _ = attended(cache, *rest, end, jnp.array(starts), window=window, keep="compute")
    for b, length in enumerate(LENGTHS):  # the row alone, without padding
        row = [np.concatenate([x[b, :length], x[b, 9:]])[None] for x in (q, k, v)]
        for step in range(SLOTS):
            expected = oracle(*row, length + step, [0], window)
            np.testing.assert_allclose(out[b, step], expected[0], atol=1e-5)


def _kept(keep: str, k, v) -> Slots:
    return Slots(*(CACHES[keep](x.swapaxes(1, 2)) for x in (k, v)))


def test_a_recurrent_state_has_no_slots():
    """It is a row's own, wherever its prompt ends."""
    fresh = Recurrent(jnp.ones((2, 3, 4, 5)), jnp.ones((2, 3, 6)))
    moved, first = aligned(jax.tree.map(jnp.zeros_like, fresh), fresh, jnp.array([1, 2]), 7)
    assert moved is fresh
    assert first == 0


def test_int8_keeps_each_slot_to_half_a_step():
    """Of 127 steps of the slot's own largest magnitude; a slot of zeros is exact."""
    x = jnp.float32(np.random.default_rng(0).normal(size=(2, 3, 5, WIDTH)))
    x = (x * 10.0 ** jnp.arange(-3, 2)[None, None, :, None]).at[0, 0, 0].set(0)
    error = np.abs(restored(int8(x)) - np.asarray(x, np.float64))
    step = np.abs(np.asarray(x)).max(-1, keepdims=True) / 127
    assert (error <= 0.501 * step).all()
    assert error.max() > 0.4 * step.max()
