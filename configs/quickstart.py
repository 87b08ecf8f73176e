"""The main job: the four objectives and the forward-heavy mix, from one student, for equal steps.

    ./launch/quickstart.sh        (or: kdjax study configs/quickstart.py)

Every cell differs from the others in two fields only, prefix and token_loss.
"""

import dataclasses

from kdjax import Config, Study, forward_kl, mix, reverse_kl


def get_study() -> Study:
    base = Config()
    methods = {
        "teacher_forward": ("teacher", forward_kl),
        "teacher_reverse": ("teacher", reverse_kl),
        "student_forward": ("student", forward_kl),
        "student_reverse": ("student", reverse_kl),
        "student_mix": ("student", mix(forward_kl, reverse_kl, weight=0.8)),
    }
    return Study(
        folder="runs/quickstart",
        cells={
            name: dataclasses.replace(base, prefix=prefix, token_loss=token_loss)
            for name, (prefix, token_loss) in methods.items()
        },
    )
