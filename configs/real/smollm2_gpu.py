"""The study of configs/real/smollm2.py at the lengths of GSM8K's solutions, for one GPU.

    ./launch/real.sh --device gpu        # ... kdjax study configs/real/smollm2_gpu.py

300 steps of 64 sequences of up to 1,024 tokens a cell, bfloat16 compute; 512 test problems with
four samples. Not run yet.
"""

import dataclasses
import runpy
from pathlib import Path

from kdjax import Study
from kdjax.config import Curriculum

small = runpy.run_path(str(Path(__file__).with_name("smollm2.py")))


def get_study() -> Study:
    base = small["BASE"]
    evaluation = dataclasses.replace(
        base.evaluation,
        file="runs/real/test_512.jsonl",
        samples=4,
        k=(1, 4),
        max_new_tokens=1024,
        batch_size=128,
        every_steps=100,
    )
    large = dataclasses.replace(
        base,
        steps=300,
        batch_size=64,
        curriculum=Curriculum(lengths=(1024,)),
        evaluation=evaluation,
        dtype="bfloat16",
        save_every_steps=100,
        log_every_steps=5,
    )
    return Study("runs/real/smollm2_gpu", small["cells"](large))
