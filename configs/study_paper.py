"""The study with the paper's models, Qwen3-4B into Qwen3-0.6B-Base, 128 to 4,096 tokens.

    kdjax study configs/study_paper.py --only student_reverse/seed_0     one run, on its own pod
    kdjax study configs/study_paper.py                                   the rest, and the report

12 cells, three seeds, with the base settings of configs/paper/qwen3_4b_to_06b.py; prompts.jsonl,
heldout.jsonl and test.jsonl (columns prompt and answer) lie where the command runs. Planned, not
run: `kdjax plan configs/paper/qwen3_4b_to_06b.py --topology v5e:4x4` says what a run needs.
"""

import dataclasses
import runpy
from pathlib import Path

from kdjax import Study
from kdjax.config import Curriculum

here = Path(__file__).parent
tiny = runpy.run_path(str(here / "study_tiny.py"))
pair = runpy.run_path(str(here / "paper" / "qwen3_4b_to_06b.py"))


def get_study() -> Study:
    base = pair["get_config"]()
    base = dataclasses.replace(
        base, evaluation=dataclasses.replace(base.evaluation, every_steps=250)
    )
    gate = Curriculum(
        lengths=(128, 256, 512, 1024, 2048, 4096),
        entropy_threshold_nats=0.2,
        measure_every_steps=250,
        heldout_file="heldout.jsonl",
    )
    cells = tiny["two_by_two"](base) | tiny["mixing"](base) | tiny["lengths"](base, gate)
    return Study("runs/study_paper", cells, seeds=(0, 1, 2), claims=tiny["CLAIMS"])
