"""A teacher in int8: the kernels of NumPy's arithmetic, half as large, on every path of a model."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from placement import FAMILIES, V, descent, make, placed, step_on
from release import by_default
from tiny import extended, lively, random_rollout, tiny_config

from kdjax import models
from kdjax.config import Config, Curriculum, Data, Evaluation
from kdjax.errors import ConfigError
from kdjax.models import unstacked
from kdjax.models.parameters import init_params
from kdjax.models.quantized import held_by, is_quantized, parameter_total, used
from kdjax.plan import hlo
from kdjax.sharding import make_mesh, shard_batch
from kdjax.step.update import init_state
from kdjax.training.loop import train
from kdjax.training.parts import startup
from kdjax.training.parts.build import build
from kdjax.training.parts.sampling import to_sampler

quantized = jax.jit(functools.partial(held_by, models.int8))
KERNEL = ("layers", "q_proj", "kernel")


def widened(params):
    """Quantised parameters made wide again, by NumPy in float64."""

    def of(node):
        if not is_quantized(node):
            return node
        return jnp.float32(np.float64(node["qvalue"]) * np.float64(node["scale"]))

    return jax.tree.map(of, params, is_leaf=is_quantized)


@pytest.fixture
def tiny(tmp_path, student_folder, teacher_folder) -> Config:
    return Config(
        run=str(tmp_path / "run"), cache=str(tmp_path / "cache"), steps=2, batch_size=8,
        student=str(student_folder), teacher=str(teacher_folder), teacher_weights="int8",
        data=Data(terms=(2,), problems=24, max_prompt_tokens=24),
        curriculum=Curriculum(lengths=(8,)),
        evaluation=Evaluation(problems=4, samples=1, k=(1,), max_new_tokens=8, batch_size=8),
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(24, 5), (3, 24, 5), (2, 4, 24, 5)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernels_are_those_of_float64(shape, dtype):
    """Scale and values by NumPy in float64, of each output channel of each layer and expert; no
    entry moves by more than half a step, and zeros stay zeros."""
    rng = np.random.default_rng(0)
    spread = np.exp(rng.normal(0, 2, (*shape[:-2], 1, shape[-1])))  # channels of unlike size
    kernel = jnp.asarray(rng.normal(size=shape) * spread, dtype).at[..., 0].set(0)
    wide = np.asarray(kernel, np.float64)
    made = jax.jit(functools.partial(models.int8, KERNEL))(kernel)
    assert (made["qvalue"].dtype, made["qvalue"].shape) == (jnp.int8, shape)
    assert (made["scale"].dtype, made["scale"].shape) == (jnp.float32, spread.shape)
    step = np.abs(wide).max(axis=-2, keepdims=True)[..., 1:] / 127.5
    np.testing.assert_allclose(made["scale"][..., 1:], step, rtol=3e-7)
    exact = wide[..., 1:] / step
    near_half = np.abs(np.abs(exact - np.trunc(exact)) - 0.5) < 1e-4
    found = np.asarray(made["qvalue"], np.int64)[..., 1:]
    np.testing.assert_array_equal(found[~near_half], np.rint(exact)[~near_half])
    assert found.max() == 127
    back = np.asarray(used(None, made, jnp.float32, (None,) * len(shape)), np.float64)
    assert (np.abs(back - wide)[..., 1:] <= step * (0.5 + 1e-4)).all()
    assert (back[..., 0] == 0).all()


@pytest.mark.parametrize("family", by_default(FAMILIES, "qwen3", "qwen3_moe", "qwen3_5_text"))
def test_a_family_is_that_of_its_rounded_kernels(family):
    """Every family's hidden states equal those of the wide model on the rounded kernels, by whole
    sequences and by a cache; kernels alone are held in int8, and they are all of them."""
    config = tiny_config(V, **FAMILIES[family])
    params = lively(jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0)), 2)
    model, small = models.build(config), quantized(params)
    named = jax.tree_util.tree_leaves_with_path(params["layers"])
    names = [({key.key for key in path}, w) for path, w in named]
    wide = {"router", "in_proj_a", "in_proj_b", "conv"}
    big = sum(w.size for path, w in names if w.ndim > 2 and not path & wide)
    held = [w for w in jax.tree.leaves(small) if w.dtype == jnp.int8]
    assert sum(w.size for w in held) == big > 0
    assert parameter_total(small) == sum(w.size for w in jax.tree.leaves(params))
    tokens = np.random.default_rng(1).integers(0, V, (2, 7))
    hidden = jax.jit(model.hidden)
    whole = hidden(small, tokens)
    chex.assert_trees_all_close(whole, hidden(widened(small), tokens), rtol=1e-4, atol=1e-4)
    assert np.abs(np.asarray(whole - hidden(params, tokens))).max() > 1e-3
    chex.assert_trees_all_close(extended(model, small, tokens, 8), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", by_default(FAMILIES, "qwen3"))
def test_a_step_on_eight_devices_is_that_of_one(family):
    """(2, 2, 2) with a teacher in int8, dealt: the same parameters and metrics after a step; its
    kernels travel as int8."""
    student, (config, params) = make(family, 1), make(family, 2, hidden_size=24)
    rollout = random_rollout(3, V, [3, 5, 4, 6, 3, 4, 5, 4], [6, 2, 5, 1, 4, 6, 3, 2])
    step, small = jax.jit(step_on(None, student, (config, params), descent())), quantized(params)
    expected, expected_metrics = step(init_state(student[1], descent()), small, rollout)
    mesh = make_mesh(8, fsdp=2, tensor=2)
    shapes = models.abstract_params(config, jnp.float32, mesh, hold=models.int8)
    small = jax.device_put(small, jax.tree.map(lambda leaf: leaf.sharding, shapes))
    stack = small["layers"]["0"]
    down = (stack["experts"] if config.num_experts else stack)["down_proj"]["kernel"]
    assert [x.sharding.shard_shape(x.shape)[-2:] for x in (down["qvalue"], down["scale"])] == [
        (down["qvalue"].shape[-2] // 2, 12),
        (1, 12),
    ]
    state = init_state(placed(mesh, *student), descent())
    arguments = state, small, shard_batch(rollout, mesh)
    compiled = jax.jit(step_on(mesh, student, (config, params), descent())).lower(*arguments)
    compiled = compiled.compile()
    state, metrics = compiled(*arguments)
    as_numpy = functools.partial(jax.tree.map, np.asarray)
    chex.assert_trees_all_close(
        as_numpy(state.params), as_numpy(expected.params), rtol=2e-5, atol=2e-5
    )
    chex.assert_trees_all_close(as_numpy(metrics), as_numpy(expected_metrics), rtol=2e-5, atol=1e-5)
    narrow = [
        c for c in hlo.collectives(compiled.as_text())
        if c.kind == "all-gather" and c.payload_bytes == np.prod(c.shape)
    ]  # fmt: skip
    kernels = [w for w in jax.tree.leaves(small) if w.dtype == jnp.int8]
    assert len(narrow) == sum(len(stack) for stack in kernels) > 0


def test_a_sampler_reads_int8():
    """Narrowing for the sampler leaves kernels and scales, and narrows the tables."""
    config, params = make("qwen3", 1, tie_word_embeddings=False)
    mesh = make_mesh(8, fsdp=4, tensor=2)
    shapes = models.abstract_params(config, jnp.float32, mesh, hold=models.int8)
    small = jax.device_put(quantized(params), jax.tree.map(lambda leaf: leaf.sharding, shapes))
    read = to_sampler(shapes, jnp.bfloat16, mesh)(small)
    for node, before in zip(
        jax.tree.leaves(read["layers"], is_leaf=is_quantized),
        jax.tree.leaves(unstacked(small)["layers"], is_leaf=is_quantized),
        strict=True,
    ):
        chex.assert_trees_all_equal(
            jax.tree.map(np.asarray, node), jax.tree.map(np.asarray, before)
        )
    assert {read[name].dtype for name in ("embed", "head")} == {jnp.dtype("bfloat16")}
    kernel = read["layers"][0]["mixer"]["o_proj"]["kernel"]["qvalue"]
    assert kernel.sharding.shard_shape(kernel.shape) == (16, 16)  # fsdp undone, tensor kept


@pytest.mark.parametrize("fsdp", [None, 2])
def test_reading_a_folder_is_reading_it_wide_first(teacher_folder, fsdp):
    """A folder read in int8 is the wide one quantised, dealt as the shapes say; a kernel takes a
    byte a number and four a channel."""
    mesh = None if fsdp is None else make_mesh(8, fsdp=fsdp, tensor=2)
    model, small = models.load(teacher_folder, mesh, hold=models.int8)
    wide = quantized(models.load(teacher_folder)[1])
    as_numpy = functools.partial(jax.tree.map, np.asarray)
    chex.assert_trees_all_equal(as_numpy(small), as_numpy(wide))
    shapes = models.abstract_params(model.config, jnp.float32, mesh, hold=models.int8)
    chex.assert_trees_all_equal_shapes_and_dtypes(small, shapes)
    if mesh is not None:
        same = jax.tree.map(lambda x, s: x.sharding == s.sharding, small, shapes)
        assert all(jax.tree.leaves(same))
    gate = small["layers"]["0"]["gate_proj"]["kernel"]
    assert sum(x.nbytes for x in gate.values()) == 3 * (24 * 32 + 4 * 32)


def test_one_layer_is_wide_at_a_time():
    """What a pass over many layers holds beside their int8 hardly grows with their number."""

    def temporary_bytes(layers: int) -> int:
        shape = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=layers)
        config = tiny_config(V, **shape)
        shapes = models.abstract_params(config, jnp.float32, hold=models.int8)
        tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
        lowered = jax.jit(models.build(config).hidden).lower(shapes, tokens)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    four, twelve = temporary_bytes(4), temporary_bytes(12)
    assert twelve - four < 3 * 64 * 256 * 4  # eight layers more hold less than one wide MLP


@pytest.mark.parametrize("prefix", by_default(["student", "teacher"], "teacher"))
def test_a_run(tiny, prefix):
    """Trains and evaluates; the report names the weights, and counts their bytes; the teacher is
    itself; its trajectories are kept apart from those of the wide one."""
    train(dataclasses.replace(tiny, prefix=prefix))
    run = Path(tiny.run)
    said = dict(line.split(": ", 1) for line in (run / "startup.txt").read_text().splitlines())
    assert said["precision"].endswith("the teacher's float32, kernels of its layers int8")
    assert said["self-test"] == "the teacher as its own student has KL 0"
    if prefix == "teacher":
        (settings,) = (Path(tiny.cache) / "trajectories").glob("*/settings.json")
        assert json.loads(settings.read_text())["teacher_weights"] == "int8"


def test_the_report_counts_bytes(tiny):
    """Parameters are as many as ever, the memory is that of the arrays."""
    parts = build(tiny)
    numbers = sum(w.size for w in jax.tree.leaves(models.load(tiny.teacher)[1]))
    held = sum(w.nbytes for w in jax.tree.leaves(parts.teachers[""].params)) / 2**20
    assert held < 0.7 * 4 * numbers / 2**20  # tiny channels: scales and tables weigh more
    report = startup.report(parts)
    assert f"teacher {numbers:,} parameters" in report
    assert re.search(rf"held: [^;]*, teacher {held:,.1f}[,;]", report)


def test_without_the_library(tiny, monkeypatch):
    """One line, before anything is loaded, that names the extra."""
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(ConfigError, match=r"pip install \"kdjax\[int8\]\"") as caught:
        build(tiny)
    assert "\n" not in str(caught.value)
