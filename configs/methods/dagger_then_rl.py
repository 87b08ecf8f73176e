"""DAgger-style distillation, then GRPO, with a hard switch (arXiv 2609.04108): forward KL keeps
more entropy for RL to explore with.

That this makes the better start is a claim of arXiv 2605.16826 that configs/study_rl_tiny.py
contradicts at its scale: reverse-KL starts end higher (docs/study.md). RL comes when the cosine
has brought the rate from 3e-3 to 5e-4: that of distillation would destroy the student.

kdjax train configs/methods/dagger_then_rl.py
"""

from kdjax import Config, Turn, clipped_surrogate, forward_kl
from kdjax.config import RL


def get_config() -> Config:
    return Config(
        run="runs/methods/dagger_then_rl",
        prefix="student",
        token_loss=forward_kl,
        turns=(Turn(from_step=90, objective=clipped_surrogate(0.2)),),
        rl=RL(group_size=8),
    )
