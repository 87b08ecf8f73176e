"""RL from each of the four distilled starts: does forward KL leave a better one?

    kdjax study configs/study_rl_tiny.py           (two at once: --jobs 2)

Each cell of the 2x2 is distilled for 120 steps, exported, and trained by GRPO for 60 more (cells
rl_...), at one rate and batch. The claims of arXiv 2605.16826: forward-KL starts rise, and
DAgger-then-RL ends above OPD-then-RL at matched steps. The control of each (cells more_...) goes on
distilling, for about GRPO's FLOPs. What was seen, of all but the controls: docs/study.md.
"""

import dataclasses

from kdjax import Config, Study, clipped_surrogate, forward_kl, reverse_kl
from kdjax.config import RL, Evaluation, Optimizer
from kdjax.config.claims import Claim


def get_study() -> Study:
    base = Config(evaluation=Evaluation(every_steps=20))
    starts = {
        f"{prefix}_{name}": dataclasses.replace(base, prefix=prefix, token_loss=token_loss)
        for name, token_loss in (("forward", forward_kl), ("reverse", reverse_kl))
        for prefix in ("teacher", "student")
    }
    grpo = dataclasses.replace(
        base,
        prefix="student",
        objective=clipped_surrogate(0.2),
        steps=60,
        batch_size=64,
        rl=RL(group_size=8, redraws=1),
        optimizer=Optimizer(learning_rate=5e-4, final_fraction=1.0),
    )
    then = {f"rl_{name}": name for name in starts}
    steps = {"student": 82, "teacher": 64}  # at 4.1e9 and 5.2e9 FLOPs each; GRPO's are 3.3e11
    more = {
        f"more_{name}": dataclasses.replace(config, steps=steps[config.prefix])
        for name, config in starts.items()
    }
    return Study(
        "runs/study_rl_tiny",
        starts | dict.fromkeys(then, grpo) | more,
        seeds=(0, 1, 2),
        starts=then | {name: name.removeprefix("more_") for name in more},
        claims=(
            *(
                Claim(f"rises_{name}", f"RL raises Avg@k from {name}", "avg", (after,), (name,))
                for after, name in then.items()
            ),
            *(
                Claim(
                    f"beats_{name}", f"RL from {name} ends above more distillation", "avg",
                    (after,), (f"more_{name}",),
                )
                for after, name in then.items()
            ),
            Claim(
                "dagger_then_rl", "DAgger-then-RL ends above OPD-then-RL", "avg",
                ("rl_student_forward",), ("rl_student_reverse",),
            ),
            Claim(
                "forward_then_rl", "Forward-KL starts end above reverse-KL starts", "avg",
                ("rl_teacher_forward", "rl_student_forward"),
                ("rl_teacher_reverse", "rl_student_reverse"),
            ),
            Claim(
                "entropy_after_rl", "After RL, forward-KL starts keep more entropy", "entropy",
                ("rl_student_forward",), ("rl_student_reverse",),
            ),
        ),
    )  # fmt: skip
