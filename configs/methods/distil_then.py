"""One method after the other: forward KL on the teacher's responses, then reverse KL on the
student's own, from the middle of the run on.

    kdjax train configs/methods/distil_then.py
"""

from kdjax import Config, Turn, forward_kl, reverse_kl


def get_config() -> Config:
    return Config(
        run="runs/methods/distil_then",
        prefix="teacher",
        token_loss=forward_kl,
        turns=(Turn(from_step=60, prefix="student", token_loss=reverse_kl),),
    )
