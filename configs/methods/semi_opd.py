"""Semi-on-policy distillation (arXiv 2610.11291): the student's responses as it is at the start,
drawn once and frozen, with the teacher's last hidden states beside them, so that training draws
nothing and loads no teacher. The start-up report's first-step token overlap says whether fresh
responses (configs/student_reverse.py) may be worth their price. First:

    kdjax rollouts configs/student_reverse.py --out runs/semi_opd --keep states

    kdjax train configs/methods/semi_opd.py
"""

from kdjax import Config, reverse_kl


def get_config() -> Config:
    return Config(
        run="runs/methods/semi_opd",
        prefix="student",
        token_loss=reverse_kl,
        trajectories="runs/semi_opd",
    )
