"""Decoders of several kinds of layers: prefill and steps, caches of windows, the sampler, remat."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from release import by_default
from shapes import SHAPES
from tiny import extended, lively, random_prompts, tiny_config

from kdjax.base import Sampling
from kdjax.models.decoder import REMAT, build
from kdjax.models.layers.cache import Recurrent, Slots, Window, aligned
from kdjax.models.parameters import init_params, unstacked
from kdjax.models.shape import FULL, LINEAR, SLIDING
from kdjax.numerics import project
from kdjax.rollouts import levels as levels_module
from kdjax.rollouts.choose import choose, uniforms
from kdjax.rollouts.sampler import open_sampler

V = 40
STOP_IDS = (8, 36)
WINDOWS, STATES = "windows and a full layer", "delta-nets and a full layer"
GEMMA, QWEN = (
    "gemma3, five windows and a full layer",
    "qwen3_5, three delta-nets and a gated full layer",
)
MIXED = {
    WINDOWS: {**SHAPES[GEMMA], "num_hidden_layers": 2, "layer_types": (SLIDING, FULL)},
    STATES: {**SHAPES[QWEN], "num_hidden_layers": 3, "layer_types": (LINEAR, LINEAR, FULL)},
    **{name: changes for name, changes in SHAPES.items() if "layer" in name},
}
"""Few layers, that every run tests, and every shape of several kinds."""
KINDS = {
    WINDOWS: [Window, Slots],
    STATES: [Recurrent, Recurrent, Slots],
    GEMMA: [Window] * 5 + [Slots, Window],
    QWEN: [Recurrent] * 3 + [Slots, Recurrent],
}


def random_decoder(name: str, **options):
    """(Model, lively params) of one of the shapes."""
    config = tiny_config(V, **MIXED[name])
    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    return build(config, **options), lively(shapes, 0, config.unit_offset)


def put(old, moved, slot: int):
    """A layer's cache with what was moved from a slot on."""
    return jax.tree.map(
        lambda o, n: jax.lax.dynamic_update_slice(o, n, (0, 0, slot, 0)[: o.ndim]), old, moved
    )


@pytest.fixture(scope="module", params=by_default(MIXED, WINDOWS, STATES))
def decoder(request):
    model, params = random_decoder(request.param)
    return request.param, model._replace(hidden=jax.jit(model.hidden)), params


def random_tokens(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, V, shape).astype(np.int32)


def test_caches_are_of_each_layers_kind(decoder):
    """In the order of the layers; a window's cache is no larger than the window."""
    name, model, _ = decoder
    cache = model.init_cache(2, 30)
    assert [type(kept) for kept in cache] == KINDS.get(name, [type(kept) for kept in cache])
    window = model.config.sliding_window
    assert all(kept.keys.shape[2] == window for kept in cache if isinstance(kept, Window))
    assert all(kept.keys.shape[2] == 30 for kept in cache if isinstance(kept, Slots))


def test_prompts_and_tokens_after_them_are_the_whole(decoder):
    """Right-padded prompts shorter and longer than the window, moved to end at one slot; then 14
    tokens one by one, rings wrapped again and again: the states of `hidden`."""
    _, model, params = decoder
    lengths, wide, end, steps = jnp.array([1, 3, 7, 9]), 9, 11, 14
    tokens, layers = random_tokens(0, 4, wide + steps), unstacked(params)
    rows = jnp.arange(4)

    @jax.jit
    def decoded(tokens):
        states, fresh = model.prefill(layers, tokens[:, :wide], lengths)
        pairs = zip(model.init_cache(4, end + steps), fresh, strict=True)
        cache = [put(old, *aligned(old, new, lengths, end)) for old, new in pairs]

        def step(cache, number):
            token = tokens[rows, lengths + number]
            state, cache = model.extend(layers, token, cache, end + number, end - lengths)
            return cache, state

        return states, jax.lax.scan(step, cache, jnp.arange(steps))[1]

    states, later = decoded(tokens)
    expected = model.hidden(params, tokens)
    for row, length in enumerate(lengths.tolist()):
        np.testing.assert_allclose(states[row, :length], expected[row, :length], atol=1e-4)
        np.testing.assert_allclose(later[:, row], expected[row, length : length + steps], atol=1e-4)


def test_int8_beside_windows_and_states(decoder):
    """Keys and values in int8, of rings, too: every state within 5 % of the exact one, no equal;
    a delta-net's state stays float32."""
    _, model, params = decoder
    narrow = build(model.config, kv_cache="int8")
    tokens = random_tokens(1, 2, 20)
    exact = np.asarray(model.hidden(params, tokens))
    rounded = jax.jit(lambda params, tokens: extended(narrow, params, tokens, 24))(params, tokens)
    error = np.linalg.norm(rounded - exact, axis=-1) / np.linalg.norm(exact, axis=-1)
    assert 1e-4 < np.median(error) < 0.05
    for kept in narrow.init_cache(1, 24):
        wanted = {"float32"} if isinstance(kept, Recurrent) else {"int8", "float32"}
        assert {str(x.dtype) for x in jax.tree.leaves(kept)} == wanted


@pytest.fixture
def short_levels(monkeypatch):
    """Levels of 4, 8 and 12 tokens, and a look every 2."""
    monkeypatch.setattr(levels_module, "FIRST", (4, 4))
    monkeypatch.setattr(levels_module, "STEPS", (2, 2))


def test_a_row_does_not_know_its_batch(decoder, short_levels):
    """Tokens drawn of five prompts, over three levels: those that the whole
    sequence's logits give by definition, whatever the order or the rows decoded at a time."""
    _, model, params = decoder
    lengths, rows, limit, sampling = [3, 8, 1, 5, 8], [40, 7, 19, 3, 101], 12, Sampling(1.5)
    batch = random_prompts(V, lengths, rows)

    def draw(batch, **settings):
        draw = open_sampler(model, stop_ids=STOP_IDS, sampling=sampling, **settings)
        return draw(unstacked(params), batch, jax.random.key(0), limit)

    samples = draw(batch)
    order = np.array([4, 2, 0, 3, 1])
    other = draw(jax.tree.map(lambda x: x[order], batch), rows=2)
    np.testing.assert_array_equal(other.tokens_bt, samples.tokens_bt[order])
    np.testing.assert_array_equal(other.length_b, samples.length_b[order])
    np.testing.assert_allclose(other.logp_bt, samples.logp_bt[order], atol=1e-4)
    assert samples.length_b.max() > 8  # in the third level

    @jax.jit
    def next_tokens(tokens):
        """After every position, by the number of the response's token there."""
        logits = project(model.hidden(params, tokens), model.head(params))
        position = jnp.arange(tokens.shape[1])[None] - jnp.array(lengths)[:, None] + 1
        of_row = jax.vmap(uniforms, (None, None, 0))
        number = jax.vmap(of_row, (None, 0, 0))(
            jax.random.key(0), batch.row_b[:, None], jnp.maximum(position, 0)
        )
        flat = choose(logits.reshape(-1, logits.shape[-1]), number.reshape(-1), sampling)
        return flat.token_b.reshape(tokens.shape)

    texts = np.zeros((5, 8 + limit), np.int32)
    for row, length in enumerate(lengths):
        texts[row, :length] = batch.prompt_bp[row, :length]
        texts[row, length : length + limit] = samples.tokens_bt[row]
    found = np.asarray(next_tokens(texts))
    for row, length in enumerate(lengths):
        drawn = samples.length_b[row]
        wanted = samples.tokens_bt[row, :drawn]
        np.testing.assert_array_equal(found[row, length - 1 : length - 1 + drawn], wanted)


def test_a_convolution_of_one_position_has_no_tail():
    """Its cache is empty; the likeliest tokens are those of the whole."""
    changes = {"num_hidden_layers": 1, "layer_types": (LINEAR,), "linear_conv_kernel_dim": 1}
    config = tiny_config(V, **{**SHAPES[QWEN], **changes})
    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    model, params = build(config), lively(shapes, 0, config.unit_offset)
    batch = random_prompts(V, [3, 3], [0, 1])
    draw = open_sampler(model, stop_ids=STOP_IDS, sampling=Sampling(0.0))
    samples = draw(unstacked(params), batch, jax.random.key(0), 4)
    whole = np.concatenate([batch.prompt_bp, samples.tokens_bt], axis=1)
    likeliest = project(model.hidden(params, whole), model.head(params)).argmax(axis=-1)
    for row, drawn in enumerate(samples.length_b):
        expected = likeliest[row, 2 : 2 + drawn]
        np.testing.assert_array_equal(samples.tokens_bt[row, :drawn], expected)


def test_remat_changes_nothing(decoder):
    """What is computed again is computed the same: states and gradients of every layer's kind."""
    name, _, _ = decoder
    tokens, found = random_tokens(2, 2, 9), []
    for remat in REMAT:
        again, params = random_decoder(name, remat=remat)

        @jax.jit
        @jax.value_and_grad
        def loss(params, again=again):
            return jnp.sum(jnp.sin(again.hidden(params, tokens)))

        found.append(loss(params))
    size = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(found[0][1]))
    reached = {**found[0][1], "head": found[0][1]["embed"]}  # hidden states need no head
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(reached))
    for value, gradients in found[1:]:
        np.testing.assert_allclose(value, found[0][0], rtol=1e-5)
        jax.tree.map(
            lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5 * size),
            gradients, found[0][1],
        )  # fmt: skip
