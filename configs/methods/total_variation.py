"""f-distill with total variation: symmetric and bounded (arXiv 2307.15190).

With `--token_loss "alpha_divergence(0.5)"` it is four times the squared Hellinger distance,
another f-divergence between the two KLs.

    kdjax train configs/methods/total_variation.py
"""

from kdjax import Config, total_variation


def get_config() -> Config:
    return Config(
        run="runs/methods/total_variation",
        prefix="student",
        token_loss=total_variation,
    )
