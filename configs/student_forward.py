"""DAgger-style on-policy SFT: student prefixes, forward KL (arXiv 2605.16826, bottom left).

kdjax train configs/student_forward.py
"""

from kdjax import Config, forward_kl


def get_config() -> Config:
    return Config(run="runs/student_forward", prefix="student", token_loss=forward_kl)
