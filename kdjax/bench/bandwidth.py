"""A bandwidth model of rollouts: what a schedule costs on an accelerator that is not here.

A decode step takes (weights + what it moves of the cache) / (bandwidth * efficiency) + a fixed
overhead; prefill its FLOPs at 40 % of the peak. The schedule is the sampler's own
(`rollouts.levels`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from kdjax.models.parameters import parameter_count
from kdjax.models.shape import LINEAR, DecoderConfig, layer_kinds
from kdjax.rollouts.levels import levels, rounded_up, rows_within
from kdjax.rollouts.sampler import ROWS


class RowBytes(NamedTuple):
    """Bytes of a row's cache: of keys and values a slot in layers that see all slots; pairs
    (window, bytes a slot) of layers that see the last ones; of states and convolution tails."""

    a_slot: float
    windows: tuple[tuple[int, float], ...] = ()
    state: float = 0.0

    def held(self, slots: int) -> float:
        """In memory, of so many slots."""
        near = sum(min(slots, window) * a_slot for window, a_slot in self.windows)
        return self.a_slot * slots + near + self.state

    def moved(self, slots: int) -> float:
        """By one decode step: keys and values are read, a state is read and written."""
        return self.held(slots) + self.state


def row_bytes(config: DecoderConfig, itemsize: int = 2) -> RowBytes:
    """The bytes of a decoder's cache, keys and values of `itemsize` bytes a number.

    >>> row_bytes(DecoderConfig(10, 4, 8, 2, 2, 1, 2)).held(5)
    80.0
    """
    keys_values = 2.0 * config.num_key_value_heads * config.head_dim * itemsize
    total, windows, state = 0.0, [], 0.0
    for kind in layer_kinds(config):
        if kind.mixer == LINEAR:
            keys = config.linear_num_key_heads * config.linear_key_head_dim
            values = config.linear_num_value_heads * config.linear_value_head_dim
            tail = (config.linear_conv_kernel_dim - 1) * (2 * keys + values) * itemsize
            state += 4 * values * config.linear_key_head_dim + tail  # states are float32
        elif kind.window is None:
            total += keys_values
        else:
            windows.append((kind.window, keys_values))
    return RowBytes(total, tuple(windows), state)


class Machine(NamedTuple):
    """An H100 and, by default, Qwen3-0.6B in bfloat16, 60 GB of it for the cache."""

    bandwidth: float = 3.0e12
    efficiency: float = 0.6
    overhead_seconds: float = 1e-3
    flops: float = 8e14
    parameters: float = 596e6
    row: RowBytes = RowBytes(114_688.0)
    cache_bytes: float = 60e9

    def step_bytes(self, rows: int, slots: int) -> float:
        """Bytes that a decode step moves: all weights, of tied tables once, and of each row what
        its kinds of layers read."""
        return 2 * self.parameters + rows * self.row.moved(slots)

    def seconds(self, round_: Round) -> float:
        """A round's prefill and its steps."""
        moved = self.step_bytes(round_.rows, round_.slots)
        step = moved / (self.bandwidth * self.efficiency) + self.overhead_seconds
        return round_.steps * step + 2 * self.parameters * round_.prefilled / (0.4 * self.flops)

    def fit(self, slots: int, most: int) -> int:
        """Rows at a time whose cache fits, at most so many."""
        return rows_within(self.cache_bytes, self.row.held(slots), most)


def machine_of(config: DecoderConfig) -> Machine:
    """An H100 that decodes this model in bfloat16."""
    parameters = parameter_count(config, active=True) + config.vocab_size * config.hidden_size
    return Machine(parameters=parameters, row=row_bytes(config))


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
