"""Runs of the tiny config, and what they left."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kdjax import forward_kl, models, reverse_kl
from kdjax.config import (
    Config,
)
from kdjax.config.timetable import timetable
from kdjax.step.update import init_state
from kdjax.storage import run_folder
from kdjax.storage.checkpoints import open_checkpoints
from kdjax.training import loop as train_module
from kdjax.training.parts.programs import optimizer_of

CELLS = [
    ("teacher", forward_kl),
    ("teacher", reverse_kl),
    ("student", forward_kl),
    ("student", reverse_kl),
]


def final_state(config: Config):
    """The newest checkpoint of a run: (step, state, what was saved beside it)."""
    _, params = models.load(config.student)
    checkpoints = open_checkpoints(Path(config.run) / "checkpoints")
    step = checkpoints.steps()[-1]
    state, about = (
        checkpoints.restore(
            step,
            init_state(
                params,
                optimizer_of(
                    config.curriculum, config.optimizer, timetable(config), config.self_decay
                ),
            ),
        ),
        checkpoints.read_about(step),
    )
    checkpoints.close()
    return step, state, about


def interrupt_at(monkeypatch, step: int):
    """Stop the run as ctrl-C would, before `step` is trained."""
    rollout = train_module._rollout

    def interrupted(parts, state, number):
        if number == step:
            raise KeyboardInterrupt
        return rollout(parts, state, number)

    monkeypatch.setattr(train_module, "_rollout", interrupted)


def assert_bitwise_equal(first, second):
    chex.assert_trees_all_equal_structs(first, second)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def logged(config: Config) -> list[dict]:
    return [
        {k: v for k, v in r.items() if k not in ("seconds", "test_seconds")}
        for r in run_folder.read_metrics(Path(config.run))
    ]


def assert_interrupted_equals_uninterrupted(
    whole: Config, tmp_path, monkeypatch, state_of=lambda config: final_state(config)[1]
):
    """Trains a run of 4 steps in one go, and again stopped before step 3 and gone on with from the
    checkpoint of step 2: the same bits and metrics. Returns the whole run's evaluation."""
    result = train_module.train(whole)
    halves = dataclasses.replace(
        whole, run=str(tmp_path / "halves"), cache=str(tmp_path / "other cache")
    )
    with monkeypatch.context() as patched:
        interrupt_at(patched, 3)
        with pytest.raises(KeyboardInterrupt):
            train_module.train(halves)
    assert checkpoints_of(halves)[-1] == 2
    metrics = Path(halves.run) / run_folder.METRICS
    metrics.write_text(metrics.read_text().replace(".1", ".2"))  # the checkpoint knows better
    train_module.train(halves)
    assert checkpoints_of(halves)[-1] == checkpoints_of(whole)[-1] == 4
    assert_bitwise_equal(state_of(whole), state_of(halves))
    assert logged(whole) == logged(halves)
    assert [r["step"] for r in logged(halves)] == [1, 2, 3, 4]
    return result


def checkpoints_of(config: Config) -> list[int]:
    """The steps of a run's checkpoints."""
    checkpoints = open_checkpoints(Path(config.run) / "checkpoints")
    steps = checkpoints.steps()
    checkpoints.close()
    return steps


def padded(folder: Path, source: str, rows: int) -> str:
    """The model with vocabulary rows that no token has, of logits far above all others."""
    tensors = load_file(Path(source) / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            table = tensors[name]
            tensors[name] = np.concatenate([table, np.full((rows, table.shape[1]), 9.0, "f")])
    shutil.copytree(source, folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["vocab_size"] += rows
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def even_digits(prompt, response, answer) -> float:
    """A reward with signal for a random model: the share of even bytes."""
    return sum(ord(c) % 2 == 0 for c in response) / max(1, len(response))


TAGS = ["add", "sub", "add"]  # of each three rows; add has twice as many problems


def write_problems(path: Path, count: int, tags=TAGS) -> str:
    rows = [
        {"prompt": f"{n}+1=", "answer": str(n + 1), "solution": rf"\boxed{{{n + 1}}}"}
        | ({"tag": tags[n % len(tags)]} if tags else {})
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
