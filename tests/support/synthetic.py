"""Invented results in the shape of a real study, for the tests of the page: no model is run."""

from __future__ import annotations

import numpy as np

from kdjax.base import Sampling
from kdjax.config.claims import Claim
from kdjax.grading.eval_report import EvalReport
from kdjax.grading.intervals import Estimate, over_problems
from kdjax.grading.passk import avg_at_k, pass_at_k
from kdjax.report.results import Cell, Row, Verdict

PIECES = [["85", -0.02], ["+3", 0.2], ["=88", -1.5], [";|<b>", 4.2], ["né", None], ["\n", -0.4]]


def a_report(correct: list[int], samples: int = 4, source: str = "s", **changes) -> EvalReport:
    """A report of these counts."""
    fields = dict(
        problems=len(correct), samples=samples, sampling=Sampling(), max_new_tokens=8, seed=0,
        source=source, avg=avg_at_k(correct, samples),
        pass_at={k: pass_at_k(correct, samples, k) for k in (1, 2, samples)},
        length=Estimate(5.0, 0.1), truncated=Estimate(0.01, 0.01), no_answer=Estimate(0.0, 0.0),
        entropy=0.5, forward_kl=0.1, reverse_kl=None, correct=correct, seconds=1.0,
        grader="exact", not_scored=Estimate(0.0, 0.0), not_scored_reasons={},
    )  # fmt: skip
    return EvalReport(**{**fields, **changes})


def a_sample(problem: str, pieces=PIECES, **changes) -> dict:
    """A record of samples.jsonl."""
    text = "".join(text for text, _ in pieces)
    return {
        "problem": problem, "sample": 0, "prompt": "85+3+9-1=", "gold": "96", "response": text,
        "answer": "96", "correct": True, "no_answer": False, "not_scored": False, "reason": "",
        "truncated": False, "tokens": 6, "pieces": pieces, **changes,
    }  # fmt: skip


PROBLEMS, SAMPLES = 40, 4
FLOPS = dict(sampling=2e9, teacher=1e9, student_forward=1.3e9, student_backward=2.6e9)


def a_run(name: str, seed: int, skill: float, steps: int = 120, pieces=PIECES) -> Row:
    """A run that has learnt `skill` of everything at its end, with all metrics of a study."""
    rng = np.random.default_rng([seed, *name.encode()])
    metrics = [a_record(rng, step, step / steps * skill) for step in range(5, steps + 1, 5)]
    if name == "curriculum":
        metrics = [gated(record) for record in metrics]
    right = rng.random((PROBLEMS, SAMPLES)) < 0.1 + 0.6 * skill
    tokens = rng.poisson(30 + 20 * skill, (PROBLEMS, SAMPLES))
    entropy = 0.5 - 0.3 * skill + 0.05 * rng.random((PROBLEMS, SAMPLES))
    samples = [
        a_sample(f"p{i}", pieces, sample=j, correct=bool(right[i, j]), tokens=int(tokens[i, j]),
                 entropy=float(entropy[i, j]), truncated=bool(tokens[i, j] > 55))
        for i in range(PROBLEMS) for j in range(SAMPLES)
    ]  # fmt: skip
    for sample in samples:
        if sample["sample"] or sample["problem"] not in ("p0", "p20"):
            del sample["pieces"]
    report = a_report(
        right.sum(axis=1).tolist(), SAMPLES, seed=seed, length=over_problems(tokens.mean(axis=1)),
        truncated=over_problems((tokens > 55).mean(axis=1)), reverse_kl=0.4,
        entropy=float((entropy * tokens).sum() / tokens.sum()),
        training_flops=sum(FLOPS.values()) * steps, training_seconds=0.3 * steps,
        flops_by_part={f"flops_{part}": steps * cost for part, cost in FLOPS.items()},
    )  # fmt: skip
    return Row(name, report, metrics, samples)


def a_record(rng, step: int, learnt: float) -> dict:
    """A record of metrics after so many steps; every 20th has the tests during training."""

    def about(value: float, noise: float) -> float:
        return value + noise * rng.normal()

    record = {
        "step": step, "seconds": 0.3 * step, "loss": about(1.4 - learnt, 0.02),
        "forward_kl": about(0.9 - 0.6 * learnt, 0.02),
        "reverse_kl": about(1.1 - 0.7 * learnt, 0.02),
        "student_entropy": about(0.5 - 0.3 * learnt, 0.01),
        "response_length": about(30 + 20 * learnt, 1), "truncated": abs(about(0.0, 0.02)),
        "gradient_norm": about(2, 0.2),
        **{f"flops_{part}": step * cost for part, cost in FLOPS.items()},
    }  # fmt: skip
    if step % 20:
        return record
    right = rng.binomial(2, 0.1 + 0.6 * learnt, PROBLEMS)
    return record | {
        "test_avg": right.mean() / 2, "test_correct": right.tolist(), "test_samples": 2,
        "test_length": about(30 + 20 * learnt, 0.5), "test_truncated": 0.0,
        "test_entropy": about(0.5 - 0.3 * learnt, 0.01), "test_seconds": 0.1,
    }  # fmt: skip


def gated(record: dict) -> dict:
    """The record with what a gate measured and decided, where there is a test."""
    length, entropy = 16 if record["step"] < 40 else 32, record["student_entropy"]
    decided = {
        "heldout_entropy": entropy, "gate_threshold_nats": 0.4,
        "gate_decision": 1 if entropy > 0.4 else 4,
    }  # fmt: skip
    return record | {"gate_length": length} | (decided if "test_avg" in record else {})


def a_reference(name: str, skill: float, pieces=PIECES) -> Cell:
    """A model that was not trained here."""
    run = a_run(name, 0, skill, pieces=pieces)
    untrained = dict(training_flops=None, training_seconds=None, flops_by_part=None)
    return Cell(name, [run._replace(report=run.report._replace(**untrained), metrics=[])])


NAMES = (
    "teacher_forward", "teacher_reverse", "student_forward", "student_reverse", "mix_0.1",
    "mix_0.25", "mix_0.5", "mix_0.75", "mix_0.9", "fixed_long", "fixed_short", "curriculum",
)  # fmt: skip


def a_study(cells: int = 12, seeds: int = 3, pieces=PIECES) -> list[Cell]:
    """Two references and so many cells of so many seeds, five of them a sweep of `mix`."""
    references = [a_reference("start", 0.0, pieces), a_reference("teacher", 0.95, pieces)]
    made = []
    for number, name in enumerate(NAMES[:cells]):
        runs = [a_run(name, seed, 0.3 + 0.05 * number, pieces=pieces) for seed in range(seeds)]
        weight = float(name[4:]) if name.startswith("mix") else None
        made.append(Cell(name, runs, weight))
    return references + made


VERDICTS = (
    Verdict(
        Claim("KL direction", "reverse KL has a higher Avg than forward KL at equal steps", "avg",
              ("student_reverse",), ("student_forward",)), 0.031, 0.012, 0.05, "supported",
        "Avg@4", 0.012, 0.028, 3, 40),
    Verdict(
        Claim("training length", "a long fixed horizon lengthens responses", "length",
              ("fixed_long",), ("fixed_short",)), -3.2, -5.0, -1.4, "contradicted",
        "length", 0.0002, 3.1, 3, 40),
    Verdict(
        Claim("prefix source", "student prefixes keep more entropy than the teacher's", "entropy",
              ("student_forward",), ("teacher_forward",)), 0.004, -0.01, 0.018, "undecided",
        "entropy", 0.61, 0.02, 3, 40),
)  # fmt: skip
