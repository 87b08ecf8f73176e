"""The length curriculum and its controls: one method and budget of steps, six ways to set lengths.

    kdjax study configs/curriculum_controls.py

long and short are fixed horizons at the ladder's ends. ungated rises at every measurement: no
entropy is under 0. stop is the gate of configs/curriculum.py; hold and fall_back differ from it in
what happens under the threshold. Everything else is shared, the evaluation's 64 tokens included.
"""

import dataclasses

from kdjax import Config, Study, reverse_kl
from kdjax.config import Curriculum


def get_study() -> Study:
    gate = Curriculum(lengths=(16, 32, 64), entropy_threshold_nats=0.155, measure_every_steps=30)
    curricula = {
        "long": Curriculum(lengths=(64,)),
        "short": Curriculum(lengths=(16,)),
        "ungated": dataclasses.replace(gate, entropy_threshold_nats=0.0),
        "stop": gate,
        "hold": dataclasses.replace(gate, policy="hold"),
        "fall_back": dataclasses.replace(gate, policy="fall_back"),
    }
    base = Config(prefix="student", token_loss=reverse_kl)
    return Study(
        folder="runs/curriculum_controls",
        cells={name: dataclasses.replace(base, curriculum=c) for name, c in curricula.items()},
    )
