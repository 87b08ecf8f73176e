"""Model folders, tokenizers, data files and cached rollouts, damaged and forged at random: one
clear line, in bounded time and memory; nothing is run, and nothing outside is touched.

KDJAX_FUZZ=N reads N times as many (docs/reliability.md).
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hostile import SCALE

from kdjax.base import Samples, Trajectories
from kdjax.storage.trajectories import fill

CASES = 10  # of each kind
ROWS = [{"prompt": f"{n}+1=", "answer": str(n + 1), "solution": f"so {n + 1}"} for n in range(40)]


@pytest.fixture(scope="module")
def root(student_folder, tokenizer_folder, tmp_path_factory):
    """A folder of good files of each kind, beside a canary that nothing may touch."""
    import datasets

    root = tmp_path_factory.mktemp("hostile")
    good = root / "good"
    (root / "canary").mkdir()
    (root / "canary" / "secret").write_text('{"prompt": "secret", "answer": "1"}\n')
    shutil.copytree(student_folder, good / "model")
    shutil.copytree(
        tokenizer_folder, good / "tokenizer", ignore=shutil.ignore_patterns("*.safetensors")
    )
    for kind in ("jsonl", "csv", "parquet", "arrow", "saved"):
        (good / kind).mkdir()
    rows = datasets.Dataset.from_list(ROWS)
    rows.to_json(good / "jsonl" / "a.jsonl")
    rows.to_csv(good / "csv" / "a.csv", index=False)
    rows.to_parquet(good / "parquet" / "a.parquet")
    rows.save_to_disk(good / "saved")
    shutil.copyfile(next((good / "saved").glob("*.arrow")), good / "arrow" / "a.arrow")
    fill(good / "rollouts", {"rows": 10, "chunk_rows": 4, "max_new_tokens": 3}, draw)
    shutil.copytree(good / "rollouts", good / "resealed")
    return root


def draw(rows: np.ndarray) -> Trajectories:
    shape, lengths = (len(rows), 3), (rows % 4).astype(np.int32)
    floats = [np.full(shape, 0.5, np.float32) for _ in range(3)]
    return Trajectories(
        Samples(np.ones(shape, np.int32), lengths, *floats, np.full(len(rows), 7, np.int32))
    )


KINDS = (
    "model", "tokenizer", "jsonl", "csv", "parquet", "arrow", "saved", "rollouts", "resealed",
)  # fmt: skip


def test_spoilt_files_end_in_one_line(root):
    """Bits, cuts, forged JSON, links, pipes and archives in each file of each kind."""
    program = Path(__file__).parents[1] / "support" / "mutated.py"
    first = int(os.environ.get("KDJAX_FUZZ_SEED", "0"))
    run = subprocess.run(
        [sys.executable, str(program), str(root), str(first), str(CASES * SCALE), *KINDS],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    lines = run.stdout.splitlines()
    bad = [pair for pair in itertools.pairwise(lines) if pair[1].startswith("!!!")]
    assert not bad, "\n".join(": ".join(pair) for pair in bad)
    assert run.returncode == 0, (lines[-1:], run.stderr[-2000:])
    found = json.loads(lines[-1])
    print(found)
    assert found["refused"] > found["read"] / 4  # the mutations do harm
