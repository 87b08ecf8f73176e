"""KL mixing that goes from forward to reverse KL: cover the teacher's modes first, sharpen later.

The weight and both KLs are metrics at every step.

    kdjax train configs/methods/mix_schedule.py
"""

from kdjax import Config, forward_kl, linear, mix, reverse_kl


def get_config() -> Config:
    return Config(
        run="runs/methods/mix_schedule",
        prefix="student",
        token_loss=mix(forward_kl, reverse_kl, weight=linear(1.0, 0.2)),
    )
