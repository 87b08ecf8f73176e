"""PowerOPD: the advantage p^a - q^a is bounded by 1 where a log-ratio has no bound.

kdjax train configs/methods/power_opd.py
"""

from kdjax import Config, policy_gradient, power_difference


def get_config() -> Config:
    return Config(
        run="runs/methods/power_opd",
        prefix="student",
        objective=policy_gradient(power_difference(0.5)),
    )
