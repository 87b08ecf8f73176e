"""Dr. GRPO: no division by the group's deviation, nor by a response's own length (arXiv 2503.20783;
the paper divides by a constant, here it is the number of the batch's tokens).

Two updates over each rollout, their ratios clipped, show what the surrogate is for.

    kdjax train configs/methods/dr_grpo.py
"""

from kdjax import Config, centered, clipped_surrogate, token_mean
from kdjax.config import RL, Optimizer


def get_config() -> Config:
    return Config(
        run="runs/methods/dr_grpo",
        teacher=None,
        prefix="student",
        objective=clipped_surrogate(0.2),
        reduction=token_mean,
        rl=RL(group_size=8, advantage=centered, epochs=2),
        optimizer=Optimizer(learning_rate=3e-4),
    )
