"""A student that teaches itself: asked in words that it has never seen, by itself as it was at the
start, which reads the same question in signs that it knows.

120 steps, 66 CPU seconds: Avg@8 on 100 test problems from 0.5 to 7.2 %, +6.8 (95 %: +4.7 to +8.8);
asked in signs the start has 16.0 (docs/methods.md).

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
