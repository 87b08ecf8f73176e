"""f-distill with total variation, symmetric and bounded, half of it on the teacher's samples and
half on the student's (arXiv 2307.15190, eq. 10).

With `--token_loss "alpha_divergence(0.5)"` it is four times the squared Hellinger distance,
another f-divergence between the two KLs (not one of that paper's).

    kdjax train configs/methods/total_variation.py
"""

from kdjax import Config, Turn, total_variation


def get_config() -> Config:
    return Config(
        run="runs/methods/total_variation",
        prefix="student",
        token_loss=total_variation,
        turns=(Turn(share=0.5, prefix="teacher"),),
    )
