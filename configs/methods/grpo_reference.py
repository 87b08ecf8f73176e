"""GRPO with a KL to where it started, exact over the whole vocabulary: the reference stands where
a teacher would.

With `--reference MODEL --objective "add(clipped_surrogate(0.2),
scale(policy_gradient(reference_log_ratio), 0.05))"` it is the estimator of sampled tokens that
has the right gradient.

    kdjax train configs/methods/grpo_reference.py
"""

from kdjax import Config, add, clipped_surrogate, divergence, reverse_kl, scale
from kdjax.config import RL, Optimizer


def get_config() -> Config:
    return Config(
        run="runs/methods/grpo_reference",
        teacher="kdjax:student",
        prefix="student",
        token_loss=reverse_kl,
        objective=add(clipped_surrogate(0.2), scale(divergence, 0.05)),
        rl=RL(group_size=8),
        optimizer=Optimizer(learning_rate=3e-4),
    )
