"""Distillation from the teacher's 8 most probable tokens and the mass of the rest.

It costs as much as the whole vocabulary where the teacher is here; it shows what is lost where
only a top-k was kept (`kdjax rollouts CONFIG --keep top_k=8`, docs/prefixes.md).

    kdjax train configs/methods/top_k.py
"""

from kdjax import Config, at_top_k, forward_kl


def get_config() -> Config:
    return Config(
        run="runs/methods/top_k",
        prefix="teacher",
        token_loss=at_top_k(forward_kl, 8),
    )
