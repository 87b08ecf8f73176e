"""The report of an evaluation: estimates of a benchmark, with the settings that they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from kdjax.grading.intervals import Estimate, Interval

if TYPE_CHECKING:
    from kdjax.base import Sampling

QUANTILES = (10, 50, 90)
"""Percent of the responses that are no longer than a reported length."""


class EvalReport(NamedTuple):
    """The results of a model on a set of problems, with the settings that decide them.

    - avg, pass_at, length (tokens with the stop token), truncated, no_answer and not_scored (the
      verifier gave up on it; it counts as wrong) carry standard errors over problems.
    - grader: the verifier's name in the config; not_scored_reasons: how often it gave up on what.
    - entropy, forward_kl, reverse_kl: token means in nats over the model's own responses, exact
      over the vocabulary, under the run's stop policy; KLs are to the teacher (None without one).
    - template: the rendered prompt of a problem "{prompt}".
    - correct, tokens, cut: for each problem, its right responses, their tokens, those truncated.
    - majority_at: majority@k for the same k as pass_at; None where the verifier returns no answers.
    - length_quantiles: the least length that 10, 50, 90 % of all responses don't exceed.
    - intervals: 95 % intervals over problems (`kdjax.grading.intervals`), by the names avg,
      pass_at_K, majority_at_K, length, truncated, no_answer and not_scored; none for a single
      problem.
    - weights: a hash of the parameters that were evaluated (`kdjax.storage.fingerprint`).
    - also: the reports at other temperatures, of the same weights and problems.
    - flops_by_part: what training_flops consists of (`kdjax.training.cost`).

    Reports of older versions lack the fields that have a default.
    """

    problems: int
    samples: int
    sampling: Sampling
    max_new_tokens: int
    seed: int
    source: str
    avg: Estimate
    pass_at: dict[int, Estimate]
    length: Estimate
    truncated: Estimate
    no_answer: Estimate
    entropy: float
    forward_kl: float | None
    reverse_kl: float | None
    correct: list[int]
    seconds: float
    grader: str
    not_scored: Estimate
    not_scored_reasons: dict[str, int]
    template: str = ""
    training_flops: float | None = None
    flops_by_part: dict[str, float] | None = None
    training_seconds: float | None = None
    tokens: list[int] | None = None
    cut: list[int] | None = None
    majority_at: dict[int, Estimate] | None = None
    length_quantiles: dict[int, int] | None = None
    intervals: dict[str, Interval] | None = None
    weights: str = ""
    also: tuple[EvalReport, ...] = ()


def unread(report: EvalReport, records: Sequence[dict[str, Any]]) -> str | None:
    """What to do where most of the responses that ended by themselves hold no answer that the
    verifier reads, in words; None where they do.

    records: of the evaluation's samples.
    """
    ended = [record for record in records if not record.get("truncated")]
    none = sum(bool(record.get("no_answer")) for record in ended)
    if 2 * none <= len(ended):
        return None
    asked = r"\boxed" in report.template
    remedy = "" if asked else r"; ask for \boxed{} in data.prompt_template"
    if report.grader == "exact":
        remedy += f"{',' if remedy else ';'} or grade by exact_flexible, which reads other forms"
    return (
        f"{none} of {len(ended)} responses that ended by themselves have no answer that"
        f" evaluation.grader {report.grader} reads{remedy}"
    )
