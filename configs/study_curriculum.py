"""How much hangs on the curriculum's threshold and ladder? The paper does not say.

    kdjax study configs/study_curriculum.py --jobs 2

The gated curriculum of configs/study_tiny.py with three thresholds (shares of the start's entropy)
on its ladder, and two other ladders at its threshold. What was seen: docs/study.md.
"""

import dataclasses
import runpy
from pathlib import Path

from kdjax import Study, reverse_kl
from kdjax.config.claims import Claim

tiny = runpy.run_path(str(Path(__file__).with_name("study_tiny.py")))


def get_study() -> Study:
    base = dataclasses.replace(tiny["BASE"], prefix="student", token_loss=reverse_kl)
    gate = tiny["GATE"]
    gates = {
        f"share_{share}": dataclasses.replace(gate, entropy_threshold_share=share)
        for share in (0.6, 0.8, 0.95)
    } | {
        "two_rungs": dataclasses.replace(gate, lengths=(24, 160)),
        "four_rungs": dataclasses.replace(gate, lengths=(24, 48, 96, 160)),
    }
    claims = (
        Claim("low_threshold", "A low threshold has the higher Avg@k than a high one", "avg",
              ("share_0.6",), ("share_0.95",)),
        Claim("rungs", "Four rungs have a higher Avg@k than two", "avg",
              ("four_rungs",), ("two_rungs",)),
    )  # fmt: skip
    cells = {name: dataclasses.replace(base, curriculum=gate) for name, gate in gates.items()}
    return Study("runs/study_curriculum", cells, seeds=(0, 1, 2), claims=claims)
