"""SmolLM2-135M-Instruct into ten of its thirty layers on GSM8K: the four cells, and a mix.

    ./launch/real.sh        # makes models and problems, then: kdjax study configs/real/smollm2.py

A real tokenizer, template and vocabulary (49,152 tokens) on a CPU: 40 steps of 8 sequences of up to
64 tokens a cell, 95 minutes of CPU time in all on two cores (docs/real_run.md has the results).
Without two thirds of its layers the student says nothing sensible at first (KL to the teacher: 6 to
7 nats a token), so the question is how fast it speaks again; neither a cell nor the teacher solves
GSM8K in 96 tokens. The teacher's own log-probability of what a student says is -(entropy +
KL(s‖t)) nats a token: the last table that launch/real.sh prints.
"""

import dataclasses

from kdjax import Config, Study, forward_kl, mix, reverse_kl
from kdjax.config import Curriculum, Data, Evaluation, Optimizer

BASE = Config(
    student="runs/real/student",
    teacher="runs/real/teacher",
    steps=40,
    batch_size=8,
    data=Data(file="runs/real/train.jsonl", max_prompt_tokens=256),
    optimizer=Optimizer(learning_rate=2e-4, warmup_fraction=0.1, final_fraction=0.1),
    curriculum=Curriculum(lengths=(64,)),
    evaluation=Evaluation(
        file="runs/real/test_48.jsonl",
        samples=1,
        k=(1,),
        max_new_tokens=96,
        batch_size=16,
        grader="exact_flexible",
    ),
    save_every_steps=10,
    log_every_steps=1,
)


def get_study() -> Study:
    return Study("runs/real/smollm2", cells(BASE))


def cells(base: Config) -> dict[str, Config]:
    """Whose prefixes and which KL; and a mix of both on the student's."""
    found = {
        f"{prefix}_{name}": dataclasses.replace(base, prefix=prefix, token_loss=token_loss)
        for prefix in ("teacher", "student")
        for name, token_loss in (("forward", forward_kl), ("reverse", reverse_kl))
    }
    both = mix(forward_kl, reverse_kl, weight=0.5)
    return found | {"student_mix": dataclasses.replace(base, prefix="student", token_loss=both)}
