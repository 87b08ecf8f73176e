"""Sampled-token on-policy distillation: REINFORCE with the reward log p - log q of the token
drawn, bounded so that a single token can't take over a step.

In expectation (without the bound) it is reverse KL on student prefixes, at a fraction of the cost
where a teacher only says log-probabilities. `--objective
"policy_gradient(log_compressed(log_ratio))"` compresses in place of cutting off.

    kdjax train configs/methods/sampled_opd.py
"""

from kdjax import Config, bounded, log_ratio, policy_gradient


def get_config() -> Config:
    return Config(
        run="runs/methods/sampled_opd",
        prefix="student",
        objective=policy_gradient(bounded(log_ratio, -5.0, 5.0)),
    )
