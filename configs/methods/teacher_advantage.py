"""Advantages that the teacher modulates: a response's own, and beside it, token by token, the
teacher's log-ratio.

    kdjax train configs/methods/teacher_advantage.py
"""

from kdjax import Config, add, group_advantage, log_ratio, policy_gradient, scale
from kdjax.config import RL, Optimizer


def get_config() -> Config:
    return Config(
        run="runs/methods/teacher_advantage",
        prefix="student",
        objective=policy_gradient(add(group_advantage, scale(log_ratio, 0.5))),
        rl=RL(group_size=8),
        optimizer=Optimizer(learning_rate=3e-4),
    )
