"""On-policy self-distillation (OPSD): the student writes, and itself as it was at the start, which
has read the worked solution, says at each token how it would go on.

The model must be able to use a solution that stands in its prompt. The embedded student is not;
what it can use shows configs/methods/self_taught.py.

    kdjax train configs/methods/opsd.py --data.name openai/gsm8k --evaluation.name openai/gsm8k \
        --student MODEL --data.max_prompt_tokens 512 --data.max_teacher_prompt_tokens 1024
"""

from kdjax import Config, forward_kl
from kdjax.config import Data


def get_config() -> Config:
    told = "{prompt}\n\nA worked solution:\n{solution}\n\nNow solve it in your own words."
    return Config(
        run="runs/methods/opsd",
        teacher="self",
        self_decay=1.0,
        prefix="student",
        token_loss=forward_kl,
        data=Data(teacher_prompt_template=told, max_teacher_prompt_tokens=256),
    )
