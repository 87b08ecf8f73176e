"""A real vLLM draws the student's rollouts: after each update it serves the new weights, and one
that does not is seen."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from real_engine import NAME, widen_heads

from kdjax.config import Config, Curriculum, Data, Evaluation, Optimizer, Rollouts
from kdjax.errors import EngineError
from kdjax.train import loop
from kdjax.train.parts import published

pytestmark = pytest.mark.engine

STEPS, ROWS, LIMIT = 4, 32, 40


def config(student: Path, run: Path, url: str) -> Config:
    return Config(
        run=str(run), cache=str(run.parent / "cache"), student=str(student), steps=STEPS,
        batch_size=ROWS, save_every_steps=STEPS, log_every_steps=1, data=Data(problems=192),
        optimizer=Optimizer(learning_rate=2e-3, warmup_fraction=0.0),
        curriculum=Curriculum(lengths=(LIMIT,)),
        rollouts=Rollouts(engine=url, engine_model=NAME, engine_retries=0, gap_limit_nats=1e-3),
        evaluation=Evaluation(problems=4, samples=1, k=(1,), max_new_tokens=8, batch_size=4),
    )  # fmt: skip


@pytest.fixture
def seconds(monkeypatch):
    """What each part of a publication takes, by its name: a list of seconds."""
    spent: dict[str, list[float]] = {}

    def timed(owner, name):
        act = getattr(owner, name)

        def call(*args, **named):
            began = time.perf_counter()
            made = act(*args, **named)
            spent.setdefault(name, []).append(time.perf_counter() - began)
            return made

        monkeypatch.setattr(owner, name, call)

    timed(published, "reload")
    timed(published.models, "write_folder")
    return spent


def test_it_draws_with_the_weights_of_each_step(start, tmp_path, seconds):
    """Served with a head of its own, the engine follows every update: in the mean over a step's
    tokens its log p is the trainer's to rounding, at each of the steps."""
    student = tmp_path / "student"
    widen_heads(student, 32, "kdjax:student", untied=True)
    server = start(student)
    loop.train(config(student, tmp_path / "run", server.url))
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    lines = [line for line in map(json.loads, text.splitlines()) if "loss" in line]
    gaps = [line["sampler_gap"] for line in lines]
    rms = [line["sampler_gap_squared"] ** 0.5 for line in lines]
    told = {name: [round(s, 2) for s in each] for name, each in seconds.items()}
    print(f"gaps {gaps}, rms {rms}; seconds {told}; loss {[round(x['loss'], 3) for x in lines]}")
    assert len(lines) == len(seconds["reload"]) == STEPS
    assert [line["staleness"] for line in lines] == [0] * STEPS
    assert max(rms) < 1e-4
    assert len({line["loss"] for line in lines}) == STEPS


def test_a_tied_head_stays_stale(start, tmp_path):
    """Served with its head tied, it answers 200 and keeps the old head (docs/engines.md): the
    scored prompts tell, before a row is drawn."""
    tied = tmp_path / "student"
    widen_heads(tied, 32, "kdjax:student")
    assert json.loads((tied / "config.json").read_text())["tie_word_embeddings"]
    server = start(tied)
    with pytest.raises(EngineError, match="version 1: it serves other weights") as caught:
        loop.train(config(tied, tmp_path / "run", server.url))
    print(caught.value)
    assert "\n" not in str(caught.value)
