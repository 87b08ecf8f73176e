"""AKL: forward and reverse KL weighed, token by token, by where the two models are apart: in the
head of the teacher's distribution, or in its tail (arXiv 2404.02657, head mass 0.5).

    kdjax train configs/methods/akl.py
"""

from kdjax import Config, adaptive_kl


def get_config() -> Config:
    return Config(
        run="runs/methods/akl",
        prefix="teacher",
        token_loss=adaptive_kl(0.5),
    )
