"""Off-policy SFT with soft targets: teacher prefixes, forward KL. arXiv 2605.16826, top left of the 2x2.

    kdjax train configs/teacher_forward.py

Two CPU cores, about a minute. Expected numbers stand in the README's quickstart table.
"""

from kdjax import Config, forward_kl


def get_config() -> Config:
    return Config(run="runs/teacher_forward", prefix="teacher", token_loss=forward_kl)
