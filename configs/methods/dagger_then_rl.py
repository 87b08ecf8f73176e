"""DAgger-style distillation, then GRPO: forward KL keeps the entropy that RL needs to explore.

kdjax train configs/methods/dagger_then_rl.py
"""

from kdjax import Config, Turn, clipped_surrogate, forward_kl
from kdjax.config import RL


def get_config() -> Config:
    return Config(
        run="runs/methods/dagger_then_rl",
        prefix="student",
        token_loss=forward_kl,
        turns=(Turn(from_step=60, objective=clipped_surrogate(0.2)),),
        rl=RL(group_size=8),
    )
