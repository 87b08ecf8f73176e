"""What a checkpoint's fingerprints cost, beside a training step and a save of the quickstart.

python tests/support/checkpoint_cost.py
"""

from __future__ import annotations

import dataclasses
import runpy
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax

from kdjax.storage.checkpoints import open_checkpoints
from kdjax.storage.fingerprint import fingerprints
from kdjax.training import loop
from kdjax.training.parts.build import build, fresh_state

STEPS, REPEATS = 6, 21


def milliseconds(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(act())
    return 1e3 * (time.perf_counter() - began)


def main() -> None:
    quickstart = Path(__file__).parents[2] / "configs" / "quickstart.py"
    study = runpy.run_path(str(quickstart))["get_study"]()
    with tempfile.TemporaryDirectory() as folder:
        config = dataclasses.replace(study.cells["student_forward"], run=f"{folder}/run")
        parts = build(config)
        states = [fresh_state(parts)]
        checkpoints = open_checkpoints(Path(folder) / "checkpoints")

        def step() -> object:
            number = int(states[-1].step)
            rollout = loop._rollout(parts, states[-1], number)
            states[:] = [loop._update(parts, states[-1], number, rollout, float("nan"))[0]]
            return states[-1]

        def save() -> None:
            checkpoints.save(int(states[-1].step), states[-1], {})

        steps, marks, saves = [], [], []
        for _ in range(STEPS):  # in turn, so that all are measured under the same load
            steps.append(milliseconds(step))
            marks += [milliseconds(lambda: fingerprints(states[-1])) for _ in range(REPEATS)]
            saves.append(milliseconds(save))
            checkpoints.close()
    a_step, mark, a_save = (
        statistics.median(times[len(times) // STEPS :]) for times in (steps, marks, saves)
    )
    leaves, every = jax.tree.leaves(states[-1]), config.save_every_steps
    print(f"{sum(leaf.size for leaf in leaves):,} numbers in {len(leaves)} arrays; medians in ms:")
    print(
        f"a step {a_step:.0f}, fingerprints {mark:.2f}, a save until training goes on {a_save:.0f}"
    )
    print(
        f"fingerprints, share of a step: {mark / a_step:.2%}; saved every {every} steps,", end=" "
    )
    print(f"{mark / a_step / every:.4%}")


if __name__ == "__main__":
    main()
