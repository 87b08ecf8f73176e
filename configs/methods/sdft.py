"""Self-distillation fine-tuning (SDFT): learning from demonstrations on the student's own
responses. The teacher is the student's running average with the demonstration before it.

The demonstration is the row's worked response, here of the same question.

    kdjax train configs/methods/sdft.py --data.file demonstrations.jsonl \
        --evaluation.file test.jsonl --student MODEL
"""

from kdjax import Config, reverse_kl
from kdjax.config import Data


def get_config() -> Config:
    told = "{prompt}\n\nThis is an example of a response:\n{solution}\n\nNow answer yourself."
    return Config(
        run="runs/methods/sdft",
        teacher="self",
        self_decay=0.98,
        prefix="student",
        token_loss=reverse_kl,
        data=Data(teacher_prompt_template=told, max_teacher_prompt_tokens=256),
    )
