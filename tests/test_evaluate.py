"""Evaluation counts what was sampled: by hand with a scripted sampler, however batched."""

from __future__ import annotations

import functools
import json

import jax
import numpy as np
import pytest

from kdjax.base import Problem, Samples, Sampling
from kdjax.data.batches import Source, task_source
from kdjax.errors import ConfigError
from kdjax.evaluate import evaluate, finished_responses, mean_entropy
from kdjax.grading.answers import Graded, Outcome, grade_boxed
from kdjax.models import unstacked
from kdjax.report.results import from_json, to_json
from kdjax.rollouts.sampler import open_sampler
from kdjax.step.score import HeadPlan, score

SETTINGS = dict(
    grader=("exact", grade_boxed),
    sampling=Sampling(0.7, top_p=0.9),
    max_new_tokens=8,
    max_prompt_tokens=24,
    chunk_rows=16,
    seed=0,
)
PROBLEMS = [Problem("a", "1+1=", "2"), Problem("b", "2+2=", "4"), Problem("c", "3+3=", "6")]
SOURCE = Source(3, PROBLEMS.__getitem__, "three")


def scripted(tokenizer, responses: list[str], width: int = 8):
    """A sampler that gives row r the r-th response; one without a stop token is truncated."""

    def draw(batch, key, max_new_tokens):
        rows = [tokenizer.encode(responses[int(r)]) for r in np.asarray(batch.row_b)]
        tokens = np.array([ids[:width] + [0] * (width - len(ids)) for ids in rows], np.int32)
        length = np.array([min(len(ids), width) for ids in rows], np.int32)
        stopped = np.array([ids[-1] in tokenizer.stop_ids for ids in rows])
        zeros = np.zeros(tokens.shape, np.float32)
        return Samples(tokens, length, zeros, zeros, zeros, np.where(stopped, 1, -1))

    return draw


@pytest.fixture
def scorer(student):
    jitted = jax.jit(functools.partial(score, student[0]))
    return lambda rollout, _: jitted(student[1], None, None, rollout)


def test_counts_by_hand(tokenizer, student, scorer):
    """Two samples of three problems, outcomes known: every count and error bar by hand."""
    stop = "<|im_end|>"
    right = [rf"\boxed{{{n}}}{stop}" for n in (2, 4, 6)]
    responses = [right[0], right[0], right[1], rf"\boxed{{5}}{stop}", "3+3=6;6+", f"6;{stop}"]
    result, records = evaluate(
        scripted(tokenizer, responses), scorer, SOURCE, tokenizer, jax.random.key(0),
        samples=2, k=(1, 2), batch_size=4, **SETTINGS,
    )  # fmt: skip
    assert result.correct == [2, 1, 0]
    assert result.avg.mean == 0.5
    assert result.avg.standard_error == pytest.approx(0.5 / np.sqrt(3))
    assert result.pass_at[2].mean == pytest.approx(2 / 3)
    assert result.truncated.mean == pytest.approx(1 / 6)
    assert result.no_answer.mean == pytest.approx(2 / 6)
    assert result.length.mean == pytest.approx(np.mean([4, 4, 4, 4, 8, 3]))
    assert [r["sample"] for r in records] == [0, 1] * 3
    assert records[3]["answer"] == "5"
    outcomes = ["correct", "correct", "correct", "wrong", "no_answer", "no_answer"]
    assert [r["outcome"] for r in records] == outcomes
    assert (result.grader, result.not_scored.mean, result.not_scored_reasons) == ("exact", 0.0, {})
    assert (result.tokens, result.cut) == ([8, 8, 11], [0, 0, 1])
    assert result.length_quantiles == {10: 3, 50: 4, 90: 8}
    assert {k: found.mean for k, found in result.majority_at.items()} == {1: 0.5, 2: 2 / 3}
    estimate, low, high = result.intervals["avg"]
    assert estimate == 0.5
    assert 0 < low < 0.1  # three problems, from none to all right
    assert high == pytest.approx(1 - low)
    assert 0 < result.intervals["length"].low < result.intervals["length"].high < 8
    assert from_json(json.loads(json.dumps(to_json(result)))) == result


def test_reports_of_older_versions_are_read(tokenizer, scorer):
    """Without the fields that came later a report still loads, and says that it has none."""
    result, _ = evaluate(
        scripted(tokenizer, ["7<|im_end|>"] * 6), scorer, SOURCE, tokenizer, jax.random.key(0),
        samples=2, k=(1,), batch_size=6, **SETTINGS,
    )  # fmt: skip
    later = ("tokens", "cut", "majority_at", "length_quantiles", "intervals", "weights")
    old = {name: value for name, value in to_json(result).items() if name not in later}
    assert from_json(old).majority_at is None
    assert from_json(old).avg == result.avg


def test_the_grader_decides(tokenizer, student, scorer):
    """Any verifier can grade; what it can't score counts as wrong, and is counted by its reason."""
    asked = []

    def giving_up(pairs):
        asked.extend(pairs)
        half = len(pairs) // 2
        crash = Graded(Outcome.NOT_SCORED, "x", "crash")
        return [crash] * half + [Graded(Outcome.CORRECT, "y")] * (len(pairs) - half)

    settings = {**SETTINGS, "grader": ("math", giving_up)}
    result, records = evaluate(
        scripted(tokenizer, ["7<|im_end|>"] * 6), scorer, SOURCE, tokenizer, jax.random.key(0),
        samples=2, k=(1,), batch_size=6, **settings,
    )  # fmt: skip
    assert [gold for _, gold in asked] == ["2", "2", "4", "4", "6", "6"]
    assert {response for response, _ in asked} == {"7"}
    assert result.correct == [0, 1, 2]
    assert result.not_scored.mean == 0.5
    assert (result.grader, result.not_scored_reasons) == ("math", {"crash": 3})
    assert result.majority_at[1] == result.avg
    assert [r["not_scored"] for r in records] == [True] * 3 + [False] * 3
    assert from_json(to_json(result)) == result


def test_thinking_that_the_prompt_opens_and_the_limit_cuts_is_no_answer(tokenizer, scorer):
    r"""A box in it is none, one behind </think> is; the record holds what the model said."""
    cut, said = r"\boxed{2}", r"</think>\boxed{4}"
    opening = tokenizer._replace(opens_thinking=True)
    _, records = evaluate(
        scripted(opening, [cut, f"{said}<|im_end|>", cut], 16), scorer, SOURCE, opening,
        jax.random.key(0), samples=1, k=(1,), batch_size=3, **SETTINGS,
    )  # fmt: skip
    assert [r["outcome"] for r in records] == ["no_answer", "correct", "no_answer"]
    assert [r["response"] for r in records] == [cut, said, cut]


def test_a_verifier_without_answers_has_no_majority(tokenizer, scorer):
    """math_lenient reads the whole response and says no answer, so there is nothing to vote."""
    settings = {**SETTINGS, "grader": ("x", lambda ps: [Graded(Outcome.WRONG, None) for _ in ps])}
    result, _ = evaluate(
        scripted(tokenizer, ["7<|im_end|>"] * 6), scorer, SOURCE, tokenizer, jax.random.key(0),
        samples=2, k=(1,), batch_size=6, **settings,
    )  # fmt: skip
    assert result.majority_at is None
    assert from_json(to_json(result)) == result


def test_batching_does_not_matter(tokenizer, student, teacher, student_folder):
    """Batches of 3, 4 and 16 rows give the same responses and the same means."""
    (model, params), (teacher_model, teacher_params) = student, teacher
    draw = functools.partial(open_sampler(model, stop_ids=tokenizer.stop_ids), unstacked(params))
    scorer = jax.jit(
        lambda p, rollout: score(model, p, teacher_model, teacher_params, rollout, plan=HeadPlan(8))
    )
    source = task_source("calc", "test", 5, (2,))
    results = [
        evaluate(
            draw,
            lambda rollout, _: scorer(params, rollout), source, tokenizer, jax.random.key(3),
            samples=2, k=(1,), batch_size=size, **SETTINGS,
        )
        for size in (3, 4, 16)
    ]  # fmt: skip
    first, first_records = results[0]
    assert first.forward_kl > 0
    assert first.reverse_kl > 0
    for other, records in results[1:]:
        for one, as_first in zip(records, first_records, strict=True):
            assert one.pop("entropy") == pytest.approx(as_first["entropy"], abs=1e-5)
            assert one == {k: v for k, v in as_first.items() if k != "entropy"}
        np.testing.assert_allclose(other.entropy, first.entropy, rtol=1e-6)
        np.testing.assert_allclose(other.forward_kl, first.forward_kl, rtol=1e-5)


def test_pieces_carry_the_log_ratio(tokenizer, student, teacher, monkeypatch):
    """The first samples' tokens have log p(teacher) - log q(student) of a scoring by hand; a
    character of two tokens has their sum, and what is beyond the limit is counted."""
    (model, params), (teacher_model, teacher_params) = student, teacher
    monkeypatch.setattr("kdjax.evaluate.SHOWN_TOKENS", 6)
    seen = []

    def scorer(rollout, _):
        seen.append(score(model, params, teacher_model, teacher_params, rollout))
        return seen[-1]

    responses = ["a\u00e9=1<|im_end|>", "1<|im_end|>", "12345678", "2<|im_end|>"]
    _, records = evaluate(
        scripted(tokenizer, responses), scorer, Source(2, PROBLEMS.__getitem__, "two"), tokenizer,
        jax.random.key(0), samples=2, k=(1,), batch_size=4, **SETTINGS,
    )  # fmt: skip
    assert ["pieces" in record for record in records] == [True, False, True, False]
    ratios = np.asarray(seen[0].teacher_logp) - np.asarray(seen[0].student_logp)
    first, second = records[0]["pieces"], records[2]["pieces"]
    assert [text for text, _ in first] == ["a", "\u00e9", "=", "1", "<|im_end|>"]
    by_hand = [ratios[0, 0], ratios[0, 1:3].sum(), *ratios[0, 3:6]]
    np.testing.assert_allclose([ratio for _, ratio in first], by_hand, atol=5.1e-4)
    assert abs(np.array(by_hand)).max() > 0.01
    assert [text for text, _ in second] == [*"123456", " ... and 2 tokens more"]
    assert second[-1][1] is None


def test_no_teacher_no_log_ratio(tokenizer, student, scorer):
    """Without a teacher the pieces are kept, without numbers."""
    _, records = evaluate(
        scripted(tokenizer, ["1<|im_end|>"]), scorer, Source(1, PROBLEMS.__getitem__, "one"),
        tokenizer, jax.random.key(0), samples=1, k=(1,), batch_size=1, **SETTINGS,
    )  # fmt: skip
    assert records[0]["pieces"] == [["1", None], ["<|im_end|>", None]]


def test_k_over_the_samples_is_refused(tokenizer, student, scorer):
    """Pass@k needs k samples a problem."""
    with pytest.raises(ConfigError, match=r"must lie in 1\.\.2"):
        evaluate(
            scripted(tokenizer, []), scorer, SOURCE, tokenizer, jax.random.key(0),
            samples=2, k=(4,), batch_size=4, **SETTINGS,
        )  # fmt: skip


def test_mean_entropy_weighs_tokens():
    """Every response token counts once, padding not at all; no token at all is NaN."""
    zeros = np.zeros((2, 3), np.float32)
    entropy = np.array([[1.0, 0, 0], [2.0, 3.0, 4.0]], np.float32)
    samples = Samples(zeros, np.array([1, 3]), zeros, zeros, entropy, np.zeros(2, int))
    assert mean_entropy(samples) == 2.5
    assert np.isnan(mean_entropy(samples._replace(length_b=np.zeros(2, int))))
    assert np.isnan(mean_entropy(samples._replace(entropy_bt=np.full_like(entropy, np.nan))))
    assert mean_entropy(samples._replace(entropy_bt=np.full_like(entropy, -1e-9))) == 0.0


def test_mean_entropy_of_finished_responses():
    """Rows that the limit cut are masked: as if they were not there, and NaN where all were."""
    zeros, length = np.zeros((3, 3), np.float32), np.array([1, 3, 2])
    entropy = np.array([[1.0, 0, 0], [2.0, 3.0, 4.0], [5.0, 6.0, 0.0]], np.float32)
    samples = Samples(zeros, length, zeros, zeros, entropy, np.array([7, -1, 7]))
    assert mean_entropy(samples, finished_responses) == (1 + 5 + 6) / 3
    assert mean_entropy(samples) == entropy.sum() / 6
    cut = samples._replace(stop_b=np.full(3, -1))
    assert np.isnan(mean_entropy(cut, finished_responses))
