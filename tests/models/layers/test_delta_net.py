"""The delta-net as a layer: float64 of its equations, long rows, padding, decoding, a mesh."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from runs import assert_bitwise_equal
from tiny import lively, tiny_config

from kdjax.errors import ConfigError
from kdjax.models.layers.context import Next, Settings, Whole
from kdjax.models.layers.delta_net import DeltaNet
from kdjax.models.shape import LINEAR, DecoderConfig, LayerKind
from kdjax.sharding import make_mesh

D, KEY_HEADS, HEADS, KEYS, VALUES, CONV = 16, 2, 4, 6, 10, 4
KIND = LayerKind(LINEAR)


def config() -> DecoderConfig:
    return tiny_config(
        40, model_type="qwen3_5_text", layer_types=(LINEAR, LINEAR),
        linear_num_key_heads=KEY_HEADS, linear_num_value_heads=HEADS, linear_key_head_dim=KEYS,
        linear_value_head_dim=VALUES, linear_conv_kernel_dim=CONV,
    )  # fmt: skip


def delta_net(dtype=jnp.float32, mesh=None, seed: int = 0):
    """(run(params, y, context) jitted, params, the empty state of a number of rows)."""
    settings = Settings(config(), dtype, mesh=mesh)
    graph, state = nnx.split(DeltaNet(settings, KIND, rngs=nnx.Rngs(0)), nnx.Param)
    params = lively({"mixer": nnx.to_pure_dict(state)}, seed)["mixer"]

    @jax.jit
    def run(params, y, context):
        return nnx.merge(graph, nnx.State(params))(y, context)

    return run, params, lambda rows: DeltaNet.empty(settings, KIND, rows, 0)


@pytest.fixture(scope="module")
def net():
    return delta_net()


def inputs(rows: int, length: int, seed: int = 0) -> jax.Array:
    """What a layer's norm gives: entries of size 1."""
    return jnp.float32(np.random.default_rng(seed).normal(size=(rows, length, D)))


def whole(y: jax.Array, lengths=None) -> Whole:
    positions = jnp.broadcast_to(jnp.arange(y.shape[1]), y.shape[:2])
    return Whole(positions, length_b=None if lengths is None else jnp.array(lengths))


def following(cache, slot: int, starts) -> Next:
    starts = jnp.array(starts)
    return Next(jnp.maximum(slot - starts, 0)[:, None], jnp.int32(slot), starts, cache)


def silu(x):
    return x / (1 + np.exp(-x))


def oracle(params, y) -> np.ndarray:
    """Qwen3.5's layer, a position at a time, in float64: [B, T, D] -> the same shape."""
    p, y = jax.tree.map(lambda w: np.asarray(w, np.float64), params), np.asarray(y, np.float64)
    batch, length = y.shape[:2]
    projected = {name: y @ w["kernel"] for name, w in p.items() if name.startswith("in_proj")}
    padded = np.pad(projected["in_proj_qkv"], ((0, 0), (CONV - 1, 0), (0, 0)))
    mixed = silu(sum(padded[:, w : w + length] * p["conv"][:, 0, w] for w in range(CONV)))
    q, k, v = np.split(mixed, [KEY_HEADS * KEYS, 2 * KEY_HEADS * KEYS], axis=-1)
    q, k = (x.reshape(batch, length, KEY_HEADS, KEYS) for x in (q, k))
    q, k = (x / np.sqrt(np.sum(x * x, -1, keepdims=True) + 1e-6) for x in (q, k))
    q, k = (np.repeat(x, HEADS // KEY_HEADS, axis=2) for x in (q, k))
    v = v.reshape(batch, length, HEADS, VALUES)
    beta = 1 / (1 + np.exp(-projected["in_proj_b"]))
    steps = np.logaddexp(0, projected["in_proj_a"] + p["step_bias"])
    kept = np.exp(-np.exp(p["log_rate"]) * steps)
    state, out = np.zeros((batch, HEADS, KEYS, VALUES)), np.zeros_like(v)
    for t in range(length):
        state = kept[:, t, :, None, None] * state
        wrong = v[:, t] - np.einsum("bhkv,bhk->bhv", state, k[:, t])
        state = state + np.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * wrong)
        out[:, t] = np.einsum("bhkv,bhk->bhv", state, q[:, t]) / np.sqrt(KEYS)
    out = out / np.sqrt(np.mean(out * out, -1, keepdims=True) + 1e-6) * p["norm"]["scale"]
    gated = out * silu(projected["in_proj_z"].reshape(out.shape))
    return gated.reshape(batch, length, -1) @ p["out_proj"]["kernel"]


@pytest.mark.parametrize("log_rate", [None, -20.0])
def test_2048_positions_are_the_loop(net, log_rate):
    """Through convolution, state and gated norm, as drawn or with a state that never fades: the
    last 256 positions as exact as the first."""
    run, params, _ = net
    if log_rate is not None:
        params = {**params, "log_rate": jnp.full(HEADS, log_rate)}
    y = inputs(2, 2048)
    out, kept = run(params, y, whole(y))
    assert kept is None
    expected = oracle(params, y)
    error = np.sqrt(np.mean((np.asarray(out) - expected) ** 2, axis=(0, 2))) / expected.std()
    assert error[-256:].mean() <= 2 * error[:256].mean()
    assert error.mean() <= 3e-6


def test_a_chunk_hands_its_state_on(net):
    """A token at the end of a chunk of 64 is felt in the next, past the convolution's reach."""
    run, params, _ = net
    y = inputs(1, 70)
    other = y.at[:, 60].set(-y[:, 60])
    moved = jnp.abs(run(params, y, whole(y))[0] - run(params, other, whole(y))[0]).max(-1)
    assert (moved[0, :60] == 0).all()
    assert (moved[0, 60:] > 1e-3).all()


LENGTHS = [1, 2, 3, 5, 64, 70]
"""Shorter than the convolution, a chunk, beyond a chunk."""


def test_prefill_and_steps_are_the_whole(net):
    """Right-padded prompts, then 8 tokens one by one from their own lengths on."""
    run, params, _ = net
    y, steps = inputs(len(LENGTHS), 78), 8
    prompts = jnp.where(
        jnp.arange(70)[None, :, None] < jnp.array(LENGTHS)[:, None, None], y[:, :70], 99
    )
    out, cache = run(params, prompts, whole(prompts, LENGTHS))
    expected = run(params, y, whole(y))[0]
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(out[row, :length], expected[row, :length], atol=1e-5)
    for step in range(steps):
        place = (np.array(LENGTHS) + step)[:, None, None]
        token = jnp.take_along_axis(y, place, axis=1)
        out, cache = run(params, token, following(cache, 70 + step, 70 - np.array(LENGTHS)))
        wanted = np.take_along_axis(np.asarray(expected), place, axis=1)
        np.testing.assert_allclose(out, wanted, atol=2e-5)


def test_right_padding_leaves_the_state(net):
    """Whatever stands behind a prompt, its state and tail are the same to the bit; they are those
    of a prompt alone."""
    run, params, _ = net
    y = inputs(len(LENGTHS), 70)
    real = jnp.arange(70)[None, :, None] < jnp.array(LENGTHS)[:, None, None]
    kept = [
        run(params, padded, whole(padded, LENGTHS))[1]
        for padded in (y, jnp.where(real, y, -3.0), jnp.where(real, y, 1e4))
    ]
    assert_bitwise_equal(kept[0], kept[1])
    assert_bitwise_equal(kept[0], kept[2])
    assert (jnp.abs(kept[0].state).max(axis=(1, 2, 3)) > 1e-2).all()
    for row in (0, 3, 5):
        length = LENGTHS[row]
        alone = y[row : row + 1, :length]
        own = run(params, alone, whole(alone, [length]))[1]
        np.testing.assert_allclose(kept[0].state[row], own.state[0], atol=2e-6)
        np.testing.assert_allclose(kept[0].tail[row], own.tail[0], atol=2e-6)


def test_left_padding_leaves_the_state_empty(net):
    """Tokens before a row's first slot change nothing, to the bit; the row then is as any other."""
    run, params, empty = net
    y, starts = inputs(3, 9), [0, 4, 20]
    cache, outs = empty(3), []
    for slot in range(9):
        out, cache = run(params, y[:, slot : slot + 1], following(cache, slot, starts))
        outs.append(out[:, 0])
    assert_bitwise_equal(
        jax.tree.map(lambda x: x[2], cache), jax.tree.map(lambda x: x[0], empty(1))
    )
    alone = y[1:2, 4:]
    expected = run(params, alone, whole(alone))[0][0]
    np.testing.assert_allclose(jnp.stack(outs, 1)[1, 4:], expected, atol=2e-5)


def test_the_state_is_float32_beside_bfloat16(net):
    """In bfloat16 the state is float32, the tail bfloat16, and 300 positions stay near float64."""
    run, params, empty = delta_net(jnp.bfloat16)
    y = inputs(2, 300)
    out, cache = run(params, y.astype(jnp.bfloat16), whole(y, [300, 300]))
    assert (out.dtype, cache.state.dtype, cache.tail.dtype) == ("bfloat16", "float32", "bfloat16")
    assert jax.tree.map(jnp.shape, cache) == jax.tree.map(jnp.shape, empty(2))
    assert jax.tree.map(lambda x: x.dtype, cache) == jax.tree.map(lambda x: x.dtype, empty(2))
    error = np.asarray(out, np.float64) - oracle(params, y)
    early, late = (np.sqrt(np.mean(error[:, part] ** 2)) for part in (slice(150), slice(150, None)))
    assert early < 0.1 * oracle(params, y).std()
    assert late < 1.5 * early


def test_packed_texts_are_refused(net):
    run, params, _ = net
    y = inputs(1, 6)
    packed = whole(y)._replace(segment_ids=jnp.array([[0, 0, 0, 1, 1, 1]]))
    with pytest.raises(ConfigError, match="segment_ids: a layer of linear attention reads one"):
        run(params, y, packed)


@pytest.mark.parametrize("pieces", [2, 4])
def test_heads_over_a_mesh_are_those_of_one_device(net, pieces):
    """Key heads that the mesh does not divide (2 over 4) are repeated: same output and state."""
    run, params, empty = net
    dealt = delta_net(mesh=make_mesh(2 * pieces, tensor=pieces))[0]
    y = inputs(2, 70)
    for context in (whole(y, [70, 33]), following(empty(2), 3, [0, 2])):
        rows = y if isinstance(context, Whole) else y[:, :1]
        for ours, wanted in zip(
            jax.tree.leaves(dealt(params, rows, context)),
            jax.tree.leaves(run(params, rows, context)),
            strict=True,
        ):
            assert len(ours.sharding.device_set) == 2 * pieces
            np.testing.assert_allclose(ours, wanted, atol=1e-5)
