"""What the processes of a run must see alike; of one process, it is what it sees."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils


def anywhere(flag: bool) -> bool:
    """Whether a process says so; each hears the same."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.int32(flag))))


def of_first_process(steps: list[int]) -> list[int]:
    """The first process's list, in every process."""
    if jax.process_count() == 1:
        return steps
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(steps))))
    own = np.resize(np.array(steps or [0], np.int32), size)
    return [int(step) for step in multihost_utils.broadcast_one_to_all(own)]


def by_first_process(act: Callable[[], None]) -> None:
    """Do it in the first process, while the others wait."""
    try:
        if jax.process_index() == 0:
            act()
    finally:
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("checkpoints")
