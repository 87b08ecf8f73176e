"""The paper's study on embedded arithmetic: its 2x2, mixing and curriculum, with a verdict a claim.

    kdjax study configs/study_tiny.py --jobs 2

12 cells, three seeds, 80 steps of 24 sequences each: 37 minutes on two CPU cores beside other jobs
(docs/study.md has the results). The task is `recheck`
(docs/embedded.md): many styles of one solution, responses of up to 160 tokens; 640 problems, seen
three times, so that the teacher's responses are reused and the student's drawn anew.

Every cell is at the long length but fixed_short and the two curricula; student_reverse is also the
fixed long length, and with student_forward the ends of the mixing sweep.
"""

import dataclasses

from kdjax import Config, Study, forward_kl, mix, reverse_kl
from kdjax.config import Curriculum, Data, Evaluation
from kdjax.config.claims import paper_claims

WEIGHTS = (0.1, 0.25, 0.5, 0.75, 0.9)  # of forward KL; 0 and 1 are cells of the 2x2
CLAIMS = paper_claims(
    teacher_forward="teacher_forward",
    teacher_reverse="teacher_reverse",
    student_forward="student_forward",
    student_reverse="student_reverse",
    forward_heavy="mix_0.75",
    short="fixed_short",
    long="student_reverse",
    curriculum="gated",
    margin=0.03,
)
BASE = Config(
    student="kdjax:study-student",
    teacher="kdjax:study-teacher",
    steps=80,
    batch_size=24,
    data=Data(task="recheck", terms=(4, 5, 6, 7), problems=640, max_prompt_tokens=32),
    curriculum=Curriculum(lengths=(160,)),
    evaluation=Evaluation(problems=100, max_new_tokens=192, every_steps=20),
    save_every_steps=80,
)
GATE = Curriculum(
    lengths=(24, 64, 160),
    entropy_threshold_share=0.8,
    measure_every_steps=20,
    heldout_problems=48,
)


def get_study() -> Study:
    cells = two_by_two(BASE) | mixing(BASE) | lengths(BASE, GATE)
    return Study("runs/study_tiny", cells, seeds=(0, 1, 2), claims=CLAIMS)


def two_by_two(base: Config) -> dict[str, Config]:
    """Whose prefixes, and which KL. The two that read the teacher's responses don't stand side by
    side, so that with --jobs 2 one draws them for both."""
    return {
        f"{prefix}_{name}": dataclasses.replace(base, prefix=prefix, token_loss=token_loss)
        for name, token_loss in (("forward", forward_kl), ("reverse", reverse_kl))
        for prefix in ("teacher", "student")
    }


def mixing(base: Config) -> dict[str, Config]:
    """Mixes of both KLs on student prefixes."""
    return {
        f"mix_{weight}": dataclasses.replace(
            base, prefix="student", token_loss=mix(forward_kl, reverse_kl, weight=weight)
        )
        for weight in WEIGHTS
    }


def lengths(base: Config, gate: Curriculum) -> dict[str, Config]:
    """On-policy distillation at the shortest length of the gate, by the gate, and by its schedule
    whatever the entropy."""
    short = Curriculum(lengths=gate.lengths[:1])
    ungated = dataclasses.replace(gate, entropy_threshold_nats=0.0, entropy_threshold_share=None)
    return {
        name: dataclasses.replace(
            base, prefix="student", token_loss=reverse_kl, curriculum=curriculum
        )
        for name, curriculum in (("fixed_short", short), ("gated", gate), ("ungated", ungated))
    }
