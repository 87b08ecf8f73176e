"""A bandwidth model of rollouts: what a schedule costs on an accelerator that is not here.

A decode step takes (weights + cache read) / (bandwidth * efficiency) + a fixed overhead; prefill
its FLOPs at 40 % of the peak. The schedule is the sampler's own (`rollouts.levels`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from kdjax.rollouts.levels import levels, rounded_up, rows_within
from kdjax.rollouts.sampler import ROWS


class Machine(NamedTuple):
    """An H100 and Qwen3-0.6B in bfloat16, 60 GB of it for the cache."""

    bandwidth: float = 3.0e12
    efficiency: float = 0.6
    overhead_seconds: float = 1e-3
    flops: float = 8e14
    parameters: float = 596e6
    bytes_a_slot: float = 114_688.0
    cache_bytes: float = 60e9

    def seconds(self, round_: Round) -> float:
        """A round's prefill and its steps, each reading the whole cache."""
        moved = 2 * self.parameters + round_.rows * round_.slots * self.bytes_a_slot
        step = moved / (self.bandwidth * self.efficiency) + self.overhead_seconds
        return round_.steps * step + 2 * self.parameters * round_.prefilled / (0.4 * self.flops)

    def fit(self, slots: int, most: int) -> int:
        """Rows at a time whose cache fits, at most so many."""
        return rows_within(self.cache_bytes, self.bytes_a_slot * slots, most)


class Round(NamedTuple):
    """`steps` tokens of a batch of `rows`, in caches of `slots`; `prefilled` tokens before them."""

    rows: int
    slots: int
    steps: int
    prefilled: int


def static_seconds(lengths: np.ndarray, prompt: int, limit: int, machine: Machine) -> float:
    """Batches in the order of their rows, each until its longest row ends, each step reading the
    whole cache."""
    slots = prompt + limit
    rows = machine.fit(slots, len(lengths))
    batches = [lengths[first : first + rows] for first in range(0, len(lengths), rows)]
    rounds = [Round(rows, slots, int(own.max()), prompt * len(own)) for own in batches]
    return sum(map(machine.seconds, rounds))


def level_seconds(lengths: np.ndarray, prompt: int, limit: int, machine: Machine) -> float:
    """The sampler's schedule: levels, full batches, survivors compacted and prefilled again."""
    rounds = level_rounds(lengths, prompt, limit, lambda slots: machine.fit(slots, ROWS))
    return sum(map(machine.seconds, rounds))


def level_rounds(
    lengths: np.ndarray, prompt: int, limit: int, most: Callable[[int], int]
) -> Iterator[Round]:
    """What the sampler does for responses of these lengths, if most(slots) rows fit at a time."""
    for level in levels(limit):
        going, slots = lengths[lengths > level.first], level.slots(prompt)
        for first in range(0, len(going), most(slots)):
            batch = going[first : first + most(slots)]
            size = rounded_up(len(batch))
            prefilled = (prompt + level.first) * size
            for at in range(level.first, int(min(batch.max(), level.last)), level.steps):
                size = min(size, rounded_up(int((batch > at).sum())))
                yield Round(size, slots, level.steps, prefilled)
                prefilled = 0


def _geometric(rows: int, limit: int) -> np.ndarray:
    return np.minimum(np.random.default_rng(0).geometric(5 / limit, rows), limit)


def _lognormal(rows: int, limit: int) -> np.ndarray:
    """As long reasoning has them: most short, some up to the limit."""
    deviation = 0.8
    centre = math.log(1100) - deviation**2 / 2
    drawn = np.random.default_rng(0).lognormal(centre, deviation, rows)
    return np.clip(drawn.astype(int), 16, limit)


LENGTHS: dict[str, Callable[[int, int], np.ndarray]] = {
    "geometric, mean a fifth": _geometric,
    "lognormal, mean 1,014": _lognormal,
}
"""Lengths of so many responses up to a limit."""
