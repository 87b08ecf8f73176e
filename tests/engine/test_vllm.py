"""A real vLLM on this machine's CPU: its answers are our model's, to the token and to rounding, and
its ends are one line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import jax
import numpy as np
import pytest
from real_engine import NAME, VERSION, widen_heads

from kdjax import models
from kdjax.base import Batch, Samples, Sampling, random_key
from kdjax.data.batches import encode_batch, task_source
from kdjax.errors import EngineError
from kdjax.numerics import project
from kdjax.rollouts import engine as engine_module
from kdjax.rollouts.engine import open_engine
from kdjax.rollouts.prefix import assemble_samples
from kdjax.rollouts.sampler import generate
from kdjax.step.score import response_states, sampled_logp
from kdjax.storage import trajectories

pytestmark = pytest.mark.engine

ROWS, LIMIT = 64, 40
GAP_NATS = 5e-5
"""Between two float32 programs of one model: seen 1.7e-5 in 12,441 tokens."""


@pytest.fixture(scope="module")
def teacher(wide_folder):
    return models.load(wide_folder)


@pytest.fixture(scope="module")
def batch(tokenizer) -> Batch:
    source = task_source("calc", "test", ROWS, (3, 4, 5, 6))
    return encode_batch(
        source, range(ROWS), tokenizer, max_prompt_tokens=28, max_new_tokens=LIMIT
    )  # fmt: skip


@pytest.fixture
def opened(server, tokenizer):
    """opened(...) -> Sampler on the server, of the served teacher."""

    def call(**changes):
        known = dict(stop_ids=tokenizer.stop_ids, vocabulary=tokenizer.size, retries=0)
        return open_engine(server.url, NAME, **{"timeout_s": 120, **known, **changes})

    return call


def draw(sampler, batch: Batch, seed: int = 0, limit: int = LIMIT) -> Samples:
    return sampler(None, batch, random_key(seed), limit)


def take(batch: Batch, rows) -> Batch:
    return jax.tree.map(lambda x: x[np.asarray(rows)], batch)


def mask_of(samples: Samples) -> np.ndarray:
    return np.arange(samples.tokens_bt.shape[1])[None] < np.asarray(samples.length_b)[:, None]


def logits(decoder, batch: Batch, samples: Samples) -> np.ndarray:
    """The model's before each token of these responses, float64 [tokens, V]."""
    model, params = decoder
    compute = jax.jit(lambda p, r: project(response_states(model, p, r), model.head(p)))
    whole = compute(params, assemble_samples(batch, samples))
    return np.asarray(whole, np.float64)[mask_of(samples)]


def test_wider_heads_are_the_same_function(teacher, batch):
    """What is served here computes what the embedded teacher does."""
    worked = Samples(
        batch.response_bt, batch.response_length_b, None,
        np.zeros(batch.response_bt.shape, np.float32), None, np.zeros(ROWS, np.int32),
    )  # fmt: skip
    wide, own = (logits(m, batch, worked) for m in (teacher, models.load("kdjax:teacher")))
    assert own.std() > 3
    np.testing.assert_allclose(wide, own, atol=2e-4)


def test_the_version_is_that_of_the_docs(server):
    """docs/engines.md says what was seen, and with which version."""
    with urllib.request.urlopen(f"{server.url}/version") as answer:
        assert json.load(answer) == {"version": VERSION}
    page = Path(__file__).parents[2] / "docs" / "engines.md"
    assert f"vLLM {VERSION} on a CPU" in page.read_text()


def test_ids_in_and_ids_out(opened, batch, tokenizer, monkeypatch):
    """Its answers hold the ids that it was sent and those that it drew, the stop token last with a
    log-probability; their text, tokenised, would be others."""
    answers = []

    def read(text, **asked):
        answers.append((json.loads(text)["choices"][0], asked["prompt"]))
        return real(text, **asked)

    real = engine_module.read_answer
    monkeypatch.setattr(engine_module, "read_answer", read)
    draw(opened(), batch)
    assert len(answers) == ROWS
    for choice, prompt in answers:
        ids, said = choice["token_ids"], choice["logprobs"]
        assert choice["prompt_token_ids"] == prompt
        assert said["tokens"] == [f"token_id:{i}" for i in ids]
        assert len(said["token_logprobs"]) == len(ids)
        stopped = ids[-1] in tokenizer.stop_ids
        assert choice["finish_reason"] == ("stop" if stopped else "length")
    assert {choice["finish_reason"] for choice, _ in answers} == {"stop", "length"}
    assert any(tokenizer.encode(c["text"]) != c["token_ids"] for c, _ in answers)


def test_log_probabilities_are_the_scorers(opened, teacher, batch):
    """Of plain samples, within rounding of what reads every rollout here."""
    samples = draw(opened(), batch)
    rollout, mask = assemble_samples(batch, samples), mask_of(samples)
    wanted = np.asarray(sampled_logp(*teacher, rollout))
    gaps = np.abs(samples.logp_bt - wanted)[mask]
    print(f"{len(gaps)} tokens: largest gap {gaps.max():.2g}, mean {gaps.mean():.2g} nats")
    assert len(gaps) > 25 * ROWS
    assert gaps.max() <= GAP_NATS
    assert wanted[mask].min() < -1
    np.testing.assert_array_equal(samples.sampler_logp_bt, samples.logp_bt)


def test_greedy_is_the_own_sampler(opened, teacher, tokenizer, batch):
    """Token for token, with the same ends; log p is the scorer's."""
    samples = draw(opened(sampling=Sampling(0.0)), batch)
    own = generate(
        *teacher, batch, random_key(0), max_new_tokens=LIMIT, stop_ids=tokenizer.stop_ids,
        sampling=Sampling(0.0),
    )  # fmt: skip
    for name in ("tokens_bt", "length_b", "stop_b"):
        np.testing.assert_array_equal(getattr(samples, name), getattr(own, name), name)
    assert 0 < samples.truncated_b.sum() < ROWS
    np.testing.assert_allclose(samples.logp_bt, own.logp_bt, atol=GAP_NATS)
    np.testing.assert_array_equal(samples.sampler_logp_bt, 0)


CUTS = Sampling(0.7, top_p=0.9, top_k=5)


@pytest.mark.parametrize("sampling", [Sampling(1.5), Sampling(2.0, top_k=4), CUTS], ids=str)
def test_cut_sampling_is_ours(opened, teacher, batch, sampling):
    """`drawn` under processed_logprobs: sampler_logp is the log-probability of the distribution
    that the settings define, worked out in float64; tokens that it leaves out are never drawn."""
    samples = draw(opened(sampling=sampling, log_probs="drawn"), batch)
    mask = mask_of(samples)
    scaled = logits(teacher, batch, samples) / sampling.temperature
    order = np.argsort(-scaled, axis=1)
    best = np.take_along_axis(scaled, order, 1)[:, : sampling.top_k or None]
    weights = np.exp(best - best[:, :1])
    weights /= weights.sum(1, keepdims=True)
    weights *= weights.cumsum(1) - weights < sampling.top_p  # to the first that passes it
    drawn = samples.tokens_bt[mask][:, None] == order[:, : best.shape[1]]
    found = (weights * drawn).sum(1) / weights.sum(1)
    assert (found > 0).all()
    np.testing.assert_allclose(samples.sampler_logp_bt[mask], np.log(found), atol=GAP_NATS)
    assert samples.logp_bt is None


def test_a_key_is_a_draw(opened, batch):
    """The same key gives the same rows, alone, in another order or one at a time; another key
    gives others."""
    samples = draw(opened(), batch)
    again = draw(opened(at_once=1), take(batch, [9, 3, 50]))
    np.testing.assert_array_equal(again.tokens_bt, samples.tokens_bt[[9, 3, 50]])
    np.testing.assert_array_equal(draw(opened(), batch).tokens_bt, samples.tokens_bt)
    other = draw(opened(), batch, seed=1)
    assert (other.tokens_bt != samples.tokens_bt).any(axis=1).sum() > ROWS // 4


CONFIG = """
from kdjax import Config, forward_kl
from kdjax.config import Curriculum, Data, Evaluation, Optimizer


def get_config():
    return Config(
        run={run!r}, cache={cache!r}, student="kdjax:student", teacher={teacher!r},
        prefix="teacher", token_loss=forward_kl, steps=4, batch_size=64, save_every_steps=4,
        log_every_steps=1, data=Data(problems=64), optimizer=Optimizer(learning_rate=3e-4),
        curriculum=Curriculum(lengths=({limit},)),
        evaluation=Evaluation(problems=4, samples=1, k=(1,), max_new_tokens=8, batch_size=4),
    )
"""


@pytest.fixture
def config(tmp_path, wide_folder) -> Path:
    path, names = tmp_path / "config.py", {name: str(tmp_path / name) for name in ("run", "cache")}
    path.write_text(CONFIG.format(teacher=str(wide_folder), limit=LIMIT, **names))
    return path


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "kdjax", *map(str, arguments)]


def kdjax(*arguments: object) -> subprocess.CompletedProcess:
    """A command, on one device."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    return subprocess.run(
        command(*arguments), env=environment, capture_output=True, text=True, timeout=900
    )


def by(server) -> tuple[str, ...]:
    return "--rollouts.engine", server.url, "--rollouts.engine_model", NAME


def said_by(done: subprocess.CompletedProcess) -> str:
    """The one line of a command that failed by an engine."""
    assert done.returncode == EngineError.exit_code, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("kdjax: engine at http://127.0.0.1:")
    return line


def test_trajectories_are_drawn_kept_and_trained_on(server, config, tmp_path):
    """`kdjax rollouts` by the engine, keeping the teacher's top 8, then four steps from the folder
    without a teacher: what was kept is what the engine said of its own tokens, and the loss falls.
    """
    kept = tmp_path / "kept"
    drawn = kdjax("rollouts", config, *by(server), "--keep", "top_k=8", "--out", kept)
    assert drawn.returncode == 0, drawn.stderr
    settings = trajectories.read_settings(kept)
    assert settings["engine"] == NAME
    found = trajectories.reader(kept, settings)(np.arange(64))
    samples, top, mask = found.samples, found.top_k_bt, mask_of(found.samples)
    own = (top.ids == samples.tokens_bt[..., None]) & mask[..., None]
    assert own.any(-1)[mask].mean() > 0.97
    gaps = np.abs(top.logp - samples.sampler_logp_bt[..., None])[own]
    assert gaps.max() <= GAP_NATS

    trained = kdjax("train", config, "--trajectories", kept, "--teacher", "None")
    assert trained.returncode == 0, trained.stderr
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
    assert len(losses) == 4
    assert losses[-1] < 0.95 * losses[0] < 1  # each step takes all of the problems


def test_a_server_that_cuts_prompts_is_ended_by_seeds(start, wide_folder, batch, tokenizer):
    """A row with a seed whose prompt is prefilled in two pieces kills vLLM on a CPU: what
    docs/engines.md warns of. Without seeds it draws; the line holds its first answer."""
    small = start(wide_folder, max_num_batched_tokens="40", max_num_seqs="8")
    known = dict(stop_ids=tokenizer.stop_ids, vocabulary=tokenizer.size, retries=2, timeout_s=60)
    assert (draw(open_engine(small.url, NAME, seeds=None, **known), batch).length_b > 0).all()
    with pytest.raises(EngineError) as caught:
        draw(open_engine(small.url, NAME, **known), batch)
    print(caught.value)
    assert "500 - " in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "CPU Generator does not use offset" in small.log.read_text()


def test_heads_that_it_does_not_serve(start, config, tmp_path):
    """The embedded teacher itself has heads of 24: the server is well until it is asked, answers
    500 and is gone. The line holds that answer."""
    widen_heads(tmp_path / "own", 24)
    narrow = start(tmp_path / "own")
    line = said_by(kdjax("rollouts", config, *by(narrow), "--rollouts.engine_retries", 2))
    print(line)
    assert "500 - " in line
    assert "head_dim=24" in narrow.log.read_text()


def test_a_server_that_is_killed(server, config, tmp_path):
    """While it draws, and before: one line, code 69, and no chunk that is not whole."""
    kept = tmp_path / "kept"
    arguments = ("rollouts", config, *by(server), "--rollouts.engine_retries", 1, "--out", kept)
    arguments += ("--data.problems", 2000)
    ended = threading.Event()

    def kill():
        while server.log.read_text()[before:].count("POST /v1/completions") < 5:
            if ended.wait(0.02):
                return
        server.kill()

    before = len(server.log.read_text())
    killer = threading.Thread(target=kill)
    killer.start()
    try:
        line = said_by(kdjax(*arguments))
    finally:
        ended.set()
        killer.join()
    assert re.search(r", row \d+: can't be reached \(.*\), tried 2 times; is it up\?$", line)
    assert not server.answers()
    assert [*kept.glob("chunk-*/sha256.json")] == []
    assert "is it up?" in said_by(kdjax(*arguments))
