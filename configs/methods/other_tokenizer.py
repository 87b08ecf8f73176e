"""Reverse KL to a teacher of any tokenizer, on the tokens that both cut alike (arXiv 2610.08448).
Here the teacher is the embedded one, all of whose tokens are the student's; give another.

kdjax train configs/methods/other_tokenizer.py --teacher FOLDER
"""

from kdjax import Config, reverse_kl


def get_config() -> Config:
    return Config(
        run="runs/methods/other_tokenizer",
        prefix="student",
        token_loss=reverse_kl,
        least_aligned=0.5,
    )
