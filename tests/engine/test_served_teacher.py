"""A real vLLM as the teacher of student rollouts: what it says of given tokens is our own teacher's
top k, and a run is trained by it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from real_engine import NAME

from kdjax import models
from kdjax.base import Rollout, random_key
from kdjax.data.batches import encode_batch, task_source
from kdjax.errors import EngineError
from kdjax.losses.topk import TAIL_FLOOR
from kdjax.rollouts.engine_scores import open_scorer
from kdjax.rollouts.prefix import assemble_samples
from kdjax.rollouts.sampler import generate
from kdjax.step.score import HeadPlan, response_top_k, score

pytestmark = pytest.mark.engine

ROWS, LIMIT = 96, 40
GAP_NATS = 5e-5
"""Between two float32 programs of one model: seen 4.5e-5 in 3,234 tokens."""


@pytest.fixture(scope="module")
def rollout(tokenizer) -> Rollout:
    """What the embedded student draws at first, on problems of the embedded task."""
    source = task_source("calc", "test", ROWS, (3, 4, 5, 6))
    batch = encode_batch(source, range(ROWS), tokenizer, max_prompt_tokens=28, max_new_tokens=LIMIT)
    samples = generate(
        *models.load("kdjax:student"), batch, random_key(0), max_new_tokens=LIMIT,
        stop_ids=tokenizer.stop_ids,
    )  # fmt: skip
    return jax.tree.map(np.asarray, assemble_samples(batch, samples))


@pytest.mark.parametrize("k", [1, 8, 20])
def test_its_top_k_is_our_teachers(server, wide_folder, tokenizer, rollout, k):
    """Ids and log-probabilities, the sampled token's too, on student rows; the loss that follows
    is that of our own top k, and the floor of the tail is what lowers reverse KL."""
    size = tokenizer.size
    scorer = open_scorer(server.url, NAME, k=k, vocabulary=size, retries=0, timeout_s=120)
    began = time.perf_counter()
    found = scorer(rollout)
    seconds = time.perf_counter() - began
    plan, teacher = HeadPlan(vocabulary=size), models.load(wide_folder)
    own = jax.tree.map(np.asarray, response_top_k(*teacher, rollout, k=k, plan=plan))
    mask = np.arange(LIMIT)[None] < rollout.response_length_b[:, None]
    np.testing.assert_array_equal(found.ids, own.ids)
    gap = np.abs(found.logp - own.logp).max()
    of_drawn = np.abs(found.sampled_logp - own.sampled_logp).max()
    both = [
        score(*models.load("kdjax:student"), None, None, with_(rollout, top), plan=plan)
        for top in (found, own)
    ]
    kls = [
        [np.asarray(x.forward_kl)[mask].mean(), np.asarray(x.reverse_kl)[mask].mean()] for x in both
    ]
    floored = (found.tail_logp[mask] <= np.log(TAIL_FLOOR) + 1e-6).mean()
    print(
        f"top {k} of {mask.sum()} tokens: log p within {gap:.2g} nats, drawn ones {of_drawn:.2g};"
        f" forward KL {kls[0][0]:.5f} of {kls[1][0]:.5f},"
        f" reverse {kls[0][1]:.4f} of {kls[1][1]:.4f};"
        f" floored {floored:.0%}; {mask.sum() / seconds:.0f} tokens/s"
    )
    assert max(gap, of_drawn) <= GAP_NATS
    assert mask.sum() > 20 * ROWS
    np.testing.assert_allclose(kls[0][0], kls[1][0], rtol=1e-3)
    assert 0.9 * kls[1][1] < kls[0][1] <= kls[1][1] * (1 + 1e-3)


def with_(rollout: Rollout, top) -> Rollout:
    return rollout._replace(teacher_top_k_bt=top)


def test_more_than_it_allows(server, rollout, tokenizer):
    """Its own reason, in one line."""
    scorer = open_scorer(server.url, NAME, k=21, vocabulary=tokenizer.size, retries=0)
    with pytest.raises(EngineError) as caught:
        scorer(rollout)
    print(caught.value)
    assert "20" in str(caught.value)
    assert "\n" not in str(caught.value)


CONFIG = """
from kdjax import Config, add, reverse_divergence, tail_residual
from kdjax.config import Curriculum, Data, Evaluation, Optimizer, Served


def get_config():
    return Config(
        run={run!r}, cache={cache!r}, student="kdjax:student", teacher={teacher!r},
        objective=add(reverse_divergence, tail_residual), steps=6, batch_size=32,
        save_every_steps=6, log_every_steps=1, data=Data(problems=192),
        optimizer=Optimizer(learning_rate=1e-3, warmup_fraction=0.0),
        curriculum=Curriculum(lengths=({limit},)),
        evaluation=Evaluation(problems=4, samples=1, k=(1,), max_new_tokens=8, batch_size=4),
    )
"""


def test_a_run_that_it_teaches(server, wide_folder, tmp_path):
    """`kdjax train --served.url`: the start says what scoring by it changes, and each step of a
    student on its own rollouts is the step of the whole vocabulary's teacher in expectation: its
    first rollout and loss are those of a run with the weights here, less what is told."""
    path, taught = tmp_path / "config.py", {}
    served = ("--served.url", server.url, "--served.model", NAME, "--served.check_rows", "16")
    for name, options in {"served": served, "own": ()}.items():
        run = tmp_path / name
        path.write_text(
            CONFIG.format(run=str(run), cache=str(tmp_path), teacher=str(wide_folder), limit=LIMIT)
        )
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "kdjax", "train", path, *options],
            env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stderr
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        taught[name] = [line for line in lines if "loss" in line]
        losses = [round(line["loss"], 4) for line in taught[name]]
        print(f"{name}: {time.perf_counter() - began:.0f} s, losses {losses}")
    about = (tmp_path / "served" / "startup.txt").read_text()
    said = re.search(r"served: the top 20 of .* log p within (\S+) nats.*", about)
    print(said[0])
    assert float(said[1]) <= GAP_NATS
    theirs, ours = taught["served"], taught["own"]
    assert theirs[0]["student_logp"] == pytest.approx(ours[0]["student_logp"], rel=1e-4)
    assert theirs[0]["teacher_logp"] == pytest.approx(ours[0]["teacher_logp"], abs=1e-4)
    assert theirs[0]["loss"] == pytest.approx(ours[0]["loss"], rel=0.2)  # equal in the mean alone
    assert 0 < theirs[0]["teacher_tail"] < 0.01
    assert theirs[-1]["loss"] < 0.9 * theirs[0]["loss"]
