"""Devices over data, fsdp and tensor: the step is that of one device, and nothing big travels."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from placement import FAMILIES, MIXED, V, descent, make, placed, step_on
from release import by_default
from tiny import extended, lively, random_rollout

from kdjax import models
from kdjax.base import Batch
from kdjax.models.lora import adapter_of, make_lora
from kdjax.models.parameters import init_params
from kdjax.plan import hlo
from kdjax.rollouts.sampler import generate
from kdjax.sharding import make_mesh, rollout_mesh, shard_batch
from kdjax.step.optimizer import make_optimizer
from kdjax.step.score import HeadPlan
from kdjax.step.update import abstract_state, init_state, make_step

MESHES = {"8, 1, 1": (1, 1), "1, 8, 1": (8, 1), "2, 2, 2": (2, 2)}


@pytest.fixture(scope="module", params=by_default(FAMILIES, "qwen3", "qwen3_moe", "qwen3_5_text"))
def alone(request):
    """(student, teacher, rollout, (state, metrics) of one step on one device)."""
    student = make(request.param, 1)
    teacher = make(request.param, 2, hidden_size=24)
    rollout = random_rollout(3, V, [3, 5, 4, 6, 3, 4, 5, 4], [6, 2, 5, 1, 4, 6, 3, 2])
    step = jax.jit(step_on(None, student, teacher, descent()))
    made = step(init_state(student[1], descent()), teacher[1], rollout)
    return student, teacher, rollout, jax.tree.map(np.asarray, made)


@pytest.mark.parametrize("shape", by_default(MESHES, "2, 2, 2"))
def test_the_step_is_that_of_one_device(alone, shape):
    """8 devices as (data, fsdp, tensor): the same parameters after a step, and metrics."""
    student, teacher, rollout, (expected, expected_metrics) = alone
    fsdp, tensor = MESHES[shape]
    mesh = make_mesh(8, fsdp=fsdp, tensor=tensor)
    step = jax.jit(step_on(mesh, student, teacher, descent()))
    state = init_state(placed(mesh, *student), descent())
    state, metrics = step(state, placed(mesh, *teacher), shard_batch(rollout, mesh))
    chex.assert_trees_all_close(
        jax.tree.map(np.asarray, state.params), expected.params, rtol=2e-5, atol=2e-5
    )
    chex.assert_trees_all_close(
        jax.tree.map(np.asarray, metrics), expected_metrics, rtol=2e-5, atol=1e-5
    )
    assert float(metrics["gradient_norm"]) > 0.1


def test_parameters_and_moments_are_dealt():
    """On (1, 4, 2) every kernel and table, and its moments, is an eighth on each device."""
    config, params = make("qwen3", 1, hidden_size=32, num_key_value_heads=4)
    mesh = make_mesh(8, fsdp=4, tensor=2)
    optimizer = make_optimizer(learning_rate=1e-3, steps=4)
    state = abstract_state(models.abstract_params(config, jnp.float32, mesh), optimizer, mesh)
    real = init_state(params, optimizer)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, jax.eval_shape(lambda: real))
    big = [leaf for leaf in jax.tree.leaves(state) if leaf.size > 256]
    assert len(big) == 3 * 8  # seven kernels and the embedding, with two moments each
    for leaf in big:
        assert np.prod(leaf.sharding.shard_shape(leaf.shape)) == leaf.size / 8
    assert jax.tree.leaves(state.opt_state["gate"])[0].sharding.is_fully_replicated


NEW = ("smollm3", "olmo3", "gemma3_text", "qwen3_5_text")


@pytest.mark.parametrize("family", by_default(NEW, "qwen3_5_text"))
def test_the_step_of_an_adapter_is_that_of_one_device(family):
    """(2, 2, 2): an adapter on a frozen base, dealt, learns what it does on one device."""
    config, base = make(family, 1)
    lora = make_lora(config, 3, 6.0, ())
    shapes = jax.eval_shape(lambda key: init_params(config, key, lora), jax.random.key(0))
    adapter = adapter_of(lively(shapes, 4))
    teacher, teacher_params = make(family, 2, hidden_size=24)
    rollout = random_rollout(3, V, [3, 5, 4, 6, 3, 4, 5, 4], [6, 2, 5, 1, 4, 6, 3, 2])

    def stepped(mesh, adapter, base, teacher_params, rollout):
        learner, plain = (
            models.build(config, mesh=mesh, lora=lora),
            models.build(teacher, mesh=mesh),
        )
        plan = HeadPlan(8, mesh=mesh)
        step = jax.jit(make_step(learner, plain, descent(), token_loss=MIXED, plan=plan))
        state = init_state(adapter, descent())
        state, metrics = step(state, teacher_params, rollout, jnp.nan, base)
        return jax.tree.map(np.asarray, (state.params, metrics))

    mesh = make_mesh(8, fsdp=2, tensor=2)
    places = adapter_of(models.abstract_params(config, jnp.float32, mesh, lora=lora))
    dealt = jax.device_put(adapter, jax.tree.map(lambda leaf: leaf.sharding, places))
    own, others = placed(mesh, config, base), placed(mesh, teacher, teacher_params)
    expected = stepped(None, adapter, base, teacher_params, rollout)
    found = stepped(mesh, dealt, own, others, shard_batch(rollout, mesh))
    chex.assert_trees_all_close(found, expected, rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize(("key_heads", "value_heads"), [(3, 6), (1, 3)])
def test_heads_of_linear_attention_that_do_not_divide(key_heads, value_heads):
    """Over a tensor axis of 2 key heads are repeated for their value heads, or all heads are whole
    on every device: states and gradients are those of one device, drawing too."""
    config, params = make(
        "qwen3_5_text", 1, linear_num_key_heads=key_heads, linear_num_value_heads=value_heads
    )
    mesh = make_mesh(8, fsdp=2, tensor=2)
    tokens = np.random.default_rng(0).integers(0, V, (8, 9))

    def loss(model, params):
        states = model.hidden(params, tokens)
        return jnp.sum(jnp.sin(states)), states

    alone, dealt = (
        jax.jit(jax.value_and_grad(functools.partial(loss, model), has_aux=True))
        for model in (models.build(config), models.build(config, mesh=mesh))
    )
    own = placed(mesh, config, params)
    (expected, gradient), (found, dealt_gradient) = alone(params), dealt(own)
    chex.assert_trees_all_close(found[1], expected[1], atol=2e-5)
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradient))
    chex.assert_trees_all_close(dealt_gradient, gradient, rtol=1e-4, atol=2e-5 * scale)
    written = extended(models.build(config, mesh=mesh), own, tokens, 9)
    chex.assert_trees_all_close(written, expected[1], atol=5e-5)


def compiled_step(fsdp: int, tensor: int, rows: int = 16, width: int = 64, family: str = "qwen3"):
    """(the compiled step's text, shapes of parameters) where tokens outnumber everything else."""
    student, teacher = make(family, 1), make(family, 2, hidden_size=24)
    mesh = make_mesh(8, fsdp=fsdp, tensor=tensor)
    optimizer = make_optimizer(learning_rate=1e-3, steps=4)
    places = models.abstract_params(student[0], jnp.float32, mesh)
    state = abstract_state(places, optimizer, mesh)
    rollout = shard_batch(random_rollout(3, V, [width // 2] * rows, [width // 2] * rows), mesh)
    step = jax.jit(step_on(mesh, student, teacher, optimizer))
    shapes = models.abstract_params(teacher[0], jnp.float32, mesh)
    text = step.lower(state, shapes, rollout).compile().as_text()
    return text, (places, shapes)


@pytest.mark.parametrize("shape", by_default(MESHES, "8, 1, 1", "2, 2, 2"))
@pytest.mark.parametrize("family", by_default(["qwen3", *NEW], "qwen3", "qwen3_5_text"))
def test_only_parameters_are_gathered(family, shape):
    """No collective of the step gathers activations or logits: gathers are of a layer's weights,
    of heads, or of a few numbers a token; and no device holds [tokens, V]."""
    fsdp, tensor = MESHES[shape]
    text, trees = compiled_step(fsdp, tensor, family=family)
    shapes = [leaf.shape[-2:] for tree in trees for leaf in jax.tree.leaves(tree) if leaf.ndim > 1]
    pieces = [
        *shapes,
        *((a // tensor, b) for a, b in shapes),
        *((a, b // tensor) for a, b in shapes),
    ]
    weights = {frozenset(pair) for pair in pieces}
    found = hlo.collectives(text)
    assert found
    for collective in found:
        if collective.kind == "all-gather" and np.prod(collective.shape) > 16 * 64:
            assert frozenset(collective.shape[-2:]) in weights, collective
    local = 16 * 64 * tensor // 8
    assert 0 < hlo.widest_rows(text, V // tensor) < local
    if fsdp == tensor == 1:
        assert {c.kind for c in found} == {"all-reduce"}


@pytest.mark.parametrize("shape", by_default(["1, 8, 1", "2, 2, 2"], "2, 2, 2"))
@pytest.mark.parametrize("family", by_default(["qwen3", *NEW], "qwen3", "qwen3_5_text"))
def test_rollouts_do_not_depend_on_the_layout(family, shape):
    """Sampled tokens of 8 devices, with heads dealt or not, are those of one device."""
    config, params = make(family, 1)
    rng = np.random.default_rng(0)
    none = np.zeros((8, 1), np.int32)
    lengths = rng.integers(2, 6, 8).astype(np.int32)
    prompts = rng.integers(0, V, (8, 6)).astype(np.int32)
    batch = Batch(prompts, lengths, none, none[:, 0], none[:, 0] > 0, np.arange(8))

    def draw(model, params, mesh):
        return generate(
            model, params, batch, jax.random.key(1), max_new_tokens=24, stop_ids=(5,), mesh=mesh
        )

    fsdp, tensor = MESHES[shape]
    mesh = rollout_mesh(make_mesh(8, fsdp=fsdp, tensor=tensor))
    dealt = draw(models.build(config, mesh=mesh), placed(mesh, config, params), mesh)
    expected = draw(models.build(config), params, None)
    np.testing.assert_array_equal(dealt.tokens_bt, expected.tokens_bt)
    np.testing.assert_allclose(dealt.logp_bt, expected.logp_bt, rtol=2e-5, atol=2e-5)
