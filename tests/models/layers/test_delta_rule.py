"""The gated delta rule against a float64 loop of positions, its gradients, and its convolution."""

from __future__ import annotations

import functools
import importlib
import inspect
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from kdjax.errors import ConfigError
from kdjax.models.layers.delta_rule import causal_conv, chunked, conv_tail, normalised, recurrent

DECAYS = {"mild": 0.1, "none": 0.0, "strong": 50.0}
"""The mean of -log_decay; positions differ as exponentials do."""


def random_inputs(length, *, heads=4, key_heads=2, keys=8, values=6, decay="mild", batch=2):
    """(q, k, v, log_decay, beta, state), q and k of norm one as the layer gives them."""
    rng = np.random.default_rng(length)
    q, k = rng.normal(size=(2, batch, length, key_heads, keys))
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    v = rng.normal(size=(batch, length, heads, values))
    log_decay = -DECAYS[decay] * rng.exponential(size=(batch, length, heads))
    beta = rng.uniform(size=(batch, length, heads))
    state = rng.normal(size=(batch, heads, keys, values))
    return [jnp.array(x, jnp.float32) for x in (q, k, v, log_decay, beta, state)]


def oracle(q, k, v, log_decay, beta, state):
    """A row, a head and a position at a time, in float64."""
    q, k, v, log_decay, beta = (np.asarray(x, np.float64) for x in (q, k, v, log_decay, beta))
    out, states = np.zeros_like(v), np.array(state, np.float64)
    for b, h in np.ndindex(*states.shape[:2]):
        s, key_head = states[b, h], h * k.shape[2] // v.shape[2]
        for t in range(v.shape[1]):
            key, query = k[b, t, key_head], q[b, t, key_head]
            s = np.exp(log_decay[b, t, h]) * s
            s = s + np.outer(key, beta[b, t, h] * (v[b, t, h] - key @ s))
            out[b, t, h] = query @ s / np.sqrt(len(query))
        states[b, h] = s
    return out, states


def assert_near(actual, expected, tolerance=1e-5):
    """Within a tolerance relative to the standard deviation of what is expected."""
    expected = np.asarray(expected, np.float64)
    chex.assert_shape(actual, expected.shape)
    difference = np.abs(np.asarray(actual, np.float64) - expected).max()
    assert difference <= tolerance * expected.std(), difference / expected.std()


@functools.partial(jax.jit, static_argnames=("rule", "chunk"))
def gradients(rule, inputs, weights, **options):
    """Of a weighted sum of out and state, by each input."""

    def loss(inputs):
        return sum((x * w).sum() for x, w in zip(rule(*inputs, **options), weights, strict=True))

    return jax.grad(loss)(inputs)


def random_weights(inputs):
    rng = np.random.default_rng(7)
    return [jnp.array(rng.normal(size=inputs[i].shape), jnp.float32) for i in (2, 5)]


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("length", [1, 5, 64, 100])
def test_both_forms_are_the_loop(length, decay):
    """Out and state, from a state that is given, over part of a chunk, one, and more."""
    inputs = random_inputs(length, decay=decay)
    expected = oracle(*inputs)
    for rule in (chunked, recurrent):
        for actual, wanted in zip(jax.jit(rule)(*inputs), expected, strict=True):
            assert_near(actual, wanted)


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (6, 2), (3, 1)])
def test_consecutive_value_heads_share_a_key_head(heads, key_heads):
    inputs = random_inputs(20, heads=heads, key_heads=key_heads)
    expected = oracle(*inputs)
    for rule in (functools.partial(chunked, chunk=8), recurrent):
        for actual, wanted in zip(jax.jit(rule)(*inputs), expected, strict=True):
            assert_near(actual, wanted)


def test_the_first_state_is_zero_by_default():
    *inputs, state = random_inputs(20)
    expected = oracle(*inputs, 0 * state)
    for actual, wanted in zip(jax.jit(chunked)(*inputs), expected, strict=True):
        assert_near(actual, wanted)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("chunk", [1, 7, 16, 200])
def test_chunks_change_nothing(chunk, decay):
    inputs = random_inputs(100, decay=decay)
    expected = oracle(*inputs)
    chunks = jax.jit(functools.partial(chunked, chunk=chunk))(*inputs)
    for actual, wanted in zip(chunks, expected, strict=True):
        assert_near(actual, wanted)


def test_2048_positions_do_not_drift():
    inputs = random_inputs(2048, heads=2, key_heads=1, keys=16, values=16, batch=1)
    inputs[3] /= 100  # so that what is old still counts
    for actual, wanted in zip(jax.jit(chunked)(*inputs), oracle(*inputs), strict=True):
        assert_near(actual, wanted)


def test_a_reset_amid_a_chunk_costs_no_accuracy():
    """Decays after many strong ones are as exact as without: no difference of large sums."""
    inputs = random_inputs(64)
    inputs[3] = inputs[3].at[:, :32].multiply(500.0)
    for actual, wanted in zip(jax.jit(chunked)(*inputs), oracle(*inputs), strict=True):
        assert_near(actual, wanted, 3e-6)


def test_equal_keys_are_as_exact_as_others():
    """All corrections of a chunk depend on all before: powers of the matrix would reach 1e18."""
    inputs = random_inputs(64)
    inputs[1] = jnp.broadcast_to(inputs[1][:, :1], inputs[1].shape)
    inputs[3], inputs[4] = 0 * inputs[3], jnp.ones_like(inputs[4])
    for actual, wanted in zip(jax.jit(chunked)(*inputs), oracle(*inputs), strict=True):
        assert_near(actual, wanted)


@pytest.mark.parametrize("rule", [chunked, recurrent])
def test_rows_and_heads_stay_on_their_devices(rule):
    """Sharded over both, nothing of the rule or its gradient moves between devices."""
    mesh = jax.make_mesh((2, 2), ("rows", "heads"), axis_types=(AxisType.Auto,) * 2)
    *rows, state = random_inputs(40)
    rows = [jax.device_put(x, NamedSharding(mesh, P("rows", None, "heads"))) for x in rows]
    inputs = [*rows, jax.device_put(state, NamedSharding(mesh, P("rows", "heads")))]

    def loss(inputs):
        out, after = rule(*inputs)
        return (out * rows[2]).sum((1, 3)), (after * after).sum((2, 3))

    def both(inputs):
        sums, pull = jax.vjp(loss, inputs)
        return sums, pull(jax.tree.map(jnp.ones_like, sums))

    text = jax.jit(both).lower(inputs).compile().as_text()
    assert not re.findall(r"all-gather|all-reduce|all-to-all|collective-permute", text)


@pytest.mark.parametrize("rule", [chunked, recurrent])
def test_padding_leaves_the_state(rule):
    """Positions of beta 0 and log_decay 0, whatever their q, k and v, count for nothing."""
    *rows, state = random_inputs(40)
    short = [x[:, :23] for x in rows]
    padded = [*rows[:3], *(x.at[:, 23:].set(0.0) for x in rows[3:])]
    (out, after), (padded_out, padded_after) = (jax.jit(rule)(*x, state) for x in (short, padded))
    assert_near(padded_after, after, 1e-6)
    assert_near(padded_out[:, :23], out, 1e-6)
    still = [x[:, 23:] for x in padded]
    chex.assert_trees_all_equal(jax.jit(rule)(*still, state)[1], state)


@pytest.mark.parametrize("rule", [chunked, recurrent])
def test_a_row_in_two_parts_is_the_row(rule):
    *rows, state = random_inputs(50)
    whole, last = jax.jit(rule)(*rows, state)
    first, between = jax.jit(rule)(*(x[:, :21] for x in rows), state)
    second, after = jax.jit(rule)(*(x[:, 21:] for x in rows), between)
    assert_near(jnp.concatenate([first, second], axis=1), whole, 2e-6)
    assert_near(after, last, 2e-6)


def test_one_position_is_a_step_without_a_loop():
    assert "scan" in str(jax.make_jaxpr(recurrent)(*random_inputs(2)))
    assert "scan" not in str(jax.make_jaxpr(recurrent)(*random_inputs(1)))


# The torch of transformers


@pytest.fixture(scope="module")
def qwen():
    """transformers' own functions, those that need no kernel."""
    pytest.importorskip("torch")
    return importlib.import_module("transformers.models.qwen3_5.modeling_qwen3_5")


@pytest.mark.parametrize("length", [1, 5, 130])
def test_both_forms_are_those_of_transformers(qwen, length):
    """Grouped heads, a first state, q and k normalised on the way: out and state."""
    *rows, state = random_inputs(length)
    rows[0], rows[1] = 3 * rows[0], 5 * rows[1]
    ours = [normalised(x) for x in rows[:2]] + rows[2:]
    theirs = [to_torch(x) for x in rows]
    options = {"initial_state": to_torch(state), "output_final_state": True}
    options["use_qk_l2norm_in_kernel"] = True
    for rule, name in ((chunked, "chunk"), (recurrent, "recurrent")):
        function = inspect.unwrap(getattr(qwen, f"torch_{name}_gated_delta_rule"))
        expected = function(*theirs, **options)
        for actual, wanted in zip(jax.jit(rule)(*ours, state), expected, strict=True):
            assert_near(actual, wanted.numpy())


def test_the_convolution_is_that_of_transformers(qwen):
    """Theirs is over [B, C, T] with a kernel [C, W]; a step of decoding goes on from the tail."""
    x, kernel, tail = random_conv(9)
    channels_first = [to_torch(y.swapaxes(1, 2)) for y in (x, tail)]
    weight = to_torch(kernel.T)
    whole = inspect.unwrap(qwen.causal_conv1d_fn)(channels_first[0], weight)
    assert_near(causal_conv(x, kernel), whole.swapaxes(1, 2).numpy(), 1e-6)
    step = inspect.unwrap(qwen.causal_conv1d_update)(*channels_first, weight)
    assert_near(causal_conv(x, kernel, tail), step.swapaxes(1, 2).numpy(), 1e-6)
    kept = channels_first[1].swapaxes(1, 2).numpy()  # they write the new tail into the old
    chex.assert_trees_all_equal(conv_tail(x, jnp.full(2, 9), 4), kept)


def to_torch(x: jax.Array):
    return importlib.import_module("torch").tensor(np.array(x))


# Gradients


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("length", [1, 37])
def test_gradients_of_both_forms_are_equal(length, decay):
    inputs = random_inputs(length, decay=decay)
    weights = random_weights(inputs)
    of_chunks = gradients(chunked, inputs, weights, chunk=16)
    for actual, wanted in zip(of_chunks, gradients(recurrent, inputs, weights), strict=True):
        assert np.isfinite(actual).all()
        assert_near(actual, wanted, 1e-4)


@pytest.mark.parametrize("length", [1, 37, 64])
def test_gradients_are_finite_where_all_is_forgotten(length):
    """log_decay of -50 at each position: what is before one is 0 in float32, its gradient too."""
    inputs = random_inputs(length)
    inputs[3] = jnp.full_like(inputs[3], -50.0)
    weights = random_weights(inputs)
    of_chunks = gradients(chunked, inputs, weights)
    for actual, wanted in zip(of_chunks, gradients(recurrent, inputs, weights), strict=True):
        assert np.isfinite(actual).all()
        np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-5)


def test_gradients_are_slopes_of_the_loop():
    """Central differences in float64 of each number of a tiny case."""
    inputs = random_inputs(5, heads=2, key_heads=1, keys=2, values=3, batch=1)
    weights = random_weights(inputs)

    def loss(inputs):
        return sum((x * np.asarray(w)).sum() for x, w in zip(oracle(*inputs), weights, strict=True))

    exact = [np.asarray(x, np.float64) for x in inputs]
    for i, actual in enumerate(gradients(chunked, inputs, weights, chunk=2)):
        slopes = np.zeros(exact[i].shape)
        for place in np.ndindex(*slopes.shape):
            moved = []
            for step in (1e-5, -1e-5):
                x = exact[i].copy()
                x[place] += step
                moved.append(loss([*exact[:i], x, *exact[i + 1 :]]))
            slopes[place] = (moved[0] - moved[1]) / 2e-5
        assert_near(actual, slopes, 1e-4)


# Types and errors


@pytest.mark.parametrize("rule", [chunked, recurrent])
def test_bfloat16_is_computed_in_float32(rule):
    """Out is in v's dtype, the state in float32, both of what the rounded inputs give."""
    q, k, v, *gates = random_inputs(30)
    rounded = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    out, state = jax.jit(rule)(*rounded, *gates)
    expected_out, expected_state = oracle(*rounded, *gates)
    assert out.dtype == jnp.bfloat16
    assert state.dtype == jnp.float32
    assert_near(state, expected_state)
    np.testing.assert_array_equal(out, jnp.array(expected_out, jnp.float32).astype(jnp.bfloat16))


@pytest.mark.parametrize("rule", [chunked, recurrent])
def test_products_are_exact_on_every_device(rule):
    """Each says HIGHEST: by default a TPU would round to bfloat16."""
    products = equations(jax.make_jaxpr(rule)(*random_inputs(30)).jaxpr)
    highest = (jax.lax.Precision.HIGHEST,) * 2
    found = [e.params["precision"] for e in products if e.primitive.name == "dot_general"]
    assert found
    assert set(found) == {highest}


def test_nothing_waits_for_a_triangular_solve():
    """On CPUs jaxlib's hangs where two run at once on a pool of two threads."""
    inputs = random_inputs(30)
    program = jax.make_jaxpr(functools.partial(gradients, chunked))(inputs, random_weights(inputs))
    names = {e.primitive.name for e in equations(program.jaxpr)}
    assert "dot_general" in names
    assert "triangular_solve" not in names


def equations(jaxpr):
    """Those of a program and of the programs in it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


def test_errors_name_what_does_not_fit():
    q, k, v, *gates = random_inputs(3)
    with pytest.raises(ConfigError, match="chunk must be at least 1, got 0"):
        chunked(q, k, v, *gates, chunk=0)
    for rule in (chunked, recurrent):
        with pytest.raises(ConfigError, match="3 value heads need"):
            rule(q, k, v[:, :, :3], *gates)
        with pytest.raises(ConfigError, match="4 value heads need"):
            rule(q[:, :, :1], k, v, *gates)


def test_normalised_is_of_norm_one_and_smooth_at_zero():
    x = np.random.default_rng(0).normal(size=(3, 5, 8)) * 1e-3
    expected = x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6)
    actual = normalised(jnp.array(x, jnp.float32))
    assert_near(actual, expected, 1e-6)
    half = normalised(jnp.array(x, jnp.bfloat16))
    assert half.dtype == jnp.float32
    slope = jax.grad(lambda x: normalised(x).sum())(jnp.zeros(4))
    np.testing.assert_allclose(slope, 1e3, rtol=1e-6)


# The convolution


def random_conv(length, width=4, dtype=jnp.float32):
    rng = np.random.default_rng(length)
    shapes = (2, length, 3), (width, 3), (2, width - 1, 3)
    return [jnp.array(rng.normal(size=shape), dtype) for shape in shapes]


def conv_oracle(x, kernel, tail):
    """A position and a channel at a time, in float64."""
    x, kernel, tail = (np.asarray(y, np.float64) for y in (x, kernel, tail))
    out, before = np.zeros_like(x), len(kernel) - 1
    for b, t, c in np.ndindex(*x.shape):
        for back in range(before + 1):
            source = x[b, t - back, c] if t >= back else tail[b, before + t - back, c]
            out[b, t, c] += kernel[before - back, c] * source
    return out


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 3, 9])
def test_the_convolution_is_the_loop(length, width):
    x, kernel, tail = random_conv(length, width)
    conv = jax.jit(causal_conv)
    assert_near(conv(x, kernel, tail), conv_oracle(x, kernel, tail), 1e-6)
    assert_near(conv(x, kernel), conv_oracle(x, kernel, 0 * tail), 1e-6)


def test_the_convolution_sums_in_float32():
    x, kernel, tail = random_conv(9, dtype=jnp.bfloat16)
    actual, expected = jax.jit(causal_conv)(x, kernel, tail), conv_oracle(x, kernel, tail)
    np.testing.assert_array_equal(actual, jnp.array(expected, jnp.float32).astype(jnp.bfloat16))


@pytest.mark.parametrize("cut", [1, 2, 5])
def test_the_tail_carries_the_convolution_on(cut):
    """Rows cut in two, also before the kernel's width; then a third part, of both tails."""
    x, kernel, _ = random_conv(9)
    lengths = jnp.full(2, cut)
    tail = conv_tail(x[:, :cut], lengths, 4)
    second = causal_conv(x[:, cut:7], kernel, tail)
    both = jnp.concatenate([tail, x[:, cut:7]], axis=1)
    third = causal_conv(x[:, 7:], kernel, conv_tail(both, lengths * 0 + 10 - cut, 4))
    parts = [causal_conv(x[:, :cut], kernel), second, third]
    chex.assert_trees_all_equal(jnp.concatenate(parts, axis=1), causal_conv(x, kernel))


def test_tails_are_of_each_rows_own_length():
    """The last inputs of right-padded rows; zeros where a row is shorter, or empty."""
    x = jnp.arange(1.0, 25.0).reshape(4, 6, 1)
    tail = jax.jit(conv_tail, static_argnums=2)(x, jnp.array([6, 4, 2, 0]), 4)
    assert tail[..., 0].tolist() == [[4, 5, 6], [8, 9, 10], [0, 13, 14], [0, 0, 0]]
    assert conv_tail(x, jnp.array([6, 4, 2, 0]), 1).shape == (4, 0, 1)
