"""GKD: Jensen-Shannon between the KLs, half of the steps on the student's responses and half on
the dataset's (arXiv 2306.13649, beta 0.5 and lambda 0.5).

    kdjax train configs/methods/gkd.py
"""

from kdjax import Config, Turn, jensen_shannon


def get_config() -> Config:
    return Config(
        run="runs/methods/gkd",
        prefix="student",
        token_loss=jensen_shannon(0.5),
        turns=(Turn(share=0.5, prefix="dataset"),),
    )
