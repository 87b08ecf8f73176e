"""Claims on synthetic studies whose truth is known: the interval decides, nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from kdjax.base import Sampling
from kdjax.config.claims import Claim, paper_claims
from kdjax.errors import ConfigError
from kdjax.grading.eval_report import EvalReport
from kdjax.grading.intervals import Estimate
from kdjax.grading.passk import avg_at_k, pass_at_k
from kdjax.report.results import (
    Cell,
    Row,
    at_equal_flops,
    avg_at_flops,
    charged,
    problem_values,
    values_of,
)
from kdjax.report.tables import (
    comparison,
    differences,
    equal_readings,
    flops_by_part,
    more_samples,
)
from kdjax.report.text import render_results, to_csv, to_lines
from kdjax.report.verdicts import judge

PROBLEMS, SAMPLES = 60, 4


def a_run(
    correct_ps, tokens_ps=None, entropy_ps=None, flops=None, metrics=(), seed=0, ks=None
) -> Row:
    """A run of these outcomes [problems, samples]; tokens and entropies of each sample."""
    correct_ps = np.asarray(correct_ps, int)
    problems, samples = correct_ps.shape
    tokens_ps = np.full(correct_ps.shape, 5) if tokens_ps is None else np.asarray(tokens_ps)
    entropy_ps = np.full(correct_ps.shape, 0.5) if entropy_ps is None else np.asarray(entropy_ps)
    records = [
        {
            "problem": str(p), "sample": s, "correct": bool(correct_ps[p, s]), "truncated": False,
            "tokens": int(tokens_ps[p, s]), "entropy": float(entropy_ps[p, s]),
        }
        for p in range(problems)
        for s in range(samples)
    ]  # fmt: skip
    correct, none = correct_ps.sum(axis=1).tolist(), Estimate(0.0, 0.0)
    report = EvalReport(
        problems=problems, samples=samples, sampling=Sampling(), max_new_tokens=8, seed=seed,
        source="s", avg=avg_at_k(correct, samples),
        pass_at={k: pass_at_k(correct, samples, k) for k in ks or (1, samples)},
        length=Estimate(float(tokens_ps.mean()), 0.0), truncated=none, no_answer=none,
        grader="exact", not_scored=none, not_scored_reasons={},
        entropy=float((entropy_ps * tokens_ps).sum() / tokens_ps.sum()), forward_kl=0.1,
        reverse_kl=None, correct=correct, seconds=1.0, training_flops=flops,
        flops_by_part=flops and {"flops_teacher": flops}, training_seconds=flops and 2.0,
    )  # fmt: skip
    return Row(f"run/seed_{seed}", report, list(metrics), records)


def a_cell(name: str, skill: float, seeds: int = 3, flops: float = 10.0, **changes) -> Cell:
    """Seeds of a student that solves problem p with probability difficulty p + skill."""
    rng = np.random.default_rng(sum(map(ord, name)))
    chance = np.clip(np.random.default_rng(0).uniform(0.2, 0.6, PROBLEMS) + skill, 0, 1)
    return Cell(
        name,
        [
            a_run(
                rng.uniform(size=(PROBLEMS, SAMPLES)) < chance[:, None],
                flops=flops, seed=seed, **changes,
            )
            for seed in range(seeds)
        ],
    )  # fmt: skip


START = a_cell("start", -0.1, seeds=1, flops=None)
CLAIM = Claim("c", "good is better", "avg", ("good",), ("bad",))


@pytest.mark.parametrize(
    ("good", "bad", "margin", "outcome"),
    [
        (0.2, 0.0, 0.0, "supported"),
        (0.0, 0.2, 0.0, "contradicted"),
        (0.1, 0.1, 0.0, "undecided"),
        (0.1, 0.13, 0.0, "undecided"),
        (0.1, 0.1, 0.2, "supported"),
        (0.0, 0.3, 0.1, "contradicted"),
        (0.0, 0.2, 0.2, "undecided"),
    ],
)
def test_the_interval_decides(good, bad, margin, outcome):
    """20 points apart is seen with three seeds of 60 problems; no difference is undecided, unless a
    margin is granted; the margin moves the bound, not the difference."""
    cells = [START, a_cell("good", good), a_cell("bad", bad)]
    verdict = judge([CLAIM._replace(margin=margin)], cells)[0]
    assert verdict.outcome == outcome
    assert verdict.estimate == pytest.approx(good - bad, abs=0.08)
    assert verdict.low < verdict.estimate < verdict.high


def test_one_problem_decides_nothing():
    """Three seeds of one problem, all of them better: undecided, and no interval."""
    good, bad = (
        Cell(name, [a_run([[right] * 4], seed=seed) for seed in range(3)])
        for name, right in (("good", 1), ("bad", 0))
    )
    (found,) = judge([CLAIM], [good, bad])
    assert (found.outcome, found.estimate) == ("undecided", 1.0)
    assert np.isnan([found.low, found.high, found.p, found.least]).all()
    assert "| undecided | Avg@4 | +100.0 points | - | - | 1 problem, 3 seeds |" in render_results(
        "x", [good, bad], {}, [found]
    )


def test_claims_are_corrected_for_their_number():
    """What one claim decides by its own interval, twelve leave undecided; the p-value is Holm's,
    the interval is the same, and the difference that could be seen grows."""
    cells = [a_cell("good", 0.2), a_cell("bad", 0.0)]
    (alone,) = judge([CLAIM], cells)
    assert alone.outcome == "supported"
    assert 0.05 / 12 < alone.p < 0.05
    others = [Claim(f"n{n}", "", "entropy", ("good",), ("bad",)) for n in range(11)]
    among = judge([CLAIM, *others], cells)[0]
    assert among.outcome == "undecided"
    assert among.p == pytest.approx(12 * alone.p)
    assert among[1:4] == alone[1:4]
    assert among.low > 0
    assert among.least > alone.least > 0


def test_pass_at_other_k_is_not_compared():
    """The same answers, asked for other k: no difference, at the largest k that both were asked
    for, in the verdict and in every table."""
    right = np.random.default_rng(0).uniform(size=(40, 8)) < 0.2
    one, other = (
        Cell(name, [a_run(right, ks=ks)]) for name, ks in (("good", (1, 8)), ("bad", (1, 2)))
    )
    claim = CLAIM._replace(metric="pass")
    (found,) = judge([claim], [one, other])
    assert (found.outcome, found.estimate, found.metric) == ("undecided", 0.0, "Pass@2")
    header, lines = comparison([one, other])
    assert "Pass@2" in header
    assert len({line[header.index("Pass@2")] for line in lines}) == 1
    assert differences([one, other])[0][2] == "Pass@2"
    for line in to_lines([one, other]):
        expected = pass_at_k(right.sum(axis=1).tolist(), 8, 2).mean
        assert line["pass_at_2"] == pytest.approx(expected)


def test_avg_of_other_samples_has_no_number_of_them():
    """Cells of 4 and of 8 samples a problem: neither column says that it is of 4 alone."""
    cells = [Cell(name, [a_run(np.ones((3, n)))]) for name, n in (("four", 4), ("eight", 8))]
    for made in (comparison, more_samples):
        assert made(cells[:1])[0][1] == "Avg@4"
        assert made(cells)[0][1] == "Avg@n"
    assert {"avg_at_4", "avg_at_8"} <= {*to_csv(cells).splitlines()[0].split(",")}


def test_sides_are_means_of_their_cells():
    """(a + b) / 2 - c: the estimate is of the cells' means, whichever side they stand on."""
    cells = [a_cell(name, skill) for name, skill in (("a", 0.1), ("b", 0.3), ("c", 0.0))]
    a, b, c = (values_of(cell, "avg").mean() for cell in cells)
    verdict = judge([Claim("c", "", "avg", ("a", "b"), ("c",))], cells)[0]
    assert verdict.estimate == pytest.approx((a + b) / 2 - c)
    other = judge([Claim("c", "", "avg", ("c",), ("a", "b"))], cells)[0]
    assert other.estimate == pytest.approx(-verdict.estimate)


def test_values_of_problems_average_to_the_report():
    """Each metric's mean over problems is the number that the report gives."""
    rng = np.random.default_rng(0)
    run = a_run(
        rng.uniform(size=(20, 4)) < 0.4, rng.integers(1, 9, (20, 4)), rng.uniform(size=(20, 4))
    )
    report = run.report
    for metric, expected in (
        ("avg", report.avg.mean), ("pass", report.pass_at[4].mean), ("length", report.length.mean),
        ("entropy", report.entropy), ("truncated", 0.0),
    ):  # fmt: skip
        assert problem_values(run, metric, k=4).mean() == pytest.approx(expected)


def test_a_masked_stop_token_has_no_weight():
    """Two responses of 1 and 100 scored tokens, and a stop token more: the mean over scored
    tokens, as in the report. Records of older versions have no such count."""
    run = a_run([[1], [1]], [[2], [101]], [[0.9], [0.1]])
    assert problem_values(run, "entropy").mean() == pytest.approx((2 * 0.9 + 10.1) / 103)
    samples = [{**s, "scored_tokens": s["tokens"] - 1} for s in run.samples]
    masked = problem_values(run._replace(samples=samples), "entropy")
    assert masked.mean() == pytest.approx((0.9 + 10) / 101)


def test_the_error_of_a_token_mean():
    """The influence values of the entropy have the spread of the ratio over resampled problems."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 30, (200, 1))
    entropy = rng.uniform(size=(200, 1)) / tokens**0.5
    run = a_run(np.ones((200, 1)), tokens, entropy)
    index = rng.integers(0, 200, (4000, 200))
    nats = (tokens * entropy)[:, 0]
    resampled = nats[index].sum(axis=1) / tokens[:, 0][index].sum(axis=1)
    own = problem_values(run, "entropy").std() / np.sqrt(200)
    assert own == pytest.approx(resampled.std(), rel=0.05)


def test_equal_flops_by_hand():
    """Two problems: right 0 of 2 at the start, 1 of 2 tested after 4 FLOPs, 2 of 2 at the end (8):
    half way between tests it is half way; after the end it is the end."""
    start = a_run([[0, 0], [0, 0]])
    tested = [{"flops_sampling": 1.0, "flops_teacher": 3.0, "test_correct": [1, 0],
               "test_samples": 2}, {"flops_sampling": 2.0, "flops_teacher": 4.0}]  # fmt: skip
    run = a_run([[1, 1], [0, 1]], flops=8.0, metrics=tested)
    for budget, first, second in (
        (0, 0, 0),
        (2, 0.25, 0),
        (4, 0.5, 0),
        (6, 0.75, 0.25),
        (9, 1, 0.5),
    ):
        np.testing.assert_allclose(avg_at_flops(run, start, budget), [first, second])


def test_a_start_costs_what_it_cost():
    """A student that began as another's: 8 FLOPs of that and 4 of its own are 12, and at 6 it is
    where the other was; its curve, columns and parts all say so."""
    start = a_run([[0, 0], [0, 0]])
    tested = [{"step": 1, "flops_teacher": 4.0, "test_correct": [1, 0], "test_samples": 2}]
    first = a_run([[1, 1], [0, 0]], flops=8.0, metrics=tested)
    own = [{"step": 1, "flops_teacher": 2.0, "seconds": 1.0, "test_correct": [2, 1],
            "test_samples": 2}]  # fmt: skip
    second = charged(a_run([[1, 1], [1, 1]], flops=4.0, metrics=own), first)
    assert (second.report.training_flops, second.report.training_seconds) == (12.0, 4.0)
    assert second.metrics[0]["seconds"] == 3.0
    for budget, values in (
        (2, [0.25, 0]),
        (6, [0.75, 0]),
        (8, [1, 0]),
        (10, [1, 0.5]),
        (12, [1, 1]),
    ):
        np.testing.assert_allclose(avg_at_flops(second, start, budget), values)
    third = charged(a_run([[1, 1], [1, 1]], flops=1.0), second)
    assert third.report.training_flops == 13.0
    np.testing.assert_allclose(avg_at_flops(third, start, 6), [0.75, 0])
    cells = [Cell("first", [first]), Cell("second", [second])]
    np.testing.assert_allclose(at_equal_flops(cells, start)[1], [[1, 0]])
    assert [line[1] for line in equal_readings(cells, start)[1]] == ["8.00e+00", "1.20e+01"]
    assert flops_by_part(cells) == (
        ["FLOPs", "teacher", "start"],
        [["first", "8.00e+00", "0.00e+00"], ["second", "4.00e+00", "8.00e+00"]],
    )
    assert [line.get("flops_start") for line in to_lines(cells)] == [None, None, 8.0, 8.0]
    assert to_csv(cells).splitlines()[0].count("flops_start") == 1


def test_the_reading_can_turn_a_verdict():
    """The costly side wins at equal steps, and at the FLOPs of the cheap one it has learned
    nothing."""
    late = [{"flops_sampling": 10.0, "test_correct": START.runs[0].report.correct,
             "test_samples": SAMPLES}]  # fmt: skip
    cells = [START, a_cell("good", 0.4, flops=40.0, metrics=late), a_cell("bad", 0.1, flops=10.0)]
    assert judge([CLAIM], cells)[0].outcome == "supported"
    assert judge([CLAIM._replace(reading="flops")], cells)[0].outcome == "contradicted"


def test_what_was_evaluated_differently_is_not_compared():
    """Other problems, or other samples a problem, make a difference meaningless; also of one seed
    alone."""
    bad = a_cell("bad", 0.0)
    others = [run._replace(report=run.report._replace(source="t")) for run in bad.runs]
    for runs in (others, [*bad.runs[:-1], others[-1]]):
        with pytest.raises(
            ConfigError, match="claim c: cells good and bad were evaluated with another source"
        ):
            judge([CLAIM], [START, a_cell("good", 0.1), Cell("bad", runs)])


def test_the_paper_s_claims_name_their_cells():
    """All names that are given are used, each claim has two sides, and names are unique."""
    names = {
        name: name.upper()
        for name in (
            "teacher_forward", "teacher_reverse", "student_forward", "student_reverse",
            "forward_heavy", "short", "long", "curriculum",
        )
    }  # fmt: skip
    claims = paper_claims(**names, margin=0.05)
    assert {cell for c in claims for cell in (*c.more, *c.less)} == set(names.values())
    assert all(c.more and c.less and not set(c.more) & set(c.less) for c in claims)
    assert len({c.name for c in claims}) == len(claims) == 12
    assert [c.name for c in claims if c.reading == "flops"] == ["prefix_flops"]
    assert "within 5 points" in next(c for c in claims if c.margin).statement


def test_text_has_every_run_and_every_number():
    """A line a cell and seed and one for all; Markdown with both readings and the verdict."""
    cells = [START, a_cell("good", 0.2), a_cell("bad", 0.0, flops=20.0)]
    lines = to_lines(cells)
    assert [(x["cell"], x["seed"]) for x in lines[:3]] == [
        ("start", "0"),
        ("start", "all"),
        ("good", "0"),
    ]
    assert len(lines) == 2 + 4 + 4
    good = [x for x in lines if x["cell"] == "good"]
    assert good[-1]["avg_at_4"] == pytest.approx(np.mean([x["avg_at_4"] for x in good[:-1]]))
    assert good[0]["flops_teacher"] == good[0]["training_flops"] == 10.0
    assert lines[0]["training_flops"] is None
    text = to_csv(cells).splitlines()
    assert len(text) == 11
    assert {len(line.split(",")) for line in text} == {len(text[0].split(","))}
    page = render_results("Study x", cells, {"jax": "0"}, judge([CLAIM], cells))
    shown = f"{100 * good[-1]['avg_at_4']:.1f} ± {100 * good[-1]['avg_at_4_standard_error']:.1f}"
    assert shown in page
    assert "| good is better | supported | Avg@4 | +" in page
    assert " points | 0.011 | " in page
    assert " points | 60 problems, 3 seeds | steps | good - bad |" in page
    assert "equal FLOPs" not in page  # nothing was tested during training (test_page.py)
    assert "| jax | 0 |" in page
