"""TIP: on-policy distillation on the half of the tokens where the student had most entropy when
it drew them (arXiv 2604.14084; its second axis, divergence at confident tokens, is not here).

    kdjax train configs/methods/tip.py
"""

from kdjax import Config, most_uncertain, reverse_kl, sequence_mean


def get_config() -> Config:
    return Config(
        run="runs/methods/tip",
        prefix="student",
        token_loss=reverse_kl,
        reduction=most_uncertain(sequence_mean, 0.5),
    )
