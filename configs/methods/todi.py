"""ToDi: at each entry of the vocabulary a sigmoid of log p - log q mixes the KLs (arXiv
2505.16297).

    kdjax train configs/methods/todi.py
"""

from kdjax import Config, token_wise_kl


def get_config() -> Config:
    return Config(
        run="runs/methods/todi",
        prefix="teacher",
        token_loss=token_wise_kl(1.0),
    )
