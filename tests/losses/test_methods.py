"""configs/methods: each is a composition that trains, and runs whose steps take turns."""

from __future__ import annotations

import functools
import runpy
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import bigram, bigram_params, random_rollout

from kdjax import (
    clipped_surrogate,
    extrapolated,
    make_optimizer,
    paced,
    policy_gradient,
    sequence_mean,
)
from kdjax.config import RL, Config, Curriculum, Data, Turn
from kdjax.config.as_json import as_dict, from_dict
from kdjax.config.timetable import Method, timetable
from kdjax.config.validation import validate
from kdjax.errors import ConfigError
from kdjax.sharding import make_mesh
from kdjax.step.score import HeadPlan
from kdjax.step.update import init_state, make_step
from kdjax.training.parts.build import build
from kdjax.training.parts.shapes import expected_rollout

ROOT = Path(__file__).parents[2]
METHODS = sorted((ROOT / "configs/methods").glob("*.py"))
V = 23


def config_of(path: Path) -> Config:
    return runpy.run_path(str(path))["get_config"]()


def as_expected(config: Config, method: Method):
    """A small rollout with random values in the fields that the method's own will bring."""
    rollout = random_rollout(0, V, [3, 6, 1, 2], [5, 7, 2, 6], prompt_width=6, response_width=9)
    own = {
        "own_logp_bt": rollout.sampler_logp_bt,
        "entropy_bt": jnp.asarray(np.random.default_rng(0).uniform(0, 3, (4, 9)), jnp.float32),
        "reference_logp_bt": rollout.sampler_logp_bt - 0.3,
        "old_logp_bt": rollout.sampler_logp_bt,
        "advantage_bt": jnp.where(jnp.arange(4)[:, None] < 2, 1.0, -1.0) * jnp.ones((4, 9)),
        "reward_b": jnp.array([1.0, 0.0, 0.0, 1.0]),
        "pass_rate_b": jnp.array([0.5, 0.5, 0.25, 0.25]),
        "signal_b": jnp.array([True, True, False, False]),
    }
    wanted = expected_rollout(config, method, make_mesh(1))
    brought = {name: value for name, value in own.items() if getattr(wanted, name) is not None}
    return rollout._replace(**brought)


@functools.cache
def optimizer():
    return make_optimizer(learning_rate=0.05, steps=10)


@pytest.mark.parametrize("path", METHODS, ids=lambda p: p.stem)
def test_a_method_is_short_and_trains(path):
    """At most 20 lines of code beside its docstring; every turn's loss moves the parameters by
    finite amounts, and its text in a run's config.json reads back as the same method."""
    names = runpy.run_path(str(path))
    code = path.read_text().replace(names["__doc__"], "")
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    assert f"kdjax train configs/methods/{path.name}" in names["__doc__"]
    config = validate(names["get_config"]())
    assert config.run == f"runs/methods/{path.stem}"
    assert as_dict(from_dict(as_dict(config))) == as_dict(config)
    assert config.batch_size % config.rl.group_size == 0
    for method in timetable(config).methods:
        rollout = as_expected(config, method)
        teacher = bigram() if config.teacher else None
        step = make_step(
            bigram(), teacher, optimizer(), token_loss=method.token_loss,
            objective=method.objective, reduction=config.reduction, steps=config.steps,
            plan=HeadPlan(32),
        )  # fmt: skip
        state = init_state(bigram_params(1, V), optimizer())
        state, metrics = jax.jit(step)(
            state, bigram_params(2, V, width=6) if teacher else None, rollout
        )
        assert np.isfinite(float(metrics["loss"]))
        assert float(metrics["gradient_norm"]) > 1e-3


def test_turns_take_their_shares():
    """Within any run of steps each method has its share to within two; from_step is kept."""
    half = Config(turns=(Turn(share=0.5),))
    thirds = Config(turns=(Turn(share=0.5), Turn(share=1 / 3)))  # 1/3, 1/3, 1/3
    later = Config(turns=(Turn(from_step=40),))
    for config, shares in ((half, (1 / 2, 1 / 2)), (thirds, (1 / 3, 1 / 3, 1 / 3))):
        for first in (0, 17, 1000):
            counts = Counter(timetable(config).turn_at(first + step) for step in range(90))
            for number, share in enumerate(shares):
                assert abs(counts[number] - 90 * share) <= 2
    assert [timetable(later).turn_at(step) for step in range(100)] == [0] * 40 + [1] * 60


def test_methods_of_turns():
    """What a turn leaves out is the config's own."""
    config = Config(prefix="teacher", turns=(Turn(prefix="student", share=0.2),))
    own, other = timetable(config).methods
    assert (own.prefix, other.prefix) == ("teacher", "student")
    assert other._replace(prefix="teacher") == own


@pytest.mark.parametrize(
    ("turn", "says"),
    [
        (Turn(share=0.0), r"share must be in \(0, 1\], got 0.0"),
        (Turn(share=1.5), r"share must be in \(0, 1\], got 1.5"),
        (Turn(from_step=120), r"from_step must be in 0..119"),
        (Turn(prefix="nobody"), "turns.prefix must be"),
        (3, "turns must be"),
    ],
)
def test_turns_that_cannot_be(turn, says):
    """One line with the field and what it got."""
    with pytest.raises(ConfigError, match=says):
        validate(Config(turns=(turn,)))


def test_what_a_later_turn_lacks_is_told_at_once(student_folder, teacher_folder, tmp_path):
    """Not after the steps before it: an objective that needs a reference which is not set."""
    turn = Turn(from_step=100, objective=policy_gradient(extrapolated(2.0)))
    config = Config(
        run=str(tmp_path / "run"), student=str(student_folder), teacher=str(teacher_folder),
        batch_size=8, data=Data(terms=(2,), problems=8, max_prompt_tokens=24), turns=(turn,),
        curriculum=Curriculum(lengths=(8,)),
    )  # fmt: skip
    with pytest.raises(ConfigError, match="set reference"):
        build(validate(config))


def test_distillation_among_rewarded_turns_is_not_grouped():
    """Groups and epochs are for methods that read a reward: by objective, or by reduction."""
    rl = RL(group_size=8, epochs=2)
    surrogate = clipped_surrogate(0.2)
    config = Config(prefix="student", rl=rl, turns=(Turn(share=0.5, objective=surrogate),))
    assert [method.rewarded for method in timetable(config).methods] == [False, True]
    assert (
        timetable(Config(prefix="student", rl=rl, reduction=paced(sequence_mean, 1.0)))
        .methods[0]
        .rewarded
    )
    assert not timetable(Config(prefix="student", objective=surrogate)).methods[0].rewarded


def test_turns_and_trajectories():
    """A folder holds one prefix's responses."""
    with pytest.raises(ConfigError, match="leave trajectories out"):
        validate(Config(turns=(Turn(share=0.5),), trajectories="somewhere"))
