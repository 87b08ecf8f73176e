"""The stop token: is the inflation of lengths the horizon's, or the stop token's?

    kdjax study configs/study_stops.py --jobs 2

A base student ends with <|endoftext|>, its chat teacher with <|im_end|>: at the teacher's end the
student is pushed away from its own. Stop tokens raw, masked and merged, with both KLs, on student
prefixes of up to 160 tokens; otherwise configs/study_tiny.py. What was seen: docs/study.md.
"""

import dataclasses
import runpy
from pathlib import Path

from kdjax import Study, forward_kl, reverse_kl
from kdjax.config.claims import Claim

tiny = runpy.run_path(str(Path(__file__).with_name("study_tiny.py")))


def get_study() -> Study:
    base = dataclasses.replace(tiny["BASE"], student="kdjax:study-student-endoftext")
    cells = {
        f"{name}_{stops}": dataclasses.replace(
            base, prefix="student", token_loss=token_loss, stops=stops
        )
        for name, token_loss in (("forward", forward_kl), ("reverse", reverse_kl))
        for stops in ("raw", "mask", "merge")
    }
    raw, merge = ("forward_raw", "reverse_raw"), ("forward_merge", "reverse_merge")
    claims = (
        Claim("raw_length", "Raw stop tokens end with longer responses", "length", raw, merge),
        Claim("raw_truncated", "Raw stop tokens end truncated", "truncated", raw, merge),
        Claim("merge_avg", "Merged stop tokens have the higher Avg@k", "avg", merge, raw),
        Claim(
            "mask_length", "Masked stop tokens end longer than merged ones", "length",
            ("forward_mask", "reverse_mask"), merge,
        ),
    )  # fmt: skip
    return Study("runs/study_stops", cells, seeds=(0, 1, 2), claims=claims)
