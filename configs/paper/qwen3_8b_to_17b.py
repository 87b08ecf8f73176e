"""The larger pair: Qwen3-8B into Qwen3-1.7B-Base; everything else as in qwen3_4b_to_06b.py.

kdjax plan configs/paper/qwen3_8b_to_17b.py --topology v6e:2x4
"""

import dataclasses
import runpy
from pathlib import Path

from kdjax import Config


def get_config() -> Config:
    base = runpy.run_path(str(Path(__file__).with_name("qwen3_4b_to_06b.py")))["get_config"]()
    return dataclasses.replace(
        base,
        run="runs/qwen3_8b_to_17b",
        student="Qwen/Qwen3-1.7B-Base",
        teacher="Qwen/Qwen3-8B",
    )
