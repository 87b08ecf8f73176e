"""Damaged checkpoints: what comes back is what was saved, or an older state that was, with a line.

60 seeded damages here; the release form is

    KDJAX_DAMAGES=2000 python -m pytest -q -s tests/storage/test_damage.py
"""

from __future__ import annotations

import os
import random
import shutil
import sys
from collections import Counter
from pathlib import Path

from checkpoint_states import bits, like, state_of

from kdjax.errors import DataError
from kdjax.storage.checkpoints import QUARANTINE, open_checkpoints

COUNT, SEED = int(os.environ.get("KDJAX_DAMAGES", "60")), 0
STEPS = (1, 2, 3)


def flip(path: Path, rng: random.Random) -> None:
    raw = bytearray(path.read_bytes())
    at = rng.randrange(8 * len(raw))
    raw[at // 8] ^= 1 << at % 8
    path.write_bytes(raw)


def truncate(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def delete(path: Path, rng: random.Random) -> None:
    path.unlink()


def scramble(path: Path, rng: random.Random) -> None:
    raw = bytearray(path.read_bytes())
    at = rng.randrange(len(raw))
    raw[at : at + 16] = rng.randbytes(len(raw[at : at + 16]))
    path.write_bytes(raw)


def remove_item(path: Path, rng: random.Random) -> None:
    """The folder of the parameters, of the rest of the state, or of what was said of them."""
    step = next(folder for folder in path.parents if folder.name.isdecimal())
    shutil.rmtree(step / rng.choice(["params", "training", "about"]))


def damage_json(path: Path, rng: random.Random) -> None:
    """A JSON file that is still JSON: a digit is another one."""
    step = next(folder for folder in path.parents if folder.name.isdecimal())
    files = [file for file in sorted(step.rglob("*")) if file.is_file()]
    texts = [file for file in files if file.read_bytes().lstrip()[:1] == b"{"]
    path = rng.choice(texts)
    raw = bytearray(path.read_bytes())
    digits = [at for at, byte in enumerate(raw) if chr(byte).isdigit()]
    at = rng.choice(digits or range(len(raw)))
    raw[at] = ord(rng.choice([d for d in "0123456789" if ord(d) != raw[at]]))
    path.write_bytes(raw)


DAMAGES = [flip, flip, truncate, delete, scramble, remove_item, damage_json]


def damage(step: Path, rng: random.Random) -> str:
    """One damage to a file of a step, larger ones more often; what it was."""
    files = [path for path in sorted(step.rglob("*")) if path.is_file() and path.stat().st_size]
    path = rng.choices(files, [file.stat().st_size ** 0.5 for file in files])[0]
    act = rng.choice(DAMAGES)
    act(path, rng)
    return act.__name__


def saved(folder: Path) -> Path:
    checkpoints = open_checkpoints(folder, last=len(STEPS))
    for step in STEPS:
        checkpoints.save(step, state_of(step, devices=2), {"position": 10 * step})
    checkpoints.close()
    return folder


def outcome(folder: Path, hit: set[int], right: dict[int, list[bytes]]) -> str:
    """What a restore gives, which must be a state that was saved, whole."""
    checkpoints = open_checkpoints(folder)
    found, said = None, ""
    try:
        found = checkpoints.newest(like(2), lambda about: None)
    except DataError as error:
        said = str(error)
    if found is None:
        assert hit == set(STEPS)
        assert "no intact checkpoint" in said
        assert "\n" not in said
        return "no state, and one line"
    state, about = found
    step = about["step"]
    assert bits(state) == right[step], "a wrong state"
    assert about["position"] == 10 * step
    passed = [number for number in STEPS if number > step]
    assert set(passed) <= hit, "a false alarm"
    assert sorted(int(p.name) for p in folder.glob(f"{QUARANTINE}/*")) == passed
    assert checkpoints.steps() == [number for number in STEPS if number <= step]
    return "an older state, after a line" if passed else "the newest state"


def test_damaged_checkpoints(tmp_path, capfd, caplog, monkeypatch):
    """No wrong state, no false alarm, a line for each step that is moved aside, no traceback."""
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)  # pytest's own hides some
    good, rng, counts = saved(tmp_path / "good"), random.Random(SEED), Counter()
    right = {step: bits(state_of(step)) for step in STEPS}
    capfd.readouterr()
    for number in range(COUNT):
        folder = shutil.copytree(good, tmp_path / str(number))
        hit = rng.choice([{3}, {3}, {3}, {3}, {2, 3}, {1, 2, 3}])
        acts = [damage(folder / str(step), rng) for step in sorted(hit)]
        result = outcome(folder, hit, right)
        said = capfd.readouterr()
        lines = said.out.splitlines()
        assert said.err == "", acts
        assert not caplog.records
        assert len(lines) == len(list(folder.glob(f"{QUARANTINE}/*"))), lines
        assert all(" is damaged: " in line for line in lines)
        counts.update([result, f"{result}, the newest by {acts[-1]}"])
        shutil.rmtree(folder)
    assert counts["an older state, after a line"] > 0
    assert counts["the newest state"] > 0
    with capfd.disabled():
        print(f"\n{COUNT} damaged checkpoints, seed {SEED}: no wrong state, no traceback")
        print("".join(f"{count:6} {name}\n" for name, count in sorted(counts.items())), end="")
