"""On-policy distillation, then GRPO, with a hard switch (arXiv 2609.04108). RL comes when the
cosine has brought the rate from 3e-3 to 5e-4: that of distillation would destroy the student.

kdjax train configs/methods/opd_then_rl.py
"""

from kdjax import Config, Turn, clipped_surrogate, reverse_kl
from kdjax.config import RL


def get_config() -> Config:
    return Config(
        run="runs/methods/opd_then_rl",
        prefix="student",
        token_loss=reverse_kl,
        turns=(Turn(from_step=90, objective=clipped_surrogate(0.2)),),
        rl=RL(group_size=8),
    )
