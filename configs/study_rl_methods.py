"""Does each shipped RL config raise its student, and by more than distilling it for as long?

    kdjax study configs/study_rl_methods.py        (two at once: --jobs 2)

Each config of configs/methods/ that trains on a reward, as it is shipped, from the embedded student
(claims rises_...), beside on-policy distillation from the same start, read at equal FLOPs (claims
beats_...); and GRPO from that distilled student beside as much more distillation. What was seen:
docs/study.md.
"""

import dataclasses
import runpy
from pathlib import Path

from kdjax import Config, Study, reverse_kl
from kdjax.config import Evaluation
from kdjax.config.claims import Claim

METHODS = (
    "grpo", "dapo", "dr_grpo", "grpo_reference", "kdrl", "teacher_advantage", "opd_then_rl",
    "dagger_then_rl",
)  # fmt: skip


def get_study() -> Study:
    folder, tests = Path(__file__).parent / "methods", Evaluation(every_steps=20)
    distil = Config(prefix="student", token_loss=reverse_kl, evaluation=tests)
    rl = {
        name: dataclasses.replace(
            runpy.run_path(str(folder / f"{name}.py"))["get_config"](), evaluation=tests
        )
        for name in METHODS
    }
    after = {"distil_more": distil, "distil_grpo": rl["grpo"]}
    return Study(
        "runs/study_rl_methods",
        {"distil": distil} | rl | after,
        starts=dict.fromkeys(after, "distil"),
        claims=(
            *(Claim(f"rises_{n}", f"{n} raises Avg@k", "avg", (n,), ("start",)) for n in rl),
            *(
                Claim(
                    f"beats_{n}", f"{n} is above distillation at equal FLOPs", "avg",
                    (n,), ("distil",), reading="flops",
                )
                for n in rl
            ),
            Claim("rises_after", "GRPO raises the distilled student", "avg",
                  ("distil_grpo",), ("distil",)),
            Claim("beats_after", "GRPO raises it by more than as many steps of distillation",
                  "avg", ("distil_grpo",), ("distil_more",)),
        ),
    )  # fmt: skip
