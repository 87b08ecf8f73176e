"""On-policy distillation: student prefixes, reverse KL (arXiv 2605.16826, bottom right).

kdjax train configs/student_reverse.py
"""

from kdjax import Config, reverse_kl


def get_config() -> Config:
    return Config(run="runs/student_reverse", prefix="student", token_loss=reverse_kl)
