"""A bandwidth model of rollouts: what a schedule costs on an accelerator that is not here.

A decode step takes (weights + cache read) / (bandwidth * efficiency) + a fixed overhead; prefill
its FLOPs at 40 % of the peak. The schedule is the sampler's own (`sampler.levels`).
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

    def step_seconds(self, slots: float) -> float:
        """One token of every row of a batch whose cache has so many slots."""
        moved = 2 * self.parameters + slots * self.bytes_a_slot
        return moved / (self.bandwidth * self.efficiency) + self.overhead_seconds

    def prefill_seconds(self, tokens: float) -> float:
        """Prompts of so many tokens together."""
        return 2 * self.parameters * tokens / (0.4 * self.flops)


def mixed_lengths(rows: int, limit: int, seed: int = 0) -> np.ndarray:
    """Response lengths: geometric, of mean limit / 5, cut at the limit."""
    drawn = np.random.default_rng(seed).geometric(5 / limit, rows)
    return np.minimum(drawn, limit)


def static_seconds(lengths: np.ndarray, prompt: int, limit: int, machine: Machine) -> float:
    """Batches in the order of their rows, each until its longest row ends, each step reading the
    whole cache."""
    slots = prompt + limit
    rows = rows_within(machine.cache_bytes, machine.bytes_a_slot * slots, len(lengths))
    total = 0.0
    for first in range(0, len(lengths), rows):
        batch = lengths[first : first + rows]
        total += machine.prefill_seconds(prompt * len(batch))
        total += int(batch.max()) * machine.step_seconds(rows * slots)
    return total


class Round(NamedTuple):
    """`steps` tokens of a batch of `rows`, in caches of `slots`; `prefilled` tokens before them."""

    rows: int
    slots: int
    steps: int
    prefilled: int


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
            for at in range(level.first, level.last, level.steps):
                live = int((batch > at).sum())
                if live == 0:
                    break
                size = min(size, rounded_up(live))
                yield Round(size, slots, level.steps, prefilled)
                prefilled = 0


def level_seconds(lengths: np.ndarray, prompt: int, limit: int, machine: Machine) -> float:
    """The sampler's schedule: levels, full batches, survivors compacted and prefilled again."""

    def most(slots: int) -> int:
        return rows_within(machine.cache_bytes, machine.bytes_a_slot * slots, ROWS)

    return sum(
        machine.prefill_seconds(round_.prefilled)
        + round_.steps * machine.step_seconds(round_.rows * round_.slots)
        for round_ in level_rounds(lengths, prompt, limit, most)
    )


def lognormal_lengths(rows: int, limit: int, mean: float = 1100.0, seed: int = 0) -> np.ndarray:
    """Response lengths as long reasoning has them: most short, some up to the limit."""
    deviation = 0.8
    centre = math.log(mean) - deviation**2 / 2
    drawn = np.random.default_rng(seed).lognormal(centre, deviation, rows).astype(int)
    return np.clip(drawn, 16, limit)
