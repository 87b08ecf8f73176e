"""Invented results in the shape of a real study, for the tests of the page: no model is run."""

from __future__ import annotations

import numpy as np

from kdjax.base import Sampling
from kdjax.claims import Claim
from kdjax.evaluate import EvalReport
from kdjax.passk import Estimate, avg_at_k, over_problems, pass_at_k
from kdjax.results import Cell, Row, Verdict

PIECES = [["85", -0.02], ["+3", 0.2], ["=88", -1.5], [";|<b>", 4.2], ["né", None], ["\n", -0.4]]


def a_report(correct: list[int], samples: int = 4, source: str = "s", **changes) -> EvalReport:
    """A report of these counts."""
    fields = dict(
        problems=len(correct), samples=samples, sampling=Sampling(), max_new_tokens=8, seed=0,
        source=source, avg=avg_at_k(correct, samples),
        pass_at={k: pass_at_k(correct, samples, k) for k in (1, 2, samples)},
        length=Estimate(5.0, 0.1), truncated=Estimate(0.01, 0.01), no_answer=Estimate(0.0, 0.0),
        entropy=0.5, forward_kl=0.1, reverse_kl=None, correct=correct, seconds=1.0,
    )  # fmt: skip
    return EvalReport(**{**fields, **changes})


def a_sample(problem: str, pieces=PIECES, **changes) -> dict:
    """A record of samples.jsonl."""
    text = "".join(text for text, _ in pieces)
    return {
        "problem": problem, "sample": 0, "prompt": "85+3+9-1=", "gold": "96", "response": text,
        "answer": "96", "correct": True, "no_answer": False, "truncated": False, "tokens": 6,
        "pieces": pieces, **changes,
    }  # fmt: skip


def a_run(name: str, seed: int, skill: float, steps: int = 120, pieces=PIECES) -> Row:
    """A run that has learnt `skill` of everything at its end, with all metrics of a study."""
    rng = np.random.default_rng([seed, *name.encode()])
    flops = dict(sampling=2e9, teacher=1e9, student_forward=1.3e9, student_backward=2.6e9)
    metrics = []
    for step in range(5, steps + 1, 5):
        done, noise = step / steps, lambda size: size * rng.normal()
        record = {
            "step": step, "seconds": 0.3 * step, "loss": 1.4 - done * skill + noise(0.02),
            "forward_kl": 0.9 - 0.6 * done * skill + noise(0.02),
            "reverse_kl": 1.1 - 0.7 * done * skill + noise(0.02),
            "student_entropy": 0.5 - 0.3 * done * skill + noise(0.01),
            "response_length": 30 + 20 * done * skill + noise(1), "truncated": abs(noise(0.02)),
            "gradient_norm": 2 + noise(0.2),
        }  # fmt: skip
        if step % 20 == 0:
            record |= {f"flops_{part}": step * per_step for part, per_step in flops.items()}
            record |= {"test_avg": 0.1 + 0.6 * done * skill + noise(0.01)}
            record |= {"test_length": 31 + 20 * done * skill, "test_entropy": 0.5 - 0.3 * done}
        metrics.append(record)
    correct = rng.binomial(8, 0.1 + 0.6 * skill, size=50).tolist()
    report = a_report(
        correct, 8, seed=seed, length=over_problems(30 + rng.normal(size=50)), reverse_kl=0.4,
        entropy=0.5 - 0.3 * skill + 0.01 * rng.normal(), training_flops=6.9e9 * steps,
        training_seconds=0.3 * steps,
    )  # fmt: skip
    return Row(name, report, metrics, [a_sample(f"p{n}", pieces) for n in range(2)])


NAMES = (
    "teacher_forward", "teacher_reverse", "student_forward", "student_reverse", "mix_0.1",
    "mix_0.25", "mix_0.5", "mix_0.75", "mix_0.9", "fixed_long", "fixed_short", "curriculum",
)  # fmt: skip


def a_study(cells: int = 12, seeds: int = 3, pieces=PIECES) -> list[Cell]:
    """Two references and so many cells of so many seeds, five of them a sweep of `mix`."""
    references = [
        Cell(name, [Row(name, a_run(name, 0, skill).report, [], [a_sample("p0", pieces)])])
        for name, skill in (("start", 0.0), ("teacher", 0.95))
    ]
    made = []
    for number, name in enumerate(NAMES[:cells]):
        runs = [a_run(name, seed, 0.3 + 0.05 * number, pieces=pieces) for seed in range(seeds)]
        weight = float(name[4:]) if name.startswith("mix") else None
        made.append(Cell(name, runs, weight))
    return references + made


VERDICTS = (
    Verdict(
        Claim("KL direction", "reverse KL has a higher Avg than forward KL at equal steps", "avg",
              ("student_reverse",), ("student_forward",)), 0.031, 0.012, 0.05, "supported"),
    Verdict(
        Claim("training length", "a long fixed horizon lengthens responses", "length",
              ("fixed_long",), ("fixed_short",)), -3.2, -5.0, -1.4, "contradicted"),
    Verdict(
        Claim("prefix source", "student prefixes keep more entropy than the teacher's", "entropy",
              ("student_forward",), ("teacher_forward",)), 0.004, -0.01, 0.018, "undecided"),
)  # fmt: skip
