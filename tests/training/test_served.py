"""A teacher that an engine scores as: a run against a server of our own model, live and kept."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import even_digits, logged
from serving import CONTEXT, Reply, score_core, serving, sglang_scores, vllm_scores

from kdjax import (
    add,
    clipped_surrogate,
    reverse_divergence,
    scale,
    sequence_mean,
    tail_residual,
    top_share,
)
from kdjax.__main__ import main
from kdjax.config import (
    RL,
    Config,
    Curriculum,
    Data,
    Evaluation,
    Optimizer,
    Rollouts,
    Served,
)
from kdjax.config.overrides import load_file
from kdjax.config.timetable import timetable
from kdjax.config.validation import validate
from kdjax.errors import ConfigError, DataError, EngineError
from kdjax.losses.objectives import log_ratio, policy_gradient, where_teacher_unsure
from kdjax.plan.plan import shapes_of
from kdjax.sharding import make_mesh
from kdjax.storage import trajectories
from kdjax.training import loop as train_module
from kdjax.training.parts import startup, teachers
from kdjax.training.parts.build import asked_of, build, fresh_state
from kdjax.training.parts.precompute import fill
from kdjax.training.parts.precomputed import parse_keep
from kdjax.training.parts.shapes import expected_rollout

K = 6


@pytest.fixture
def tiny(tmp_path, student_folder, teacher_folder) -> Config:
    """Three steps of 8 rows; the served teacher's name is that of serving()'s models."""
    return Config(
        run=str(tmp_path / "run"), cache=str(tmp_path / "cache"), student=str(student_folder),
        teacher=str(teacher_folder), steps=3, batch_size=8, save_every_steps=3,
        log_every_steps=1, optimizer=Optimizer(warmup_fraction=0.0),
        data=Data(terms=(2,), problems=24, max_prompt_tokens=24),
        curriculum=Curriculum(lengths=(8,)),
        evaluation=Evaluation(problems=4, samples=1, k=(1,), max_new_tokens=8, batch_size=8),
    )  # fmt: skip


@pytest.fixture(scope="module")
def core(teacher, tokenizer):
    return score_core(*teacher, tokenizer.size)


@pytest.fixture
def server(core):
    with serving(
        lambda body: vllm_scores(core, body),
        others={"/generate": lambda body: sglang_scores(core, body)},
    ) as server:
        yield server


def by(config: Config, server, **changes) -> Config:
    served = Served(url=server.url, model="tiny", top_k=K, **changes)
    return dataclasses.replace(config, served=served)


def step_of(config: Config):
    """(rollout, metrics) of the first step of a config."""
    parts = build(config)
    state = jax.tree.map(jnp.copy, fresh_state(parts))
    rollout = train_module._rollout(parts, state, 0)
    teacher = parts.teachers[""]
    _, metrics = teacher.programs.steps[0](
        state, teacher.given, rollout, jnp.float32(np.nan), None
    )  # fmt: skip
    return rollout, jax.device_get(metrics)


def kept(config: Config, k: int, name: str) -> Config:
    """The config, reading what its trajectories keep of the teacher's top k."""
    folder = Path(config.run).parent / name
    for asked in asked_of(build(config), config.prefix).values():
        fill(asked, str(folder), parse_keep(f"top_k={k}"), (0, 1), False)
    return dataclasses.replace(config, trajectories=str(folder))


def stored_in(config: Config):
    settings = trajectories.read_settings(Path(config.trajectories))
    return settings, trajectories.reader(Path(config.trajectories), settings)(np.arange(24))


@pytest.mark.parametrize("speaks", ["vllm", "sglang"])
def test_kept_from_an_engine_or_from_here(tiny, server, speaks):
    """`kdjax rollouts --keep top_k`: what the engine says is what the weights say; a run with the
    sampled token's objective trains from either folder alike, without a teacher."""
    engine = kept(by(tiny, server, speaks=speaks), K, "engine's")
    own = kept(tiny, K, "own")
    (settings, theirs), (_, ours) = stored_in(engine), stored_in(own)
    assert (settings["served"], settings["sampled_logp"]) == ("tiny", True)
    np.testing.assert_array_equal(theirs.samples.tokens_bt, ours.samples.tokens_bt)
    np.testing.assert_array_equal(theirs.top_k_bt.ids, ours.top_k_bt.ids)
    for name in ("logp", "sampled_logp", "tail_logp"):
        first, second = (getattr(x.top_k_bt, name) for x in (theirs, ours))
        np.testing.assert_allclose(first, second, atol=2e-5, err_msg=name)
    objective, metrics = add(reverse_divergence, tail_residual), []
    for config in (engine, own):
        alone = dataclasses.replace(config, teacher=None, served=Served(), objective=objective)
        metrics.append(step_of(alone)[1])
    for name, value in metrics[1].items():
        np.testing.assert_allclose(metrics[0][name], value, rtol=1e-3, atol=1e-5, err_msg=name)
    assert metrics[0]["tail_residual"] != 0


def test_a_run_with_a_served_teacher(tiny, server, tmp_path):
    """Live: the same loss as from what is kept of the same rollouts, the tail's mass in the
    metrics, no weights of the teacher, no KL in the evaluation; every row of each step is asked
    for once, and one token first."""
    config = by(tiny, server)
    report = train_module.train(config)
    lines = logged(config)
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert 0 < line["teacher_tail"] < 1
        assert line["teacher_tail_floored"] == 0
        assert np.isfinite(line["teacher_logp"])
        assert line["forward_kl"] > 0
    assert [len(body["prompt"]) for body in server.asked[:1]] == [2]
    assert len(server.asked) == 1 + 3 * 8
    assert report.forward_kl is None
    asked = len(server.asked)
    for name, options in {"alone": [], "taught": ["--teacher", config.teacher]}.items():
        out = tmp_path / f"{name}.json"
        assert main(["evaluate", config.run, "--out", str(out), *options]) == 0
        (found,) = re.findall(r'"forward_kl": (null|[\d.e-]+)', out.read_text())
        assert (found == "null") == (name == "alone")
    assert len(server.asked) == asked
    parts = build(config)
    assert parts.teachers[""].params is None
    rollout, metrics = step_of(config)
    assert rollout.teacher_top_k_bt.ids.shape[-1] == K
    again = dataclasses.replace(parts.config, served=Served())
    whole = step_of(again)[1]
    np.testing.assert_allclose(metrics["loss"], lines[0]["loss"], rtol=1e-6)
    assert metrics["forward_kl"] < whole["forward_kl"]
    np.testing.assert_allclose(metrics["teacher_logp"], whole["teacher_logp"], rtol=1e-4)
    about = (Path(config.run) / "startup.txt").read_text()
    assert f"teacher: an engine at {server.url} scores as tiny" in about


def test_both_ways(tiny, server, monkeypatch):
    """served.check_rows: the weights score what the engine scored; a report has the difference,
    which another model's is not."""
    config = by(tiny, server, check_rows=5)
    found = re.search(
        r"served: the top 6 of (\d+) tokens of 8 prompts are the weights' own at 100.0 %, log p"
        r" within (\S+) nats; student to teacher forward KL (\S+) of (\S+), reverse (\S+) of (\S+)",
        startup.report(build(config)),
    )
    tokens, gap, *kls = map(float, found.groups())
    assert tokens > 8 * 3
    assert gap < 2e-5
    assert 0 < kls[0] < kls[1]
    assert 0 < kls[2] < kls[3]
    other = dataclasses.replace(config, teacher=tiny.student)
    monkeypatch.setattr(teachers, "LARGEST_GAP_NATS", 1e-3)  # random models are near each other
    with pytest.raises(DataError, match=r"another model than .* log p differs by"):
        startup.report(build(other))


def test_its_weights_may_be_elsewhere(tiny, server, tmp_path):
    """A folder of the teacher's config and tokenizer is enough."""
    bare = tmp_path / "bare"
    shutil.copytree(tiny.teacher, bare)
    (bare / "model.safetensors").unlink()
    config = by(dataclasses.replace(tiny, teacher=str(bare)), server)
    _, metrics = step_of(config)
    assert metrics["loss"] > 0
    assert build(config).identities["teacher"]
    with pytest.raises(DataError, match=r"no model\.safetensors"):
        startup.report(
            build(
                dataclasses.replace(config, served=dataclasses.replace(config.served, check_rows=1))
            )
        )


def test_a_plan_holds_no_teacher(tiny):
    """`kdjax plan` of a served teacher: shapes without it, steps that take its top k."""
    config = dataclasses.replace(tiny, served=Served("http://nowhere:1", top_k=K))
    shapes = shapes_of(config)
    assert shapes.teachers == {tiny.teacher: None}
    assert shapes_of(tiny).teachers[tiny.teacher] is not None
    rollout = expected_rollout(config, timetable(config).methods[0], make_mesh(1))
    assert rollout.teacher_top_k_bt.ids.shape == (8, 8, K)


def test_rollouts_ahead_and_sampled_objectives(tiny, server):
    """Drawn ahead, scores come along; log-ratio objectives know the sampled token exactly."""
    config = dataclasses.replace(
        by(tiny, server), rollouts=Rollouts(ahead=True), objective=policy_gradient(log_ratio)
    )
    train_module.train(config)
    assert all("staleness" in line and "teacher_logp" in line for line in logged(config))


def test_a_resumed_run_may_ask_another_server(tiny, server, core):
    """The URL may change; what is asked for may not."""
    config = by(dataclasses.replace(tiny, save_every_steps=1), server)
    train_module.train(dataclasses.replace(config, steps=3))
    with serving(lambda body: vllm_scores(core, body)) as moved:
        train_module.train(by(dataclasses.replace(tiny, save_every_steps=1), moved))
        other = dataclasses.replace(config, served=Served(moved.url, "tiny", top_k=K + 1))
        with pytest.raises(ConfigError, match="served"):
            train_module.train(other)


def test_an_engine_that_refuses_is_named_before_a_step(tiny, server):
    """vLLM without --max-logprobs refuses more than 20; a short context; a model that is not
    served; one that is down."""
    many = by(tiny, server)
    with pytest.raises(EngineError, match=r"greater than max allowed: 20.*one token first"):
        build(dataclasses.replace(many, served=dataclasses.replace(many.served, top_k=21)))
    with pytest.raises(ConfigError, match=f"pass the engine's context of {CONTEXT}"):
        build(dataclasses.replace(many, curriculum=Curriculum(lengths=(60,))))
    with pytest.raises(ConfigError, match="does not serve"):
        build(dataclasses.replace(many, served=Served(server.url, top_k=K)))
    down = Rollouts(engine_retries=0)
    nowhere = dataclasses.replace(many, served=Served("http://127.0.0.1:9"), rollouts=down)
    with pytest.raises(EngineError, match="can't be reached"):
        build(nowhere)


def test_an_engine_that_dies_in_a_run(tiny, core):
    """One line with the row, after the retries."""
    count = []

    def dying(body):
        count.append(body)
        return vllm_scores(core, body) if len(count) <= 12 else Reply(None)

    with serving(dying) as server:
        config = by(dataclasses.replace(tiny, rollouts=Rollouts(engine_retries=0)), server)
        with pytest.raises(EngineError, match=r"scoring row \d: can't be reached") as caught:
            train_module.train(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(served=Served(top_k=3)), "served.url is not set"),
        (dict(served=Served("localhost:1")), "served.url must start with http"),
        (dict(served=Served("http://me:secret@host")), "without a password"),
        (dict(served=Served("http://h", top_k=0)), "served.top_k must be at least 1, got 0"),
        (
            dict(served=Served("http://h"), teacher=None, teachers=("a=x",)),
            "served.url needs teacher beside it",
        ),
        (dict(served=Served("http://h"), stops="merge"), "set stops raw or mask"),
        (dict(served=Served("http://h"), least_aligned=0.5), "set least_aligned None"),
        (dict(served=Served("http://h"), teacher_weights="int8"), "set teacher_weights compute"),
        (dict(served=Served("http://h"), prefix="teacher"), "rollouts.engine"),
        (
            dict(
                served=Served("http://h"),
                objective=where_teacher_unsure(reverse_divergence, 0.5),
            ),
            "objective where_teacher_unsure(reverse_divergence, 0.5) needs more of the teacher",
        ),
        (
            dict(
                served=Served("http://h"),
                reduction=top_share(
                    sequence_mean, where_teacher_unsure(reverse_divergence, 0.5), 0.5
                ),
            ),
            "reduction where_teacher_unsure(reverse_divergence, 0.5) needs more of the teacher",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_does_not_fit_is_said_before_anything_is_loaded(changes, says):
    with pytest.raises(ConfigError) as caught:
        validate(dataclasses.replace(Config(), **changes))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["kdrl", "teacher_advantage", "opd_then_rl", "g_opd"])
def test_rewards_and_a_reference_are_not_the_engines_to_bring(name):
    """What an objective needs beside the teacher comes from where it always does."""
    config = load_file(f"methods/{name}", "get_config")
    assert validate(dataclasses.replace(config, served=Served("http://h")))


def test_a_served_teacher_beside_rewards(tiny, server):
    """KDRL: the reward's term is that of the run by the weights, the buckets' KL at most its."""
    rl = RL(group_size=2, reward=even_digits)
    objective = add(clipped_surrogate(0.2), scale(reverse_divergence, 0.5))
    config = dataclasses.replace(tiny, rl=rl, objective=objective)
    (rollout, metrics), (_, plain) = step_of(by(config, server)), step_of(config)
    assert np.abs(rollout.advantage_bt).max() > 0
    name = "clipped_surrogate(0.2)"
    np.testing.assert_allclose(metrics[name], plain[name], atol=1e-6)
    assert 0 < metrics["reverse_kl"] <= plain["reverse_kl"]


def test_states_are_not_kept_from_an_engine(tiny, server):
    config = by(tiny, server)
    (asked,) = asked_of(build(config), "student").values()
    with pytest.raises(ConfigError, match="--keep states: an engine says no states"):
        fill(asked, None, parse_keep("states"), (0, 1), False)
