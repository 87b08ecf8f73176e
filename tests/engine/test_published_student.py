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
from kdjax.training import loop
from kdjax.training.parts import published

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


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    """The embedded student, whose head is its embedding, with heads that vLLM takes."""
    folder = tmp_path_factory.mktemp("models") / "student"
    widen_heads(folder, 32, "kdjax:student")
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    return folder


@pytest.fixture(scope="module")
def served(start, student):
    return start(student)


def test_it_draws_with_the_weights_of_each_step(served, student, tmp_path, seconds):
    """It follows every update, its tied head too: in the mean over a step's tokens its log p is the
    trainer's to rounding, at each of the steps."""
    loop.train(config(student, tmp_path / "run", served.url))
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


def test_a_head_that_stays_stale_is_seen(served, student, tmp_path, monkeypatch):
    """Published tied, as it is, the engine answers 200 and keeps the head that it had: the scored
    prompts tell, before a row is drawn."""
    real = published.models.write_folder
    monkeypatch.setattr(
        published.models, "write_folder", lambda *args, untied: real(*args, untied=False)
    )
    asked = len(served.log.read_text())
    with pytest.raises(EngineError, match=r"version \d: it serves other weights") as caught:
        loop.train(config(student, tmp_path / "run", served.url))
    print(caught.value)
    assert "\n" not in str(caught.value)
    assert '/collective_rpc HTTP/1.1" 200' in served.log.read_text()[asked:]
