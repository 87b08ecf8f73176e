"""PACED: on-policy distillation that weighs a problem by the student's own pass rate on it, most
where it is neither sure nor without a chance.

    kdjax train configs/methods/paced.py
"""

from kdjax import Config, paced, reverse_kl, sequence_mean
from kdjax.config import RL


def get_config() -> Config:
    return Config(
        run="runs/methods/paced",
        prefix="student",
        token_loss=reverse_kl,
        reduction=paced(sequence_mean, 1.0),
        rl=RL(group_size=8),
    )
