"""Sequence-level KD: plain SFT on what the teacher wrote (arXiv 1606.07947).

Hard targets in place of the teacher's distributions: the one-sample form of forward KL on teacher
prefixes.

    kdjax train configs/methods/sequence_kd.py
"""

from kdjax import Config, negative_log_likelihood


def get_config() -> Config:
    return Config(
        run="runs/methods/sequence_kd",
        prefix="teacher",
        objective=negative_log_likelihood,
    )
