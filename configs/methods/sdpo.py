"""Self-distillation from feedback (SDPO): the student's running average reads the feedback and
scores every token of what the student wrote without it.

The feedback is the column `teacher_prompt` of the data, written before the run. SDPO's own is of
the response at hand (an environment's, or a better sample of the group), which is not here.

    kdjax train configs/methods/sdpo.py --data.columns teacher_prompt=feedback --student MODEL
"""

from kdjax import Config, jensen_shannon
from kdjax.config import Data, Evaluation


def get_config() -> Config:
    told = "{prompt}\n\nFeedback on an earlier attempt:\n{teacher_prompt}\n\nSolve it again."
    return Config(
        run="runs/methods/sdpo",
        teacher="self",
        self_decay=0.95,
        prefix="student",
        token_loss=jensen_shannon(0.5),
        data=Data(
            file="feedback.jsonl", teacher_prompt_template=told, max_teacher_prompt_tokens=256
        ),
        evaluation=Evaluation(file="test.jsonl"),
    )
