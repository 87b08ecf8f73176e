"""The study of configs/study_tiny.py for one GPU: five seeds, larger batches, more test problems.

    kdjax study configs/study_gpu.py               (on several GPUs: --jobs N)

12 cells, five seeds, 240 steps of 256 sequences. Meant for at most 20 minutes on one H100; not run
yet, so no figure of it is known.
"""

import dataclasses
import runpy
from pathlib import Path

from kdjax import Study
from kdjax.config import Evaluation

tiny = runpy.run_path(str(Path(__file__).with_name("study_tiny.py")))


def get_study() -> Study:
    whole = tiny["get_study"]()
    evaluation = Evaluation(problems=400, batch_size=512, every_steps=40)
    cells = {
        name: dataclasses.replace(
            config,
            steps=240,
            batch_size=256,
            evaluation=evaluation,
            curriculum=dataclasses.replace(config.curriculum, measure_every_steps=80),
        )
        for name, config in whole.cells.items()
    }
    return Study("runs/study_gpu", cells, seeds=(0, 1, 2, 3, 4), claims=whole.claims)
