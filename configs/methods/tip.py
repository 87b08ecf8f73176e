"""TIP: on-policy distillation on the half of each response's tokens where the student is unsure, or
sure and far from the teacher (arXiv 2604.14084; its scale of both is the batch's, here the
response's). `most_uncertain(sequence_mean, 0.5)` is its first axis alone, without a second pass.

    kdjax train configs/methods/tip.py
"""

from kdjax import (
    Config,
    reverse_divergence,
    reverse_kl,
    sequence_mean,
    student_entropy,
    top_either,
)


def get_config() -> Config:
    return Config(
        run="runs/methods/tip",
        prefix="student",
        token_loss=reverse_kl,
        reduction=top_either(sequence_mean, student_entropy, reverse_divergence, 0.5),
    )
