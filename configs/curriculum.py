"""On-policy distillation with the entropy-gated length curriculum: 16, 32, then 64 tokens.

    kdjax train configs/curriculum.py
    kdjax train configs/curriculum.py --curriculum.policy hold        # or fall_back
    kdjax train configs/curriculum.py --curriculum.entropy_threshold_nats None \\
        --curriculum.entropy_threshold_share 0.5         # half of the start's entropy

Every 30 steps the student's held-out entropy is measured on its own responses; the limit rises
while it is at least the threshold, and stays for good at the last stable length once it is not.
"""

from kdjax import Config, reverse_kl
from kdjax.config import Curriculum


def get_config() -> Config:
    return Config(
        run="runs/curriculum",
        prefix="student",
        token_loss=reverse_kl,
        curriculum=Curriculum(
            lengths=(16, 32, 64), entropy_threshold_nats=0.155, measure_every_steps=30
        ),
    )
