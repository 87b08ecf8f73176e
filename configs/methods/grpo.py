"""GRPO: eight samples of a problem, each rewarded by its answer, advantages within the group
(arXiv 2402.03300).

No teacher. The start must already solve a part of the problems: distil first, export, and give it
as --student. The rate is low as six problems are a step: at 1e-3 the reward falls to 0 within 60
steps (docs/methods.md), at 24 problems a step it does not.

    kdjax train configs/methods/grpo.py
"""

from kdjax import Config, clipped_surrogate
from kdjax.config import RL, Optimizer


def get_config() -> Config:
    return Config(
        run="runs/methods/grpo",
        student="kdjax:student",
        teacher=None,
        prefix="student",
        objective=clipped_surrogate(0.2),
        rl=RL(group_size=8),
        optimizer=Optimizer(learning_rate=3e-4),
    )
