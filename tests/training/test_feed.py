"""Rewarded groups: whose rows they are, what is drawn anew, and a run that is trained on them."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import assert_bitwise_equal, assert_interrupted_equals_uninterrupted, even_digits, logged
from tiny import random_rollout

from kdjax import (
    add,
    clipped_surrogate,
    divergence,
    forward_kl,
    importance,
    reverse_kl,
    scale,
    standardized,
    token_mean,
    with_signal,
)
from kdjax.base import Problem
from kdjax.config import RL, Config, Turn
from kdjax.config.timetable import timetable
from kdjax.config.validation import validate
from kdjax.errors import ConfigError, DataError
from kdjax.grading import rewards
from kdjax.grading.answers import Graded, Outcome
from kdjax.grading.rewards import accuracy, math, open_rewarder
from kdjax.step import score as score_module
from kdjax.training import feed
from kdjax.training import loop as train_module
from kdjax.training.feed import _rewards, draw, with_old_policy
from kdjax.training.parts.build import build, fresh_state


def nothing(prompt, response, answer) -> float:
    return 0.25


@pytest.fixture
def rewarded(tiny) -> Config:
    """GRPO with four samples of two problems a step."""
    return dataclasses.replace(
        tiny, teacher=None, objective=clipped_surrogate(0.2), rl=RL(4, even_digits)
    )


def test_groups(rewarded):
    """Rows of a group share a prompt, are drawn apart, and their advantages sum to zero; the
    problems are the step's batch, one a group, so that an epoch shows each; the same call draws
    the same."""
    parts = build(validate(rewarded))
    rollout = draw(parts, fresh_state(parts).params, 3, 8, 0)
    tokens, lengths = np.asarray(rollout.tokens_bs), np.asarray(rollout.prompt_length_b)
    prompts = [tuple(row[:n]) for row, n in zip(tokens, lengths, strict=True)]
    assert len(set(prompts[:4])) == len(set(prompts[4:])) == 1
    wanted = parts.problems.batch_at(3)[1]
    size = parts.problems.source.size
    epoch = {row for step in range(size // 2) for row in parts.problems.batch_at(step)[1]}
    assert epoch == set(range(size))
    texts = [parts.problems.source.problem(index).prompt for index in wanted]
    for text, prompt in zip(texts, (prompts[0], prompts[4]), strict=True):
        assert text in parts.tokenizer.decode(list(prompt))
    assert len({tuple(row) for row in tokens}) == 8
    advantage = np.asarray(rollout.advantage_bt)[:, 0].reshape(2, 4)
    np.testing.assert_allclose(advantage.sum(axis=1), 0, atol=1e-5)
    reward = np.asarray(rollout.reward_b).reshape(2, 4)
    np.testing.assert_allclose(
        np.asarray(rollout.pass_rate_b).reshape(2, 4),
        (reward > 0).mean(1, keepdims=True).repeat(4, 1),
    )
    assert (np.argsort(advantage, axis=1) == np.argsort(reward, axis=1)).all()
    again = draw(parts, fresh_state(parts).params, 3, 8, 0)
    assert_bitwise_equal(rollout, again)


def test_thinking_that_the_prompt_opens_is_not_rewarded(tokenizer):
    r"""A box in thinking that was cut off earns nothing, one behind </think> does."""
    texts = [r"\boxed{2}", r"</think>\boxed{2}"]
    ids = [tokenizer.encode(text) for text in texts]
    rollout = SimpleNamespace(
        tokens_bs=np.array([row + [0] * (20 - len(row)) for row in ids]),
        prompt_length_b=[0, 0],
        response_length_b=[len(row) for row in ids],
    )
    source = SimpleNamespace(problem=lambda index: Problem("a", "1+1=", "2"))
    for opens, wanted in ((True, [0.0, 1.0]), (False, [1.0, 1.0])):
        parts = SimpleNamespace(
            tokenizer=tokenizer._replace(opens_thinking=opens),
            problems=SimpleNamespace(source=source),
            rewarder=open_rewarder(accuracy),
        )
        assert _rewards(parts, np.zeros(2, int), rollout).value_b.tolist() == wanted


def test_another_problem_takes_the_place_of_a_group_without_signal(rewarded):
    """The first problem's rewards are all equal, and so are those of the one that is asked in its
    place; at the second redraw they differ: it is taken. The other group stays as it was."""
    calls: list[str] = []

    def flat_for_some(prompt, response, answer):
        calls.append(prompt)
        return 0.5 if prompt in flat else even_digits("", response, "")

    plain = build(validate(rewarded))
    asked = [plain.problems.batch_at(0, redraw)[1] for redraw in range(3)]
    prompts = [[plain.problems.source.problem(index).prompt for index in rows] for rows in asked]
    flat = (prompts[0][0], prompts[1][0])
    before = draw(plain, fresh_state(plain).params, 0, 8, 0)
    redrawing = dataclasses.replace(
        rewarded, rl=RL(4, flat_for_some, redraws=3),
        rollouts=dataclasses.replace(rewarded.rollouts, reward_workers=1),
    )  # fmt: skip
    parts = build(validate(redrawing))
    calls.clear()  # a run may try a reward before it begins
    after = draw(parts, fresh_state(parts).params, 0, 8, 0)
    assert calls.count(prompts[0][1]) == 4
    assert sorted(calls[8:]) == sorted([prompts[1][0]] * 4 + [prompts[2][0]] * 4)
    old, new = np.asarray(before.tokens_bs), np.asarray(after.tokens_bs)
    width = min(old.shape[1], new.shape[1])
    np.testing.assert_array_equal(old[4:, :width], new[4:, :width])
    start = int(after.prompt_length_b[0])
    assert prompts[2][0] in parts.tokenizer.decode(new[0, :start].tolist())
    assert float(jnp.ptp(after.reward_b[:4])) > 0
    assert np.asarray(after.draws_b).tolist() == [3] * 4 + [1] * 4
    assert after.signal_b.all()


def test_redraws_ask_other_problems(rewarded):
    """Each redraw is a batch of its own order; a run of another seed has others."""
    problems = build(validate(rewarded)).problems
    asked = [tuple(problems.batch_at(0, redraw)[1]) for redraw in range(4)]
    assert len({*asked}) == 4
    assert len({*sum(asked, ())}) > 4
    assert asked[1] != tuple(problems._replace(seed=1).batch_at(0, 1)[1])


def test_length_alone_is_no_signal(rewarded, monkeypatch):
    """All answers wrong, and each response longer than the one before: no advantage, and DAPO's
    mean over tokens holds neither their losses nor their tokens; where answers differ, length
    counts."""
    penalty = -np.arange(8) / 8
    monkeypatch.setattr(feed, "overlong_penalty", lambda *lengths: penalty)

    def drawn(reward):
        shaped = dataclasses.replace(rewarded, rl=RL(4, reward, overlong_penalty=0.5))
        parts = build(validate(shaped))
        return draw(parts, fresh_state(parts).params, 3, 8, 0)

    wrong, right = drawn(nothing), drawn(even_digits)
    assert not wrong.signal_b.any()
    np.testing.assert_array_equal(wrong.advantage_bt, 0.0)
    mask = jnp.ones(wrong.advantage_bt.shape, bool)
    np.testing.assert_array_equal(with_signal(token_mean)(mask, wrong), 0.0)
    assert right.signal_b.all()
    shaped = np.asarray(right.reward_b, np.float64) + 0.5 * penalty
    wanted = standardized(shaped.reshape(2, 4)).ravel()
    np.testing.assert_allclose(np.asarray(right.advantage_bt)[:, 0], wanted, atol=1e-5)


def test_a_middle_reward_is_part_of_the_signal(rewarded):
    """A sample whose advantage is 0, as its reward is its group's mean, is not without signal."""
    given = itertools.cycle([0.0, 0.5, 1.0, 0.5])
    one = dataclasses.replace(rewarded.rollouts, reward_workers=1)
    ladder = RL(4, lambda prompt, response, answer: next(given))
    config = dataclasses.replace(rewarded, steps=1, rl=ladder, rollouts=one)
    train_module.train(config)
    assert logged(config)[0]["reward_signal"] == 1.0


def test_no_signal_leaves_the_parameters(rewarded):
    """Equal rewards: redrawn in vain, an advantage of 0, a gradient of exactly 0."""
    config = dataclasses.replace(rewarded, steps=1, rl=RL(4, nothing, redraws=2))
    train_module.train(config)
    record = logged(config)[0]
    assert record["gradient_norm"] == record["loss"] == record["reward_signal"] == 0
    assert record["reward"] == 0.25
    assert record["draws"] == 3.0


@pytest.mark.release
def test_interrupted_equals_uninterrupted(rewarded, tmp_path, monkeypatch, teacher_folder):
    """Rewarded steps, redrawn, shaped and of two updates each, in turn with distilled ones: resumed
    before one of each, the bits and metrics are the same; records say what responses earned."""
    config = dataclasses.replace(
        rewarded,
        rl=RL(4, even_digits, epochs=2, redraws=1, overlong_buffer_tokens=4),
        teacher=str(teacher_folder),
        turns=(Turn(share=0.5, objective=divergence, prefix="teacher"),),
    )
    assert [timetable(config).turn_at(step) for step in range(4)] == [0, 1, 0, 1]
    assert_interrupted_equals_uninterrupted(config, tmp_path, monkeypatch)
    for step, record in enumerate(logged(config)):
        rewarded_step = step in (0, 2)
        assert ("reward" in record) == ("policy_drift" in record) == rewarded_step
        assert record["gradient_norm"] > 0
    # counted from the policy that drew: 0 at first, not any more at last
    assert logged(config)[0]["sampler_gap"] < 1e-5 < logged(config)[0]["policy_drift"]


def test_a_verifier_is_opened_once_for_a_run(rewarded, monkeypatch):
    """Reward `math`: one verifier grades every step's responses and is closed at the end, also of a
    run that fails; what it could not score counts as 0 and is a metric."""
    opened, graded = [], []

    class Verifier:
        def __init__(self, workers):
            opened.append(workers)

        def __call__(self, pairs):
            graded.append(len(pairs))
            if len(graded) == 4:
                raise DataError("no more")
            names = ["correct", "wrong", "not_scored", "not_scored"] * 2
            return [Graded(Outcome(name), "a") for name in names]

        def close(self):
            opened.append("closed")

    monkeypatch.setattr(rewards, "open_symbolic", Verifier)
    config = dataclasses.replace(rewarded, rl=RL(4, math), save_every_steps=1)
    with pytest.raises(DataError, match="no more"):
        train_module.train(config)
    assert opened == [4, "closed"]
    assert graded == [8] * 4
    assert [(r["reward"], r["not_scored"], r["reward_signal"]) for r in logged(config)] == [
        (0.25, 0.5, 1.0)
    ] * 3


def test_distilling_while_rewarding(rewarded, teacher_folder):
    """GRPO minus a scaled KL to the teacher is one objective; both parts are metrics."""
    objective = add(clipped_surrogate(0.2), scale(divergence, 0.1))
    config = dataclasses.replace(
        rewarded, teacher=str(teacher_folder), token_loss=reverse_kl, objective=objective, steps=2
    )
    train_module.train(config)
    assert {"clipped_surrogate(0.2)", "reverse_kl", "reward"} <= set(logged(config)[0])


def test_other_policies_are_read_in_micro_batches(tiny, monkeypatch):
    """The reference and the policy that drew never have more rows in memory than the step has."""
    config = dataclasses.replace(
        tiny, teacher=None, objective=clipped_surrogate(0.2), rl=RL(4, even_digits, epochs=2),
        batch_size=16, micro_batches=2, reference=tiny.student,
    )  # fmt: skip
    parts, rows, read = build(validate(config)), [], score_module.score

    def counted(model, params, teacher, teacher_params, rollout, **settings):
        rows.append(len(rollout.tokens_bs))
        return read(model, params, teacher, teacher_params, rollout, **settings)

    monkeypatch.setattr(score_module, "score", counted)
    rollout = random_rollout(0, 20, [3] * 16, [5] * 16)
    made = parts.refer(with_old_policy(parts, parts.student.trained, rollout))
    assert rows == [8, 8]
    np.testing.assert_allclose(made.old_logp_bt, made.reference_logp_bt, atol=1e-5)


def test_updates_of_a_run():
    """Epochs count for steps whose rollouts are rewarded alone."""
    config = Config(
        prefix="teacher", token_loss=forward_kl, rl=RL(4, epochs=3), steps=4,
        turns=(Turn(from_step=2, prefix="student", objective=clipped_surrogate(0.2)),),
    )  # fmt: skip
    assert [timetable(config).at(step).updates for step in range(4)] == [1, 1, 3, 3]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rl": RL(group_size=3)}, "batch_size 8 is not a multiple of rl.group_size 3"),
        ({"rl": RL(group_size=0)}, "rl.group_size must be at least 1, got 0"),
        ({"rl": RL(2, epochs=0)}, "rl.epochs must be at least 1, got 0"),
        ({"rl": RL(2, redraws=-1)}, "rl.redraws must be at least 0"),
        ({"rl": RL(4, overlong_buffer_tokens=9)}, r"rl.overlong_buffer_tokens must be in 0..8"),
        ({"rl": RL(epochs=2)}, "rl.group_size 1 rewards nothing"),
        (
            {"stops": "merge", "objective": importance(divergence, 2.0)},
            "stops merge makes events of tokens",
        ),
        ({"rl": RL(4), "prefix": "teacher"}, "rewards what the student draws; set prefix student"),
    ],
)
def test_what_cannot_be_rewarded(tiny, change, says):
    """One line with the field."""
    with pytest.raises(ConfigError, match=says):
        validate(dataclasses.replace(tiny, **change))


def test_a_reward_that_raises_stops_the_run(rewarded):
    """With function, line and problem: before the run where it raises of a right or an empty
    response, else with nothing trained on."""

    def broken(prompt, response, answer):
        raise KeyError(prompt)

    def broken_by_others(prompt, response, answer):
        return 1.0 if response in ("", rf"\boxed{{{answer}}}") else broken(prompt, response, answer)

    for reward in (broken, broken_by_others):
        config = dataclasses.replace(rewarded, rl=RL(4, reward))
        says = r"rl.reward: broken \(.*test_feed.py:\d+\): KeyError: .* of problem calc/train/"
        with pytest.raises(ConfigError, match=says):
            train_module.train(config)
        records = Path(config.run) / "metrics.jsonl"
        assert records.exists() == (reward is broken_by_others)
        assert not records.exists() or not records.read_text()


def test_advantages_of_the_users_own_are_tried(rewarded):
    """Equal rewards, divided by their deviation of 0: told before the run."""

    def divided(reward_gs):
        return (reward_gs - reward_gs.mean(1, keepdims=True)) / reward_gs.std(1, keepdims=True)

    config = dataclasses.replace(rewarded, rl=RL(4, even_digits, advantage=divided))
    with (
        np.errstate(invalid="ignore"),
        pytest.raises(
            ConfigError, match=r"rl.advantage: divided \(.*test_feed.py:\d+\) made \[\[nan"
        ),
    ):
        build(validate(config))


def test_old_policy_is_the_one_that_drew(rewarded):
    """Drawn ahead, ratios are counted from the sampler's own log-probabilities."""
    ahead = dataclasses.replace(rewarded.rollouts, ahead=True)
    parts = build(validate(dataclasses.replace(rewarded, rollouts=ahead)))
    rollout = draw(parts, fresh_state(parts).params, 0, 8, 1)
    np.testing.assert_array_equal(rollout.old_logp_bt, rollout.own_logp_bt)
    assert np.asarray(rollout.staleness_b).tolist() == [1] * 8
    assert isinstance(rollout.tokens_bs, jax.Array)
