"""Off-policy distillation without a teacher in memory: its last hidden states were kept, so that
the KL is exact over the whole vocabulary. First:

    kdjax rollouts configs/teacher_forward.py --out runs/kept_states --keep states

    kdjax train configs/methods/kept_states.py
"""

from kdjax import Config, forward_kl


def get_config() -> Config:
    return Config(
        run="runs/methods/kept_states",
        prefix="teacher",
        token_loss=forward_kl,
        trajectories="runs/kept_states",
    )
