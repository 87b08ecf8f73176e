"""Offline-RL-style distillation: teacher prefixes, reverse KL (arXiv 2605.16826, top right).

kdjax train configs/teacher_reverse.py
"""

from kdjax import Config, reverse_kl


def get_config() -> Config:
    return Config(run="runs/teacher_reverse", prefix="teacher", token_loss=reverse_kl)
