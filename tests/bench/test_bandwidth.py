"""The bandwidth model: its rounds by hand, its bytes against the cache's arrays."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from shapes import OF_EACH_FAMILY, SHAPES
from tiny import tiny_config

from kdjax import models
from kdjax.bench.bandwidth import (
    Machine,
    RowBytes,
    level_rounds,
    level_seconds,
    machine_of,
    row_bytes,
    static_seconds,
)
from kdjax.models.known import KNOWN
from kdjax.rollouts import sampler


def test_the_bandwidth_model_by_hand():
    """Three rows to 100, 300 and 512 tokens on a machine where only the cache's slots cost."""
    machine = Machine(1.0, 1.0, 0.0, 1e30, 0.0, RowBytes(1.0), 1e9)
    lengths = np.array([100, 300, 512])
    rounds = list(level_rounds(lengths, 10, 512, lambda slots: 2))
    counted = [(r.rows, r.slots, r.steps) for r in rounds]
    levels = {slots: [c for c in counted if c[1] == slots] for slots in (74, 138, 266, 522)}
    assert counted == list(itertools.chain(*levels.values()))
    assert levels[74] == [(2, 74, 16)] * 4 + [(1, 74, 16)] * 4  # two rows, then the third alone
    assert levels[138][:3] == [(2, 138, 16)] * 3  # the first row ends at 100
    assert levels[522] == [(2, 522, 64), (1, 522, 64), (1, 522, 64), (1, 522, 64)]
    seconds = level_seconds(lengths, 10, 512, machine)
    own = sum(r.rows * r.slots * r.steps for r in level_rounds(lengths, 10, 512, lambda slots: 512))
    assert seconds == own
    assert static_seconds(lengths, 10, 512, machine) == (300 + 512) * 2 * 522


def test_bytes_of_a_row_by_hand():
    """Gemma 3 1B: 4 full layers of 26, one key/value head of 256, windows of 512; Qwen3.5-0.8B: 6
    full layers of 24 with two heads, 16 states of 128 x 128 and the last 3 inputs of 6,144
    channels in each of the others."""
    gemma, qwen = (row_bytes(KNOWN[name].config) for name in ("google/gemma-3-1b-pt", QWEN))
    assert gemma.held(4096) == 2 * 256 * 2 * (4 * 4096 + 22 * 512) == gemma.moved(4096)
    assert gemma.held(100) == 2 * 256 * 2 * 26 * 100
    state = 18 * (16 * 128 * 128 * 4 + 3 * 6144 * 2)
    assert qwen.held(4096) == 2 * 2 * 256 * 2 * 6 * 4096 + state
    assert qwen.moved(4096) == qwen.held(4096) + state
    assert machine_of(KNOWN[QWEN].config).parameters == 752_393_024
    paper = machine_of(KNOWN["Qwen/Qwen3-0.6B-Base"].config)
    assert paper._replace(parameters=596e6) == Machine()


QWEN = "Qwen/Qwen3.5-0.8B-Base"


@pytest.mark.parametrize("family", OF_EACH_FAMILY)
@pytest.mark.parametrize("slots", [4, 96])
def test_bytes_held_are_those_of_the_arrays(family, slots):
    """Of every family, below and above its window."""
    model = models.build(tiny_config(40, **SHAPES[family]), jnp.bfloat16)
    assert row_bytes(model.config).held(slots) == sampler.row_bytes(model, slots)
