"""Where the time of steps goes: parts by a clock of the test's own, and once for real."""

from __future__ import annotations

import dataclasses
import gzip
import json
import statistics
import threading
from collections import defaultdict
from pathlib import Path

import jax
import pytest
from runs import assert_bitwise_equal, even_digits, final_state, logged

from kdjax import clipped_surrogate
from kdjax.commands.train import profile_steps
from kdjax.config import RL
from kdjax.errors import ConfigError, StorageError
from kdjax.runtime import files
from kdjax.runtime.profiling import UNPROFILED, open_stopwatch, profiling, table
from kdjax.storage import run_folder
from kdjax.training import loop as train_module


class Late:
    """What a device is still at when it is returned."""

    def __init__(self, wait):
        self.block_until_ready = wait


def test_the_time_of_a_part_is_its_own():
    """A part within a part, what the device does after the call, and what is compiled in it belong
    to one part each; the parts of a step sum to it; a lap begins anew, without other threads."""
    seconds = [0.0]
    watch = open_stopwatch(lambda: seconds[0])

    def passes(by: float) -> None:
        seconds[0] += by

    def compiles() -> None:
        passes(3.0)
        watch.compiled(1.0)  # traced within what is lowered: told twice, counted once
        passes(1.0)
        watch.compiled(3.0)

    def update() -> Late:
        passes(1.0)
        watch.timed("teacher", passes, 2.0)
        watch.timed("score", compiles)
        return Late(lambda: passes(10.0))

    passes(0.5)
    watch.timed("update", update)
    step = watch.lap(7)
    assert step.parts == {
        "update": 11.0, "teacher": 2.0, "score": 1.0, "compiling": 3.0, "other": 0.5,
    }  # fmt: skip
    assert step.seconds == sum(step.parts.values()) == 17.5
    passes(0.25)
    other = threading.Thread(target=watch.timed, args=("ahead", lambda: None))
    other.start()
    other.join()
    assert watch.lap(8) == (8, 0.25, {"other": 0.25})


@pytest.mark.release
def test_a_profile_of_a_run(tiny, tmp_path, capsys):
    """With and without it a run has the same bits and metrics. Its steps are those after the
    warm-up, whose parts sum to the wall time within 5 %; by the trace, which is what Perfetto
    reads, steps and parts are as long."""
    plain = dataclasses.replace(
        tiny, teacher=None, objective=clipped_surrogate(0.2), rl=RL(4, even_digits), steps=5
    )
    profiled = dataclasses.replace(plain, run=str(tmp_path / "profiled"))
    train_module.train(plain)
    train_module.train(profiled, 2)
    assert_bitwise_equal(final_state(plain)[1], final_state(profiled)[1])
    assert logged(plain) == logged(profiled)
    assert not (Path(plain.run) / run_folder.PROFILE).exists()
    folder = Path(profiled.run) / run_folder.PROFILE
    steps = files.read_json(folder / "steps.json")
    assert [step["number"] for step in steps] == [3, 4]
    for step in steps:
        assert {"input", "rollout", "verify", "score and update", "log"} <= set(step["parts"])
        assert ("checkpoint" in step["parts"]) == (step["number"] == 4)
        assert sum(step["parts"].values()) == pytest.approx(step["seconds"])
    assert statistics.median(s["parts"]["other"] / s["seconds"] for s in steps) < 0.05
    events = defaultdict(list)
    with gzip.open(folder / "trace.json.gz") as file:
        for event in json.load(file)["traceEvents"]:
            events[event.get("name")].append(event.get("dur", 0) / 1e6)
    wall = sum(step["seconds"] for step in steps)
    assert sum(events["step"]) == pytest.approx(wall, rel=0.05)
    verified = sum(step["parts"]["verify"] for step in steps)
    assert 0 < sum(events["verify"]) <= verified < sum(events["rollout"]) <= wall
    rows = (folder / "steps.md").read_text()
    assert "score and update" in rows
    assert "steps 3 to 4" in rows
    assert "ui.perfetto.dev" in capsys.readouterr().out


def test_what_cannot_be_written_ends_no_run(tmp_path, monkeypatch, capsys):
    """A full disk is told; the steps go on, and none is left out. After the profile nothing is
    waited for."""

    def full(*_):
        raise StorageError("no space left")

    monkeypatch.setattr(files, "write_json", full)
    waited, done = [], []
    with profiling(tmp_path / "profile", 1) as profile:
        for number in profile.steps(range(10, 15), lambda: done.append(1)):
            profile.timed("part", Late, lambda number=number: waited.append(number))
    assert waited == [10, 11, 12]
    assert len(done) == 3
    assert "not written to" in capsys.readouterr().out


def test_another_profiler_ends_no_run(tmp_path, capsys):
    """Where JAX can't trace, the steps are timed all the same, and the other trace goes on."""
    with jax.profiler.trace(tmp_path / "another"), profiling(tmp_path / "profile", 1) as profile:
        assert list(profile.steps(range(5), lambda: None)) == [0, 1, 2, 3, 4]
    (step,) = files.read_json(tmp_path / "profile" / "steps.json")
    assert step["number"] == 3
    assert list((tmp_path / "another").rglob("*.xplane.pb"))
    said = capsys.readouterr().out
    assert "can't trace these steps" in said
    assert "perfetto" not in said


def test_too_few_steps(tmp_path, capsys):
    """A run that ends within the warm-up says so, and writes nothing; 0 steps are no profile."""
    with profiling(tmp_path / "profile", 5) as profile:
        assert list(profile.steps(range(2), lambda: None)) == [0, 1]
    assert "nothing was profiled" in capsys.readouterr().out
    assert not (tmp_path / "profile").exists()
    with profiling(tmp_path / "profile", 0) as profile:
        assert profile is UNPROFILED


def test_flag():
    """--profile has a number, or 5; other arguments stay as they are."""
    for given, steps, left in [
        ("", 0, ""),
        ("--seed 1", 0, "--seed 1"),
        ("--profile", 5, ""),
        ("--profile --seed 1", 5, "--seed 1"),
        ("--seed 1 --profile 8", 8, "--seed 1"),
        ("--profile=8 --seed 1", 8, "--seed 1"),
    ]:
        rest = given.split()
        assert (profile_steps(rest), " ".join(rest)) == (steps, left)
    with pytest.raises(ConfigError, match="--profile takes a number of steps, got few"):
        profile_steps(["--profile", "few"])


def test_table():
    """The longest part first, means and shares over all steps, the most of one step."""
    watch = open_stopwatch(lambda: 0.0)
    step = watch.lap(3)._replace(seconds=1.0, parts={"a": 0.25, "b": 0.75, "none": 0.0})
    other = step._replace(number=4, seconds=3.0, parts={"a": 2.75, "b": 0.25})
    assert table([step, other])[1] == [
        ["a", "1500.0", "75.0", "2750.0"],
        ["b", "500.0", "25.0", "750.0"],
        ["steps 3 to 4", "2000.0", "100.0", "3000.0"],
    ]
