"""The study of configs/study_tiny.py for one GPU: five seeds, larger batches, more test problems.

    kdjax study configs/study_gpu.py               (on several GPUs: --jobs N)

12 cells, five seeds, 240 steps of 256 sequences of 20,480 problems; the pair is tiny's, for want of
a larger one that is shipped. Meant for at most 20 minutes on one H100; not run yet.
"""

import dataclasses
import runpy
from pathlib import Path

from kdjax import Study
from kdjax.config import Evaluation

tiny = runpy.run_path(str(Path(__file__).with_name("study_tiny.py")))


def get_study() -> Study:
    whole = tiny["get_study"]()
    evaluation = Evaluation(problems=400, batch_size=512, max_new_tokens=192, every_steps=40)
    cells = {
        name: dataclasses.replace(
            config,
            steps=240,
            batch_size=256,
            data=dataclasses.replace(config.data, problems=20_480),
            evaluation=evaluation,
            curriculum=dataclasses.replace(config.curriculum, measure_every_steps=60),
        )
        for name, config in whole.cells.items()
    }
    return Study("runs/study_gpu", cells, seeds=(0, 1, 2, 3, 4), claims=whole.claims)
