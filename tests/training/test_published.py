"""The student behind an engine: what is published is what draws, and what goes wrong is seen."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from runs import interrupt_at, logged
from safetensors.numpy import load_file
from serving import Reloading, Reply

from kdjax import importance, log_ratio, models, policy_gradient
from kdjax.config import Config, Curriculum, Data, Evaluation, Optimizer, Rollouts
from kdjax.config.validation import validate
from kdjax.errors import ConfigError, DivergedError, EngineError
from kdjax.rollouts.engine_weights import open_check
from kdjax.training import loop as train_module

LIMIT = 8
VLLM = ["/pause?mode=wait", "/collective_rpc", "/reset_prefix_cache", "/resume"]


@pytest.fixture
def tiny(tmp_path, student_folder, teacher_folder) -> Config:
    """Three steps of 8 rows at a rate that moves the student's log-probabilities."""
    return Config(
        run=str(tmp_path / "run"), cache=str(tmp_path / "cache"), student=str(student_folder),
        teacher=str(teacher_folder), steps=3, batch_size=8, save_every_steps=2,
        log_every_steps=1, optimizer=Optimizer(learning_rate=0.01, warmup_fraction=0.0),
        data=Data(terms=(2,), problems=24, max_prompt_tokens=24),
        curriculum=Curriculum(lengths=(LIMIT,)),
        evaluation=Evaluation(problems=4, samples=1, k=(1,), max_new_tokens=8, batch_size=8),
    )  # fmt: skip


@pytest.fixture(scope="module")
def untied(student_folder, tmp_path_factory) -> Path:
    """The student's folder as it is published, with a head of its own."""
    folder = tmp_path_factory.mktemp("untied") / "student"
    _, params = models.load(student_folder)
    models.write_folder(folder, params, student_folder, untied=True)
    return folder


@pytest.fixture
def engine(untied, tokenizer) -> Reloading:
    return Reloading(untied, tokenizer.size, LIMIT)


def by(config: Config, server, **changes) -> Config:
    rollouts = Rollouts(engine=server.url, engine_model="tiny", engine_retries=0, **changes)
    return dataclasses.replace(config, rollouts=rollouts)


def said(caught) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_untied_folder_is_the_same_model(student_folder, untied):
    """Its head is written, and equals the embedding."""
    tensors = load_file(untied / "model.safetensors")
    np.testing.assert_array_equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    model, params = models.load(untied)
    assert not model.config.tie_word_embeddings
    tied, own = models.load(student_folder)
    assert tied.config.tie_word_embeddings
    np.testing.assert_array_equal(model.head(params).weight_vd, tied.head(own).weight_vd)


@pytest.mark.parametrize("speaks", ["vllm", "sglang"])
def test_each_step_draws_with_its_own_weights(tiny, engine, speaks):
    """The sampler gap is rounding at every step; rows are new, versions are the steps, two stay."""
    with engine.serving() as server:
        config = by(tiny, server, engine_speaks=speaks)
        train_module.train(config)
    lines = logged(config)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert [line["staleness"] for line in lines] == [0, 0, 0]
    assert max(line["sampler_gap"] for line in lines) < 2e-5
    assert all("policy_drift" not in line for line in lines)
    assert engine.paths == {"vllm": VLLM, "sglang": ["/update_weights_from_disk"]}[speaks] * 3
    names = [Path(folder).name for folder in engine.folders]
    assert names == ["version-000000", "version-000001", "version-000002"]
    about = (Path(config.run) / "startup.txt").read_text()
    assert f"rollouts: an engine at {server.url} draws the student's, which is published" in about
    assert sorted(p.name for p in (Path(config.run) / "published").iterdir()) == names[1:]


def test_every_other_step(tiny, engine):
    """Rows of weights one update old say so, and have the log-probabilities of those weights."""
    with engine.serving() as server:
        config = dataclasses.replace(
            by(tiny, server, engine_every=2), steps=4, log_every_steps=1,
            objective=importance(policy_gradient(log_ratio), 2.0),
        )  # fmt: skip
        train_module.train(config)
    lines = logged(config)
    assert [line["staleness"] for line in lines] == [0, 1, 0, 1]
    gaps = [line["sampler_gap"] for line in lines]
    assert max(gaps[::2]) < 2e-5 < 1e-3 < min(gaps[1::2])
    for line in lines:
        assert line["policy_drift"] == pytest.approx(line["sampler_gap"], abs=1e-6)
    assert len(engine.folders) == 2


def test_ahead(tiny, engine):
    """Drawn while the step before trains, one update old."""
    with engine.serving() as server:
        config = by(tiny, server, ahead=True)
        train_module.train(config)
    assert [line["staleness"] for line in logged(config)] == [0, 1, 0]  # none across a checkpoint


def test_a_resumed_run_publishes_before_it_draws(tiny, engine, monkeypatch):
    """Its folders of before are gone; the engine, which may have restarted, has the weights."""
    with engine.serving() as server:
        config = by(tiny, server)
        with monkeypatch.context() as patched:
            interrupt_at(patched, 2)
            with pytest.raises(KeyboardInterrupt):
                train_module.train(config)
        assert len(engine.folders) == 2
        _, engine.params = models.load(engine.folders[0])
        train_module.train(config)
    assert [Path(folder).name for folder in engine.folders][2:] == ["version-000002"]
    assert logged(config)[-1]["sampler_gap"] < 2e-5
    assert [p.name for p in (Path(config.run) / "published").iterdir()] == ["version-000002"]


def skipped(engine: Reloading, folder: str):
    """It answers, and keeps what it has."""
    return {"results": [None]}


def half(engine: Reloading, folder: str):
    """Every other tensor is not read (vLLM answers 200 to that)."""
    (old, tree), (_, new) = jax.tree.flatten(engine.params), models.load(folder)
    pairs = enumerate(zip(old, jax.tree.leaves(new), strict=True))
    engine.params = tree.unflatten([pair[at % 2] for at, pair in pairs])
    return {"results": [None]}


FAILURES = {
    "skipped": (skipped, r"version 1: it serves other weights: log p differs by .* moved it by"),
    "half": (half, r"version 1: it serves other weights: log p differs by"),
    "failed": (
        lambda engine, folder: Reply({"error": {"message": "Invalid weights_path"}}, 500),
        r"/collective_rpc of version 1: it refused: .*Invalid weights_path",
    ),
    "says so": (
        lambda engine, folder: {"success": False, "message": "out of memory"},
        r"/collective_rpc of version 1: it failed: .*out of memory",
    ),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_publication_that_fails_is_seen(tiny, engine, failure):
    """At once, in one line: before a row is drawn with weights that are not the student's."""
    act, says = FAILURES[failure]
    load = engine.load
    engine.load = lambda folder: act(engine, folder) if len(engine.folders) > 1 else load(folder)
    with engine.serving() as server, pytest.raises(EngineError, match=says) as caught:
        train_module.train(by(tiny, server))
    assert said(caught).startswith(f"engine at {server.url}, ")
    drawn = [body for body in server.asked if body.get("max_tokens") == LIMIT]
    assert len(drawn) == 8


def test_the_gap_is_red_when_a_version_is_skipped(tiny, engine, monkeypatch):
    """Were the scored prompts not looked at, the step's own gap says it."""
    monkeypatch.setattr(
        "kdjax.training.parts.published.open_check", lambda limit: lambda said, own, of: 0.0
    )
    load = engine.load
    engine.load = lambda folder: (
        load(folder) if len(engine.folders) < 2 else skipped(engine, folder)
    )
    with (
        engine.serving() as server,
        pytest.raises(DivergedError, match="sampler and scorer differ"),
    ):
        train_module.train(by(tiny, server, gap_limit_nats=1e-3))
    assert [line["sampler_gap"] < 2e-5 for line in logged(tiny)] == [True, False]


def test_an_engine_of_another_model(tiny, engine):
    """At the first publication the bound is rollouts.gap_limit_nats."""
    engine.load = lambda folder: skipped(engine, folder)
    engine.params = {**engine.params, "norm": engine.params["norm"] * -3}
    with engine.serving() as server, pytest.raises(EngineError, match="version 0: it serves other"):
        train_module.train(by(tiny, server))


def test_what_the_check_allows():
    """A bfloat16 engine's noise is no fault, however little the weights move; all of a step is."""
    rng = np.random.default_rng(0)
    check, own = open_check(0.1), rng.normal(-2, 1, 500)
    for number in range(5):
        own = own + 1e-4
        check(own + rng.normal(0, 0.02, 500), own, f"v{number}")
    moved = own + rng.normal(0, 0.2, 500)
    with pytest.raises(EngineError, match="v9: it serves other weights"):
        check(own + rng.normal(0, 0.02, 500), moved, "v9")
    check(moved + rng.normal(0, 0.02, 500), moved, "v9")
    with pytest.raises(EngineError, match="differs by nan"):
        check(moved * np.nan, moved, "v10")


def test_wrong_settings(tiny):
    for changes, says in (
        (dict(engine_every=0), "rollouts.engine_every must be at least 1"),
        (dict(engine_every=3), "save_every_steps 2 is not a multiple of rollouts.engine_every 3"),
    ):
        with pytest.raises(ConfigError, match=says):
            validate(dataclasses.replace(tiny, rollouts=Rollouts(**changes)))
