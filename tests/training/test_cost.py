"""What a run costs, by part: by hand from its logged lengths, and its quality during training."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
from runs import assert_bitwise_equal, assert_interrupted_equals_uninterrupted, final_state

from kdjax import clipped_surrogate, models
from kdjax.config import RL, Config, Turn
from kdjax.errors import DataError
from kdjax.models import flops
from kdjax.storage import run_folder
from kdjax.training import loop as train_module
from kdjax.training.cost import PARTS, open_account, spent
from kdjax.training.parts.build import build


def sizes_of(config, rows: float, length: float):
    """(prompt tokens, new tokens, mean length) of so many rows."""
    parts = build(config)
    prompts = [
        len(parts.tokenizer.encode_prompt(parts.problems.source.problem(i).prompt))
        for i in range(24)
    ]
    return rows * np.mean(prompts), rows * length, np.mean(prompts) + length


@pytest.mark.parametrize("prefix", ["student", "teacher"])
def test_parts_by_hand(tiny, prefix):
    """5 steps of 8 rows at length 6 on 24 problems: 40 rows read and trained; drawn are 40 by the
    student, or by the teacher each problem once."""
    config = dataclasses.replace(tiny, prefix=prefix)
    student, teacher = (models.read_config(Path(n)) for n in (config.student, config.teacher))
    found = open_account(build(config))(0, 5, {"response_length": 6.0})
    sizes = sizes_of(config, 40, 6.0)
    forward, backward = flops.student(student, *sizes)
    own = {"student": (student, 40), "teacher": (teacher, 24)}[prefix]
    assert found == pytest.approx(
        {
            "flops_sampling": flops.response(own[0], *sizes_of(config, own[1], 6.0)),
            "flops_teacher": flops.response(teacher, *sizes),
            "flops_student_forward": forward,
            "flops_student_backward": backward,
        },
        rel=1e-12,
    )


def test_steps_add_up(tiny):
    """However the steps are divided, and also where an epoch ends between (after step 3)."""
    cost = open_account(build(dataclasses.replace(tiny, prefix="teacher")))
    five, three = {"response_length": 5.0}, {"response_length": 3.0}
    for name, whole in cost(0, 6, five).items():
        assert cost(0, 2, five)[name] + cost(2, 6, five)[name] == pytest.approx(whole, rel=1e-12)
    assert cost(3, 6, five)["flops_sampling"] == 0.0
    records = [{"step": 2, **five}, {"step": 6, **three}]
    assert spent(cost, records)["flops_teacher"] == pytest.approx(
        cost(0, 2, five)["flops_teacher"] + cost(2, 6, three)["flops_teacher"]
    )


@pytest.mark.parametrize("length", [{}, {"response_length": [3.0]}])
def test_a_record_of_no_length(tiny, length):
    """Metrics that were edited: one line instead of a cost that can't be."""
    with pytest.raises(DataError, match="step 3 have no response_length"):
        spent(
            open_account(build(tiny)), [{"step": 2, "response_length": 4.0}, {"step": 3, **length}]
        )


def test_groups_that_are_drawn_anew(tiny):
    """Sampling costs what was drawn, in rewarded steps alone: three rows for each of 8 in steps 2
    and 3, one before. Nothing else does."""
    config = dataclasses.replace(
        tiny, rl=RL(4, redraws=2), turns=(Turn(from_step=2, objective=clipped_surrogate(0.2)),)
    )
    cost, once = open_account(build(config)), {"response_length": 6.0}
    plain, redrawn = cost(0, 4, once), cost(0, 4, once | {"draws": 3.0})
    assert redrawn["flops_sampling"] == pytest.approx(2 * plain["flops_sampling"], rel=1e-12)
    assert plain | {"flops_sampling": 0} == redrawn | {"flops_sampling": 0}


def test_the_teacher_draws_for_what_it_is_asked(tiny):
    """A turn of half of the steps: drawn once for each problem that those steps visit, however the
    steps are divided, and not for as many as there are visits."""
    half = dataclasses.replace(tiny, steps=8, turns=(Turn(share=0.5, prefix="teacher"),))
    parts = build(half)
    asked = [n for n in range(8) if parts.table.at(n).prefix == "teacher"]
    rows = [row for n in asked for row in parts.problems.batch_at(n)[1]]
    distinct = len({*rows})
    assert 0 < distinct < len(rows) < 8 * 8
    cost, six = open_account(parts), {"response_length": 6.0}
    whole = cost(0, 8, six)["flops_sampling"]
    student, teacher = (models.read_config(Path(n)) for n in (half.student, half.teacher))
    drawn = flops.response(teacher, *sizes_of(half, distinct, 6.0))
    own = flops.response(student, *sizes_of(half, 8 * 8 - len(rows), 6.0))
    assert whole == pytest.approx(own + drawn)
    for cut in range(1, 8):
        divided = [cost(*steps, six)["flops_sampling"] for steps in ((0, cut), (cut, 8))]
        assert sum(divided) == pytest.approx(whole)


@pytest.mark.parametrize("ahead", [False, True])
def test_the_old_policy_is_read_where_nothing_brings_it(tiny, ahead):
    """Two updates over one rollout: a forward pass more for the policy that drew, but for rollouts
    that were drawn ahead, which have its log-probabilities."""
    rollouts = dataclasses.replace(tiny.rollouts, ahead=ahead)
    grpo = dataclasses.replace(tiny, objective=clipped_surrogate(0.2), rollouts=rollouts)
    once, twice = (
        open_account(build(dataclasses.replace(grpo, rl=RL(4, epochs=epochs))))(
            0, 4, {"response_length": 6.0}
        )["flops_student_forward"]
        for epochs in (1, 2)
    )
    assert twice == pytest.approx((2 if ahead else 3) * once)


def with_tests(config: Config, run: Path) -> Config:
    """The run with three samples of each problem after every step."""
    evaluation = dataclasses.replace(config.evaluation, every_steps=1, samples_during_training=3)
    return dataclasses.replace(config, run=str(run), evaluation=evaluation)


@pytest.mark.release
def test_tests_are_resumed(tiny, tmp_path, monkeypatch):
    """A run that is tested while it trains logs the same where it was interrupted."""
    tested = with_tests(tiny, tmp_path / "tested")
    assert_interrupted_equals_uninterrupted(tested, tmp_path, monkeypatch)


def test_a_run_logs_its_cost_and_its_quality(tiny, tmp_path):
    """Cumulative parts in the metrics, whose last sum is the report's total; tested at the steps
    that were asked for; training is untouched."""
    plain, tested = tiny, with_tests(tiny, tmp_path / "tested")
    train_module.train(plain)
    result = train_module.train(tested)
    assert_bitwise_equal(final_state(plain)[1], final_state(tested)[1])
    records = run_folder.read_metrics(Path(tested.run))
    assert result.flops_by_part == {name: records[-1][name] for name in PARTS}
    assert result.training_flops == sum(result.flops_by_part.values())
    assert all(a[n] < b[n] for a, b in itertools.pairwise(records) for n in PARTS)
    for record in records:
        assert len(record["test_correct"]) == 4
        assert record["test_avg"] == sum(record["test_correct"]) / 12
        assert 0 < record["test_length"] <= 8
        assert record["test_entropy"] > 0
    assert not any(name.startswith("test_") for name in run_folder.read_metrics(Path(plain.run))[0])


def test_the_time_of_tests_is_not_training(tiny, monkeypatch):
    """Tests that take 100 seconds each leave the training seconds as they are."""
    evaluation = dataclasses.replace(tiny.evaluation, every_steps=2)
    clock, real = [0.0], train_module.time.perf_counter

    def slow(parts, params, step):
        clock[0] += 100.0
        return {}

    monkeypatch.setattr(train_module, "progress_of", slow)
    monkeypatch.setattr(train_module.time, "perf_counter", lambda: real() + clock[0])
    result = train_module.train(dataclasses.replace(tiny, evaluation=evaluation))
    records = run_folder.read_metrics(Path(tiny.run))
    assert [r["test_seconds"] > 100 for r in records if "test_seconds" in r] == [True, True]
    assert records[-1]["seconds"] < 100
    assert result.training_seconds < 100
