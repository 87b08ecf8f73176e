"""On-policy distillation on the first tokens of each response alone: whole responses are drawn,
and the loss ends after so many tokens.

    kdjax train configs/methods/prefix_only.py
"""

from kdjax import Config, first_tokens, reverse_kl, sequence_mean


def get_config() -> Config:
    return Config(
        run="runs/methods/prefix_only",
        prefix="student",
        token_loss=reverse_kl,
        reduction=first_tokens(sequence_mean, 16),
    )
