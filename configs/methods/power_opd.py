"""PowerOPD: the advantage p^a - q^a is bounded by 1 for every a, where a log-ratio has no bound.

The released script's exponent is 5; at 0.5 small probabilities count more, as in a log-ratio.

kdjax train configs/methods/power_opd.py
"""

from kdjax import Config, policy_gradient, power_difference


def get_config() -> Config:
    return Config(
        run="runs/methods/power_opd",
        prefix="student",
        objective=policy_gradient(power_difference(0.5)),
    )
