"""DAPO: GRPO that clips higher, replaces groups without signal by those of other problems, means
over the tokens of groups with signal alone, and pays less and less for responses that near the
limit (arXiv 2503.14476; it draws until the batch is full, here twice).

    kdjax train configs/methods/dapo.py
"""

from kdjax import Config, clipped_surrogate, token_mean, with_signal
from kdjax.config import RL, Optimizer


def get_config() -> Config:
    return Config(
        run="runs/methods/dapo",
        teacher=None,
        prefix="student",
        objective=clipped_surrogate(0.2, 0.28),
        reduction=with_signal(token_mean),
        rl=RL(group_size=8, epochs=2, redraws=2, overlong_buffer_tokens=16, overlong_penalty=0.5),
        optimizer=Optimizer(learning_rate=3e-4),
    )
