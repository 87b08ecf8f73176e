"""DIAL-OPD: sampled-token distillation on the best 40 % of each response's tokens, ranked by
log-ratio and probability gap, without the final stop token (arXiv 2610.11659; that the two are
multiplied is our reading, its code was not seen).

    kdjax train configs/methods/dial.py
"""

from kdjax import (
    Config,
    disagreement,
    except_stop,
    log_ratio,
    policy_gradient,
    sequence_mean,
    top_share,
)


def get_config() -> Config:
    return Config(
        run="runs/methods/dial",
        prefix="student",
        objective=policy_gradient(log_ratio),
        reduction=except_stop(top_share(sequence_mean, disagreement, 0.4)),
    )
