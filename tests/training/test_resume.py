"""Nothing that is saved is there for nothing: a resume that loses any one leaf is seen."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from release import by_default
from tiny import tiny_config

from kdjax import models
from kdjax.config import Config, Curriculum, Data, Evaluation, Faults
from kdjax.errors import DivergedError
from kdjax.runtime import files
from kdjax.step.optimizer import gate_state, guard_state
from kdjax.training import loop as train_module
from kdjax.training import resume
from kdjax.training.parts import build as parts_module

STEPS, RESUMED, BAD = 6, 4, (3, 4)
ENTROPIES = {0: 1.0, 1: 1.0, 2: 1.0, 3: 0.1}  # start, rise, rise, fall back


@pytest.fixture
def config(tmp_path, tokenizer, tokenizer_folder) -> Config:
    """Worked responses, a teacher of one layer, and a gate that has done all that it can do."""
    shape = tiny_config(tokenizer.size, num_hidden_layers=1)
    for seed, name in enumerate(("student", "teacher")):
        models.create(tmp_path / name, shape, tokenizer_folder, seed=seed)
    return Config(
        run=str(tmp_path / "run"),
        student=str(tmp_path / "student"),
        teacher=str(tmp_path / "teacher"),
        prefix="dataset",
        steps=STEPS,
        batch_size=8,
        data=Data(terms=(2,), problems=24, max_prompt_tokens=24),
        curriculum=Curriculum(
            (4, 6, 8), entropy_threshold_share=0.5, policy="fall_back", measure_every_steps=1
        ),
        evaluation=Evaluation(problems=4, samples=2, k=(1, 2), max_new_tokens=8),
        save_every_steps=RESUMED,
        log_every_steps=STEPS,
        faults=Faults(skipped_in_a_row=2),
    )


def test_another_kdjax_that_goes_on_is_said(tmp_path):
    """Orders of problems and the ids of prompts are a version's own, and no identity of a run."""
    now = {"kdjax": "1", "git_commit": "b", "jax": "2"}
    assert resume.about_version(tmp_path, now) == ""
    for before, says in (({"git_commit": "a"}, "git_commit: a -> b"), ({"jax": "1"}, "")):
        files.write_json(tmp_path / "versions.json", now | before)
        said = resume.about_version(tmp_path, now)
        assert (says in said) if says else (said == "")


def kind_of(name: str) -> str:
    """A leaf's name without the parameter that it belongs to: the first moment is one kind."""
    return re.sub(r"\['(layers|embed|head|norm)'\].*", "", name)


@pytest.mark.parametrize("every", by_default([False, True], False), ids=["a kind", "all"])
def test_every_saved_leaf_is_needed(config, monkeypatch, every):
    """Each leaf of the state after step 4 has another value than at the start, and with that value
    in its place (of each leaf, or of one of a kind) the resumed run does not end as the undisturbed
    one does, which it otherwise does: with the same bits, stopped by its second bad update in a
    row."""
    parts = parts_module.build(config)
    teacher, (step,) = parts.teachers[""], parts.teachers[""].programs.steps

    def sometimes_bad(state, given, *rest):
        bad = int(state.step) in BAD
        return step(state, jax.tree.map(lambda x: x * jnp.nan, given) if bad else given, *rest)

    poisoned = teacher._replace(programs=teacher.programs._replace(steps=(sometimes_bad,)))
    parts = parts._replace(teachers={"": poisoned})
    monkeypatch.setattr(
        train_module, "_measure_entropy", lambda parts, state, n: ENTROPIES.get(n, float("nan"))
    )
    saved = {}

    def save(step, state, about):
        saved[step] = jax.tree.map(jnp.copy, state)

    checkpoints, runs = SimpleNamespace(save=save), iter(range(1000))

    def ending(state) -> list[str | bytes]:
        folder = Path(config.run).with_name(f"run{next(runs)}")
        folder.mkdir()
        state = jax.tree.map(jnp.copy, state)  # a step donates it
        try:
            train_module._loop(parts, state, {"seconds": 0.0}, folder, checkpoints)
            stopped = ""
        except DivergedError as error:
            stopped = str(error)
        leaves = jax.tree.leaves(saved[STEPS])
        return [stopped, *(np.asarray(leaf).tobytes() for leaf in leaves)]

    fresh = parts_module.fresh_state(parts)
    undisturbed, half = ending(fresh), saved[RESUMED]
    assert "2 updates in a row" in undisturbed[0]
    assert ending(half) == undisturbed
    assert (guard_state(half.opt_state).in_a_row, gate_state(half.opt_state).stopped) == (1, True)
    leaves, tree = jax.tree.flatten(half)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(half)]
    unseen, seen = [], set()
    for place, (name, first) in enumerate(zip(names, jax.tree.leaves(fresh), strict=True)):
        assert np.asarray(first).tobytes() != np.asarray(leaves[place]).tobytes(), name
        if kind_of(name) in seen and not every:
            continue
        seen.add(kind_of(name))
        lost = tree.unflatten([*leaves[:place], first, *leaves[place + 1 :]])
        if ending(lost) == undisturbed:
            unseen.append(name)
    assert unseen == []
