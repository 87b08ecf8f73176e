"""What the steps of a config are: whose method takes which, how many updates, when is measured."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
from typing import Any

import jax.numpy as jnp

from kdjax.base import Rollout, Scores
from kdjax.config.schema import Config
from kdjax.errors import ConfigError
from kdjax.losses.combinators import runs_on

GOLDEN_RATIO = (5**0.5 - 1) / 2


def methods(config: Config) -> tuple[Config, ...]:
    """The config's own method and those of its turns, each as a config without turns."""
    alone = dataclasses.replace(config, turns=())
    others = (
        {
            name: getattr(turn, name)
            for name in ("prefix", "token_loss", "objective")
            if getattr(turn, name) is not None
        }
        for turn in config.turns
    )
    return (alone, *(dataclasses.replace(alone, **fields) for fields in others))


def turn_at(config: Config, step: int) -> int:
    """Which of `methods` takes a step. The golden ratio's multiples spread the turns evenly: after
    n steps each has had its share of them to within a few.

    >>> from kdjax.config.schema import Turn
    >>> half = Config(turns=(Turn(share=0.5),))
    >>> [turn_at(half, step) for step in range(6)]
    [0, 1, 0, 1, 0, 0]
    """
    shares = [1.0]
    for turn in config.turns:
        taken = turn.share if step >= turn.from_step else 0.0
        shares = [*(share * (1 - taken) for share in shares), taken]
    place = step * GOLDEN_RATIO % 1.0
    return min(bisect.bisect_right(list(itertools.accumulate(shares)), place), len(shares) - 1)


def updates_at(config: Config, step: int) -> int:
    """Updates that a step makes: `rl.epochs` over a rollout that is rewarded, else one."""
    return updates_of(methods(config)[turn_at(config, step)])


def updates_of(method: Config) -> int:
    """Updates that a step of this method makes."""
    return method.rl.epochs if is_rewarded(method) else 1


OF_REWARDS = ("advantage", "parts")
"""The `Scores` that no other than a rewarded rollout brings, and those of the loss itself."""


@functools.lru_cache(maxsize=64)
def is_rewarded(method: Config) -> bool:
    """Whether a method's responses are drawn in groups and rewarded: the student's, where the
    objective or the reduction does not run without."""
    if method.prefix != "student" or method.rl.group_size == 1:
        return False
    if not runs_on(method.objective, *(n for n in Scores._fields[4:] if n not in OF_REWARDS)):
        return True
    ones = jnp.ones((1, 1))
    rows: dict[str, Any] = {n: ones[0] if n.endswith("_b") else ones for n in Rollout._fields}
    del rows["pass_rate_b"]
    try:
        drawn = Rollout(**rows)._replace(truncated_b=ones[0] > 0)
        method.reduction(ones > 0, drawn)
    except (ConfigError, TypeError, AttributeError):  # what None does in an expression
        return True
    return False


def measured_before(config: Config) -> range:
    """The steps (from 0) before which the held-out entropy is measured: none of a fixed horizon,
    and step 0 for a threshold that is relative to it.

    >>> from kdjax.config.schema import Curriculum
    >>> curriculum = Curriculum(lengths=(8, 16), entropy_threshold_nats=0.1, measure_every_steps=50)
    >>> list(measured_before(Config(steps=120, curriculum=curriculum)))
    [50, 100]
    """
    curriculum = config.curriculum
    if len(curriculum.lengths) == 1:
        return range(0)
    every, relative = curriculum.measure_every_steps, curriculum.entropy_threshold_share is not None
    return range(0 if relative else every, config.steps, every)
