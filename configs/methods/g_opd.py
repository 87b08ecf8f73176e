"""G-OPD: the teacher's gain over a reference, amplified: scale (log p - log ref) - (log q - log
ref) (arXiv 2602.12125). At scale 1 it is sampled-token on-policy distillation.

The reference is the student's own start; the paper prefers the teacher's base where there is one.

    kdjax train configs/methods/g_opd.py
"""

from kdjax import Config, extrapolated, policy_gradient


def get_config() -> Config:
    return Config(
        run="runs/methods/g_opd",
        prefix="student",
        reference="kdjax:student",
        objective=policy_gradient(extrapolated(1.25)),
    )
