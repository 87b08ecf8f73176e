"""The evaluation of a config: the ways in which it samples, and the checks of its settings."""

from __future__ import annotations

import dataclasses
from collections import Counter

from kdjax.base import Sampling
from kdjax.config.schema import Evaluation
from kdjax.errors import ConfigError
from kdjax.grading.symbolic import check_installed
from kdjax.rollouts.choose import check_sampling


def evaluated_at(evaluation: Evaluation) -> tuple[Sampling, ...]:
    """How an evaluation samples: the report's own way first, then at its other temperatures.

    >>> [str(one) for one in evaluated_at(Evaluation(temperatures=(0.6,)))]
    ['temperature 1.0', 'temperature 0.6']
    """
    first = evaluation.sampling
    return first, *(dataclasses.replace(first, temperature=t) for t in evaluation.temperatures)


def check_evaluation(evaluation: Evaluation) -> None:
    """Errors: ConfigError naming the field, what it got and the remedy."""
    first, *others = evaluated_at(evaluation)
    check_sampling(first, "evaluation.sampling.")
    for sampling in others:
        check_sampling(sampling, "evaluation.temperatures: ")
    twice = [at.temperature for at, n in Counter((first, *others)).items() if n > 1]
    if twice:
        raise ConfigError(
            f"evaluation.temperatures {evaluation.temperatures} stand beside evaluation.sampling"
            f" ({first}), and {twice[0]} is among them twice; name each once"
        )
    if not evaluation.k or not all(1 <= k <= evaluation.samples for k in evaluation.k):
        raise ConfigError(
            f"evaluation.k must lie in 1..samples ({evaluation.samples}), got {evaluation.k}; give"
            " other k (--k), or draw more (evaluation.samples, --n)"
        )
    if min(evaluation.problems, evaluation.max_new_tokens, evaluation.batch_size) < 1:
        raise ConfigError("evaluation.problems, max_new_tokens and batch_size must be at least 1")
    if evaluation.every_steps < 0 or evaluation.samples_during_training < 1:
        raise ConfigError(
            "evaluation.every_steps must be at least 0 and samples_during_training at least 1, got"
            f" {evaluation.every_steps} and {evaluation.samples_during_training}"
        )
    if evaluation.grader.startswith("math"):
        check_installed(f"evaluation.grader {evaluation.grader}")  # before the run, not at its end
