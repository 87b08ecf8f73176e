"""Off-policy SFT, soft targets: teacher prefixes, forward KL (arXiv 2605.16826, top left).

kdjax train configs/teacher_forward.py
"""

from kdjax import Config, forward_kl


def get_config() -> Config:
    return Config(run="runs/teacher_forward", prefix="teacher", token_loss=forward_kl)
