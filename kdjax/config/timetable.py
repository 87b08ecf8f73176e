"""The timetable of a run: whose method takes which step, how many updates, when is measured."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import jax.numpy as jnp

from kdjax.base import Objective, Reduction, Rollout, Scores, TokenLoss
from kdjax.config.schema import Config, Curriculum, Prefix
from kdjax.errors import ConfigError
from kdjax.losses.combinators import runs_on
from kdjax.losses.objectives import negative_log_likelihood
from kdjax.losses.reductions import weigh_by

GOLDEN_RATIO = (5**0.5 - 1) / 2


class Method(NamedTuple):
    """How a step trains: on whose responses, by which comparison, minimising what; whether the
    responses are drawn in groups and rewarded, and how many updates are made over one rollout."""

    prefix: Prefix
    token_loss: TokenLoss
    objective: Objective
    rewarded: bool = False
    updates: int = 1


@dataclasses.dataclass(frozen=True)
class Timetable:
    """The steps of a run, made once from its config (`timetable`) and carried.

    methods: the config's own, then those of its turns. turns: (share, first step) of each turn.
    measured: the steps (from 0) before which the held-out entropy is measured.
    """

    steps: int
    methods: tuple[Method, ...]
    turns: tuple[tuple[float, int], ...] = ()
    measured: range = range(0)

    def learns_from_teacher(self) -> bool:
        """Whether some method trains on a teacher's responses, or may read its distribution, as all
        do but plain likelihood."""
        return any(
            one.prefix == "teacher" or one.objective is not negative_log_likelihood
            for one in self.methods
        )

    def turn_at(self, step: int) -> int:
        """Which of `methods` takes a step. The golden ratio's multiples spread the turns evenly:
        after n steps each has had its share of them to within a few.

        >>> from kdjax.config.schema import Turn
        >>> half = timetable(Config(turns=(Turn(share=0.5),)))
        >>> [half.turn_at(step) for step in range(6)]
        [0, 1, 0, 1, 0, 0]
        """
        shares = [1.0]
        for share, from_step in self.turns:
            taken = share if step >= from_step else 0.0
            shares = [*(one * (1 - taken) for one in shares), taken]
        place = step * GOLDEN_RATIO % 1.0
        return min(bisect.bisect_right(list(itertools.accumulate(shares)), place), len(shares) - 1)

    def at(self, step: int) -> Method:
        """The method that takes a step."""
        return self.methods[self.turn_at(step)]

    def updates(self) -> int:
        """Updates of the whole run."""
        return sum(self.at(step).updates for step in range(self.steps))

    def draws(self, prefix: Prefix) -> bool:
        """Whether some step trains on these responses."""
        return any(method.prefix == prefix for method in self.methods)


def timetable(config: Config) -> Timetable:
    """A config's timetable; of a method without rewards a step makes one update, else rl.epochs."""
    methods = []
    for turn in (None, *config.turns):
        prefix, token_loss, objective = (
            getattr(turn, name, None) or getattr(config, name)
            for name in ("prefix", "token_loss", "objective")
        )
        rewarded = is_rewarded(prefix, objective, config.reduction, config.rl.group_size)
        updates = config.rl.epochs if rewarded else 1
        methods.append(Method(prefix, token_loss, objective, rewarded, updates))
    turns = tuple((turn.share, turn.from_step) for turn in config.turns)
    return Timetable(
        config.steps, tuple(methods), turns, _measured_before(config.curriculum, config.steps)
    )


OF_REWARDS = ("advantage", "parts")
"""The `Scores` that no other than a rewarded rollout brings, and those of the loss itself."""


@functools.lru_cache(maxsize=64)
def is_rewarded(
    prefix: Prefix, objective: Objective, reduction: Reduction, group_size: int
) -> bool:
    """Whether responses are drawn in groups and rewarded: the student's, where the objective or the
    reduction does not run without."""
    if prefix != "student" or group_size == 1:
        return False
    if not runs_on(objective, *(n for n in Scores._fields[4:] if n not in OF_REWARDS)):
        return True
    ones = jnp.ones((1, 1))
    rows: dict[str, Any] = {n: ones[0] if n.endswith("_b") else ones for n in Rollout._fields}
    del rows["pass_rate_b"], rows["signal_b"]
    known: dict[str, Any] = {n: ones for n in Scores._fields if n not in OF_REWARDS}
    scores = Scores(**known)._replace(mask=ones > 0)
    try:
        drawn = Rollout(**rows)._replace(truncated_b=ones[0] > 0)
        weigh_by(reduction, ones > 0, drawn, scores)
    except (ConfigError, TypeError, AttributeError):  # what None does in an expression
        return True
    return False


def _measured_before(curriculum: Curriculum, steps: int) -> range:
    """None of a fixed horizon, and step 0 for a threshold that is relative to it.

    >>> curriculum = Curriculum(lengths=(8, 16), entropy_threshold_nats=0.1, measure_every_steps=50)
    >>> list(_measured_before(curriculum, steps=120))
    [50, 100]
    """
    if len(curriculum.lengths) == 1:
        return range(0)
    every, relative = curriculum.measure_every_steps, curriculum.entropy_threshold_share is not None
    return range(0 if relative else every, steps, every)
