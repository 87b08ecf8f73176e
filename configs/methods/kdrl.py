"""KDRL: GRPO minus a scaled KL to the teacher, at the same tokens of the same responses, in the
mean over all tokens of the batch.

kdjax train configs/methods/kdrl.py
"""

from kdjax import Config, add, clipped_surrogate, divergence, reverse_kl, scale, token_mean
from kdjax.config import RL, Optimizer


def get_config() -> Config:
    return Config(
        run="runs/methods/kdrl",
        prefix="student",
        token_loss=reverse_kl,
        objective=add(clipped_surrogate(0.2), scale(divergence, 0.5)),
        reduction=token_mean,
        rl=RL(group_size=8),
        optimizer=Optimizer(learning_rate=3e-4),
    )
