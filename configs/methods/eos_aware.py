"""EOS-aware top share: on-policy distillation on the fifth of each response's tokens with most
reverse KL; the stop token, whose divergence would take a place in every response, is not ranked.

    kdjax train configs/methods/eos_aware.py
"""

from kdjax import Config, except_stop, reverse_divergence, reverse_kl, sequence_mean, top_share


def get_config() -> Config:
    return Config(
        run="runs/methods/eos_aware",
        prefix="student",
        token_loss=reverse_kl,
        reduction=except_stop(top_share(sequence_mean, reverse_divergence, 0.2)),
    )
