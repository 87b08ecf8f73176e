"""Low-rank adapters: the laws of joining and merging, the gradient, and runs that train nothing
else."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from placement import FAMILIES as PLACED
from release import by_default
from runs import assert_bitwise_equal, assert_interrupted_equals_uninterrupted, logged
from safetensors.numpy import load_file, save_file
from tiny import extended, lively, random_rollout, tiny_config

from kdjax import forward_kl, make_optimizer, models
from kdjax.config import Config, Lora, Optimizer
from kdjax.config.timetable import timetable
from kdjax.config.validation import validate
from kdjax.errors import ConfigError, DataError
from kdjax.export import export, export_adapter, load_run
from kdjax.models import flops
from kdjax.models.decoder import build
from kdjax.models.layers.linear import PROJECTIONS, LoRA
from kdjax.models.lora import (
    adapter_of,
    init_adapter,
    join,
    make_lora,
    merge,
    open_student,
    sampling_params,
)
from kdjax.models.parameters import init_params
from kdjax.numerics import project
from kdjax.runtime import files
from kdjax.step.optimizer import guard_state
from kdjax.step.score import HeadPlan
from kdjax.step.update import init_state, make_step
from kdjax.storage import run_folder
from kdjax.storage.checkpoints import open_checkpoints
from kdjax.training import loop
from kdjax.training.parts.programs import optimizer_of

V = 31
DENSE = PROJECTIONS[:7]
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MOE = {
    "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}  # fmt: skip
FAMILIES = {
    "qwen3": {},
    "qwen2, biases": {"model_type": "qwen2", "qkv_bias": True},
    "qwen3, output bias, untied": {
        "qkv_bias": True, "output_bias": True, "tie_word_embeddings": False,
    },
    "qwen3_moe": MOE,
    **{name: PLACED[name] for name in ("smollm3", "olmo3", "gemma3_text", "qwen3_5_text")},
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, V, (3, 9))


def adapted(changes, seed=0, targets=(), rank=3, alpha=6.0):
    """(decoder config, LoRA, lively base, lively adapter: its B is not zero)."""
    config = tiny_config(V, **changes)
    lora = make_lora(config, rank, alpha, targets)
    shapes = jax.eval_shape(lambda key: init_params(config, key, lora), jax.random.key(0))
    params = lively(shapes, seed)
    adapter = adapter_of(params)
    base = lively(jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0)), seed + 1)
    return config, lora, base, adapter


@pytest.fixture(
    params=by_default(FAMILIES, "qwen3, output bias, untied", "qwen3_moe", "qwen3_5_text")
)
def family(request):
    return adapted(FAMILIES[request.param])


def projections(params, stack: str = "0") -> dict[str, dict]:
    """A projection's leaves by its name, of the layers of a stack."""
    layers = params["layers"][stack]
    return {**{k: v for k, v in layers.items() if k != "mixer"}, **layers.get("mixer", {})}


def adapters(adapter) -> dict[tuple[str, str], dict]:
    """An adapter's pairs by stack and projection."""
    stacks = adapter["layers"]
    return {(s, name): pair for s in stacks for name, pair in projections(adapter, s).items()}


def hidden(model, params):
    return np.asarray(jax.jit(model.hidden)(params, TOKENS))


def test_a_new_adapter_changes_nothing(family):
    """B is zero: the hidden states of base and adapter are those of the base alone, bit for bit."""
    config, lora, base, _ = family
    adapter = init_adapter(config, lora, jax.random.key(3))
    assert all(np.std(pair["lora_a"]) > 0 for pair in adapters(adapter).values())
    plain = hidden(build(config), base)
    assert_bitwise_equal(hidden(build(config, lora=lora), join(base, adapter)), plain)
    assert_bitwise_equal(merge(join(base, adapter), lora), base)


def test_merged_equals_adapted(family):
    """The plain decoder with merged kernels computes what the decoder with adapters does, in whole
    sequences and from a cache."""
    config, lora, base, adapter = family
    joined = join(base, adapter)
    merged = merge(joined, lora)
    chex.assert_trees_all_equal_shapes_and_dtypes(merged, base)
    plain, with_adapter = build(config), build(config, lora=lora)
    found = hidden(plain, merged)
    assert np.abs(found - hidden(plain, base)).max() > 0.1
    near = 3e-4 if config.qk_norm == "none" else 5e-5  # sharp attention magnifies rounding
    np.testing.assert_allclose(found, hidden(with_adapter, joined), atol=near)
    last = extended(with_adapter, joined, TOKENS, 12)
    np.testing.assert_allclose(found, last, atol=near)


def test_the_adapter_is_what_init_params_adds(family):
    """Its leaves have the shapes of the decoder's own, layer by layer, and only they are made."""
    config, lora, base, _ = family
    key = jax.random.key(5)
    adapter = init_adapter(config, lora, key)
    whole = jax.jit(lambda key: init_params(config, key, lora))(key)
    assert_bitwise_equal(adapter, adapter_of(whole))
    chex.assert_trees_all_equal_shapes(join(base, adapter), whole)
    assert {name for _, name in adapters(adapter)} == set(lora.targets)
    for (stack, name), pair in adapters(adapter).items():
        layers, width_in, width_out = projections(base, stack)[name]["kernel"].shape
        assert pair["lora_a"].shape == (layers, width_in, 3)
        assert pair["lora_b"].shape == (layers, 3, width_out)
        assert 0.8 / width_in < np.square(np.abs(pair["lora_a"]).max()) <= 1 / width_in


def test_join_and_its_inverse(family):
    """{} is neutral on both sides; order does not matter; nothing in common is lost."""
    _, _, base, adapter = family
    joined = join(base, adapter)
    assert join({}, base) is base
    chex.assert_trees_all_equal(join(base, {}), base)
    chex.assert_trees_all_equal(join(adapter, base), joined)
    chex.assert_trees_all_equal(adapter_of(joined), adapter)
    count = len(jax.tree.leaves(base)) + len(jax.tree.leaves(adapter))
    assert len(jax.tree.leaves(joined)) == count
    assert adapter_of(base) == {}
    with pytest.raises(ConfigError, match="parameter embed is frozen and trained"):
        join(base, {"embed": base["embed"]})


def test_the_gradient_is_that_of_merged_weights():
    """By A and B as by autodiff, in float64, of the loss of W + alpha / r A B."""
    with jax.enable_x64(True):
        config, lora, base, adapter = adapted({}, seed=4)
        wide = jax.tree.map(lambda w: jnp.float64(w), (base, adapter))
        aim = np.random.default_rng(1).normal(size=(3, 9, config.hidden_size))
        plain, learner = build(config, jnp.float64), build(config, jnp.float64, lora=lora)

        def by_hand(adapter):
            moved = jax.tree.map(lambda w: w, wide[0])
            for name, pair in projections(adapter).items():
                products = zip(pair["lora_a"], pair["lora_b"], strict=True)
                kernel = projections(moved)[name]["kernel"]
                projections(moved)[name]["kernel"] = kernel + 2.0 * jnp.stack(
                    [a @ b for a, b in products]
                )
            return jnp.sum(aim * plain.hidden(moved, TOKENS))

        def ours(adapter):
            return jnp.sum(aim * learner.hidden(join(wide[0], adapter), TOKENS))

        found, expected = (jax.jit(jax.grad(f))(wide[1]) for f in (ours, by_hand))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(b)


def products(jaxpr) -> list[tuple[int, ...]]:
    """Shapes that matrix products make, in a program and in all that it calls."""
    shapes = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            shapes.append(equation.outvars[0].aval.shape)
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                shapes += products(inner)
    return shapes


@pytest.mark.parametrize(
    ("micro_batches", "remat"),
    by_default([(1, "none"), (2, "none"), (1, "dots"), (2, "dots")], (1, "none"), (2, "dots")),
)
def test_no_gradient_of_what_is_frozen(micro_batches, remat):
    """A step with an adapter makes no product of a kernel's or head's shape; without, it does."""
    config, lora, base, adapter = adapted({"intermediate_size": 40})
    optimizer = make_optimizer(learning_rate=1e-3, steps=9)
    rollout = random_rollout(0, V, [3, 4], [5, 6])
    kernels = {w["kernel"].shape[1:] for w in projections(base).values() if "kernel" in w}
    kernels |= {shape[::-1] for shape in kernels} | {base["embed"].shape, base["embed"].shape[::-1]}
    plain = build(config, remat=remat)
    options = dict(micro_batches=micro_batches, plan=HeadPlan(3))

    def made(model, trained, frozen) -> set:
        step = make_step(model, plain, optimizer, **options)
        arguments = (init_state(trained, optimizer), base, rollout, jnp.nan, frozen)
        return kernels & set(products(jax.make_jaxpr(step)(*arguments).jaxpr))

    assert made(build(config, remat=remat, lora=lora), adapter, base) == set()
    assert len(made(plain, base, None)) >= 5


def test_steps_move_the_adapter_alone():
    """The loss falls; no state but the adapter's; the frozen base may be bfloat16; micro-batches
    do not matter."""
    config, lora, base, _ = adapted({})
    target = adapted({}, seed=8)[2]
    optimizer = make_optimizer(learning_rate=0.02, steps=60, warmup_fraction=0.0)
    rollout = random_rollout(1, V, [3, 4, 2, 5], [6, 6, 5, 6])
    narrow = jax.tree.map(lambda w: w.astype(jnp.bfloat16), base)
    learner, plain = build(config, jnp.bfloat16, lora=lora), build(config)
    step, split = (
        jax.jit(make_step(learner, plain, optimizer, token_loss=forward_kl, micro_batches=n))
        for n in (1, 2)
    )
    adapter = init_adapter(config, lora, jax.random.key(0))
    state, losses = init_state(adapter, optimizer), []
    chex.assert_trees_all_equal_shapes(guard_state(state.opt_state).inner["adamw"][0].mu, adapter)
    one, two = (f(state, target, rollout, jnp.nan, narrow)[1] for f in (step, split))
    np.testing.assert_allclose(one["gradient_norm"], two["gradient_norm"], rtol=0.02)
    for _ in range(20):
        state, metrics = step(state, target, rollout, jnp.nan, narrow)
        losses.append(float(metrics["loss"]))
    chex.assert_trees_all_equal_shapes_and_dtypes(state.params, adapter)
    assert losses[-1] < 0.6 * losses[0]
    sampled = sampling_params(lora, narrow, state.params)
    chex.assert_trees_all_equal_shapes_and_dtypes(sampled, narrow)
    assert_bitwise_equal(sampled["embed"], narrow["embed"])
    exact = merge(join(base, state.params), lora)["layers"]["0"]["mixer"]["q_proj"]["kernel"]
    np.testing.assert_allclose(
        np.float32(sampled["layers"]["0"]["mixer"]["q_proj"]["kernel"]), exact, rtol=0.02, atol=0.02
    )


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (Lora(rank=-1), r"lora.rank of an adapter must be at least 1, got -1"),
        (Lora(rank=2, alpha=0.0), r"lora.alpha must be above 0, got 0.0"),
        (Lora(rank=2, targets=("q_prj",)), r"unknown projection 'q_prj'; there are \['q_proj'"),
        (Lora(alpha=3.0), r"lora.rank is 0, so nothing else of Lora\(.*\) has an effect"),
    ],
)
def test_what_cannot_be_adapted(lora, message):
    """Every mistake of the config is one line that names the field and what it got."""
    with pytest.raises(ConfigError, match=message):
        validate(Config(lora=lora))


def test_experts_have_no_adapter():
    """Their projections are refused by name; without targets the attention is adapted."""
    config = tiny_config(V, **MOE)
    with pytest.raises(ConfigError, match="up_proj is not in this model, or inside its experts"):
        make_lora(config, 2, 4.0, ("q_proj", "up_proj"))
    assert make_lora(config, 2, 4.0, ()).targets == ATTENTION
    assert make_lora(tiny_config(V), 2, 4.0, ()).targets == DENSE


def test_flops_of_an_adapter():
    """Frozen weights spare their dW, 2 a parameter and token; the adapter's own count 6."""
    config = tiny_config(V)
    forward, backward = flops.student(config, 10, 20, 15)
    head = 2 * 20 * V * config.hidden_size
    spared = 30 * 2 * models.parameter_count(config) + head
    with_adapter = flops.student(config, 10, 20, 15, 50)
    assert with_adapter[0] == pytest.approx(forward + 30 * 2 * 50)
    assert with_adapter[1] == pytest.approx(backward + 30 * 4 * 50 - spared)


@pytest.fixture
def small(tiny) -> Config:
    """A run of an adapter that moves far in four steps."""
    return dataclasses.replace(
        tiny, lora=Lora(rank=2, alpha=4.0), optimizer=Optimizer(learning_rate=0.05)
    )


def saved(config: Config):
    """The newest checkpoint's state, read as the adapter of the run's config."""
    model, params = models.load(config.student)
    lora = make_lora(model.config, config.lora.rank, config.lora.alpha, config.lora.targets)
    student = open_student(lora, model.config, params, jax.random.key(0))
    optimizer = optimizer_of(config.curriculum, config.optimizer, timetable(config))
    checkpoints = open_checkpoints(Path(config.run) / "checkpoints")
    step = checkpoints.steps()[-1]
    state = checkpoints.restore(step, init_state(student.trained, optimizer))
    leaves = checkpoints.read_about(step)["leaves"]
    checkpoints.close()
    return state, leaves


@pytest.mark.release
def test_interrupted_equals_uninterrupted(small, tmp_path, monkeypatch):
    """Stopped before step 3 and resumed, across a gate measurement: the same bits and metrics. A
    checkpoint holds the adapter and its moments, and no base leaf."""
    curriculum = dataclasses.replace(small.curriculum, lengths=(4, 8), entropy_threshold_nats=0.1)
    small = dataclasses.replace(small, curriculum=curriculum)
    assert_interrupted_equals_uninterrupted(small, tmp_path, monkeypatch, lambda c: saved(c)[0])
    leaves = saved(small)[1]
    assert "heldout_entropy" in logged(small)[2]
    arrays = [n for n, kind in leaves.items() if not kind.endswith("[]") and "history" not in n]
    assert len(arrays) == 3 * 2 * len(DENSE)
    assert all("lora_a" in name or "lora_b" in name for name in arrays)


def test_samples_are_those_of_merged_weights(small):
    """Under the sampler and the learner the responses have the same log-probability: rollouts see
    the adapter. Training it does more than the model at rest."""
    loop.train(dataclasses.replace(small, prefix="student"))
    for record in logged(small):
        assert record["sampler_logp"] == pytest.approx(record["student_logp"], abs=1e-4)
    before, after = models.load(small.student)[1], load_run(small.run)[1]
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before, after)
    assert moved["embed"] == moved["norm"] == 0
    assert all(projections(moved)[name]["kernel"] > 1e-2 for name in DENSE)


def test_an_exported_run_is_the_adapted_student(small, tmp_path):
    """The folder of merged weights, and base with the folder of the adapter, have the logits that
    the checkpoint's adapter has. The run goes on with the rank it was started with alone, and is
    exported with the base and the config that it was trained by alone."""
    base_folder = tmp_path / "base"
    shutil.copytree(small.student, base_folder)
    small = dataclasses.replace(small, student=str(base_folder))
    loop.train(small)
    with pytest.raises(ConfigError, match=r"lora\.rank: 2 -> 3"):
        loop.train(dataclasses.replace(small, lora=Lora(rank=3, alpha=4.0)))
    export(small.run, tmp_path / "merged")
    export_adapter(small.run, tmp_path / "adapter")
    model, base = models.load(small.student)
    lora = LoRA(2, 4.0, DENSE)
    learner, state = build(model.config, lora=lora), saved(small)[0]

    def logits(model, params):
        return np.asarray(project(model.hidden(params, TOKENS), model.head(params)))

    wanted = logits(learner, join(base, state.params))
    assert np.abs(wanted - logits(model, base)).max() > 1e-2
    np.testing.assert_allclose(logits(*models.load(tmp_path / "merged")), wanted, atol=1e-5)

    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    about = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == str(Path(small.student).resolve())
    assert len(tensors) == 2 * len(DENSE) * model.config.num_hidden_layers
    prefix = "base_model.model.model.layers.1.mlp.down_proj."
    a, b = (tensors[f"{prefix}lora_{x}.weight"] for x in "AB")
    down = base["layers"]["0"]["down_proj"]["kernel"][1]
    kernel = down + about["lora_alpha"] / about["r"] * (b @ a).T
    merged = models.load(tmp_path / "merged")[1]["layers"]["0"]["down_proj"]["kernel"][1]
    np.testing.assert_allclose(kernel, merged, atol=1e-6)
    _refuses_what_changed_since(small, tmp_path)


def _refuses_what_changed_since(run: Config, tmp_path) -> None:
    """It would be merged without a word: another alpha in config.json, a base of other weights."""
    config, weights = Path(run.run) / run_folder.CONFIG, Path(run.student) / "model.safetensors"
    text = config.read_text()
    config.write_text(text.replace('"alpha": 4.0', '"alpha": 5.0'))
    with pytest.raises(DataError, match=r"not what the run was trained by: lora\.alpha: 4\.0 -> 5"):
        load_run(run.run)
    config.write_text(text)
    tensors = load_file(weights)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"trained from another student: the files of .* Put those"):
        export(run.run, tmp_path / "again")
    with pytest.raises(DataError, match="trained from another student"):
        export_adapter(run.run, tmp_path / "adapter again")


def test_no_adapter_to_export(tiny, tmp_path):
    """A run that trained the whole student has none, and says what to do."""
    loop.train(dataclasses.replace(tiny, steps=1))
    with pytest.raises(DataError, match="trained the whole student, no adapter; kdjax export"):
        export_adapter(tiny.run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert files.read_json(Path(tiny.run) / run_folder.CONFIG)["lora"]["rank"] == 0
