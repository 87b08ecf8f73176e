"""The mixing sweep alone: the weight of forward KL from 0 to 1, on student prefixes.

    kdjax study configs/study_mixing.py

Seven cells of configs/study_tiny.py, three seeds: predicted 18 to 26 minutes on two CPU cores, from
the quickstart's 35 to 60 s a cell. Not run yet.
"""

import runpy
from pathlib import Path

from kdjax import Study

tiny = runpy.run_path(str(Path(__file__).with_name("study_tiny.py")))


def get_study() -> Study:
    whole = tiny["get_study"]()
    cells = {
        name: config
        for name, config in whole.cells.items()
        if name.startswith("mix_") or name in ("student_forward", "student_reverse")
    }
    claims = tuple(c for c in whole.claims if {*c.more, *c.less} <= {*cells})
    return Study("runs/study_mixing", cells, seeds=whole.seeds, claims=claims)
