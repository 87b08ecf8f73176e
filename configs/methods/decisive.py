"""Decisive tokens: on-policy distillation on the two tokens of each response where student and
teacher differ most about what was drawn (after arXiv 2609.04565, one or two tokens a trajectory).

    kdjax train configs/methods/decisive.py
"""

from kdjax import Config, log_ratio, magnitude, reverse_kl, sequence_mean, top_tokens


def get_config() -> Config:
    return Config(
        run="runs/methods/decisive",
        prefix="student",
        token_loss=reverse_kl,
        reduction=top_tokens(sequence_mean, magnitude(log_ratio), 2),
    )
