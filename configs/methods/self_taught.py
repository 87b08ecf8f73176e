"""A student that teaches itself: asked in words that it has never seen, by itself as it was at the
start, which reads the same question in signs that it knows.

    kdjax train configs/methods/self_taught.py
"""

from kdjax import Config, forward_kl
from kdjax.config import Data


def get_config() -> Config:
    return Config(
        run="runs/methods/self_taught",
        teacher="self",
        self_decay=1.0,
        prefix="student",
        token_loss=forward_kl,
        data=Data(task="words", teacher_prompt_template="{teacher_prompt}", max_prompt_tokens=60),
    )
