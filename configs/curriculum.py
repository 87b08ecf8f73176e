"""On-policy distillation with the entropy-gated length curriculum: 16, 32, then 64 tokens.

    kdjax train configs/curriculum.py
    kdjax train configs/curriculum.py --curriculum.policy hold        # or fall_back
    kdjax train configs/curriculum.py --curriculum.entropy_threshold_nats None \\
        --curriculum.entropy_threshold_share 0.5         # half of the start's entropy

Every 30 steps the student's held-out entropy is measured on its own responses; the limit rises
while it is at least the threshold, and stays for good at the last stable length once it is not.

Seen (seed 0, two CPU cores, Python 3.11, jax 0.10.2, commit a483971f9e81, 3.5 minutes beside other
jobs): 0.161 nats before step 30, so 32 tokens; 0.151 before step 60, so it stops there; 0.132
before step 90. Avg@8 29.6 +- 2.5 %, Pass@8 77.0 +- 4.2 %, entropy 0.139, 4.1e11 FLOPs.
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
