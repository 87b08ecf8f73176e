"""Entropy-aware on-policy distillation: reverse KL, and forward KL beside it where the teacher is
unsure, so that its several continuations are kept (arXiv 2603.07079; its forward KL is over the
teacher's top k, here over the whole vocabulary).

    kdjax train configs/methods/eopd.py
"""

from kdjax import Config, add, forward_divergence, reverse_divergence, where_teacher_unsure


def get_config() -> Config:
    return Config(
        run="runs/methods/eopd",
        prefix="student",
        objective=add(reverse_divergence, where_teacher_unsure(forward_divergence, 0.3)),
    )
