"""The watchdog by a clock of its own, and once for real."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from kdjax.runtime.watchdog import EXIT_CODE, _dump, open_watch, watchdog


class Clock:
    """Seconds and compilations, as a test moves them."""

    def __init__(self):
        self.seconds, self.compiled, self.said, self.ended = 0.0, 0, [], []

    def watch(self, limit_seconds: float | None = None):
        return open_watch(
            self.said.append,
            self.ended.append,
            limit_seconds=limit_seconds,
            clock=lambda: self.seconds,
            compilations=lambda: self.compiled,
        )

    def steps(self, watch, *seconds: float) -> None:
        for number, spent in enumerate(seconds):
            watch.begins(number)
            self.seconds += spent
            watch.looks()
            watch.done()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_step_of_ten_times_the_median_is_reported_once(clock):
    """Not at ten times, once a step after it, again for another step; the median does not follow
    a few slow steps."""
    watch = clock.watch()
    clock.steps(watch, 1, 1, 2, 1, 1)
    watch.begins(7)
    for seconds, reports in ((9.9, 0), (0.2, 1), (100.0, 1)):
        clock.seconds += seconds
        watch.looks()
        assert len(clock.said) == reports
    assert clock.said[0].startswith("step 7 takes over 10 s, more than 10 times the 1 s")
    watch.done()
    clock.steps(watch, 1, 11)
    assert len(clock.said) == 2


def test_the_first_steps_and_short_ones_are_not_reported(clock):
    """Four steps tell no median; and under five seconds nothing is said."""
    clock.steps(clock.watch(), 1, 1, 1, 1, 1000)
    clock.steps(clock.watch(), *[0.01] * 9, 4.9)
    assert clock.said == []


def test_a_step_that_compiles_is_neither_reported_nor_counted(clock):
    """A new length compiles for minutes; what came before is still the median after it."""
    watch = clock.watch()
    clock.steps(watch, *[1.0] * 5)
    for step in range(20):
        watch.begins(step)
        clock.compiled += 1
        clock.seconds += 300
        watch.looks()
        watch.done()
    assert clock.said == []
    clock.steps(watch, 11)
    assert len(clock.said) == 1


def test_steps_that_the_device_is_behind_with_count_together(clock):
    """The host begins five steps in a moment and waits for the last: a step's pace is a fifth."""
    watch = clock.watch()
    for _ in range(5):
        for step in range(5):
            watch.begins(step)
        clock.seconds += 5
        watch.looks()
        watch.done()
    for step in range(5):
        watch.begins(step)
    clock.seconds += 49
    watch.looks()
    assert clock.said == []
    clock.seconds += 2
    watch.looks()
    assert len(clock.said) == 1


def test_a_step_over_its_limit_ends_the_process(clock):
    """From the begin of the newest step on, compiling or not, and again for what is written after
    it; while it rests there is no limit."""
    watch = clock.watch(limit_seconds=30)
    watch.begins(1)
    clock.seconds += 29
    watch.begins(2)
    clock.compiled += 1
    clock.seconds += 29
    watch.looks()
    assert clock.ended == []
    clock.seconds += 2
    watch.looks()
    assert "step 2 takes longer than faults.step_limit_seconds 30" in clock.ended[0]
    watch.done()
    clock.seconds += 29
    watch.looks()
    assert len(clock.ended) == 1
    clock.seconds += 2
    watch.looks()
    assert len(clock.ended) == 2
    watch.rests()
    clock.seconds += 1000
    watch.looks()
    assert len(clock.ended) == 2


def test_a_disk_that_hangs_does_not_hold_the_end(tmp_path, monkeypatch):
    """Stacks that can't be written, as nobody reads the pipe in their place, are said not to be."""
    monkeypatch.setattr("kdjax.runtime.watchdog.SECONDS_TO_DUMP", 0.05)
    pipe = tmp_path / "stacks_0.txt"
    os.mkfifo(pipe)
    assert _dump(pipe, "step 5") == "not written within 0.05 s"
    pipe.open("rb").close()  # lets the thread go


def test_the_thread_dumps_and_counts_real_compilations(tmp_path, monkeypatch, capfd):
    """A stall is said on the terminal, with all stacks in the folder; one while a program is
    compiled is not."""
    monkeypatch.setattr("kdjax.runtime.watchdog.LEAST_SECONDS", 0.0)
    monkeypatch.setattr("kdjax.runtime.watchdog.ENOUGH", 1)
    reports = []

    def stall(step: int, seconds: float, compiled) -> None:
        watch.begins(step)
        compiled()
        over.wait(seconds)
        watch.done()
        reports.append((tmp_path / "stacks_0.txt").exists())

    import threading

    over = threading.Event()
    with watchdog(tmp_path, None, every_seconds=0.02) as watch:
        stall(1, 0.01, lambda: None)
        stall(2, 0.5, lambda: jax.jit(lambda x: x + 1)(jnp.ones(3)))
        stall(3, 0.5, lambda: None)
    assert reports == [False, False, True]
    dumped = (tmp_path / "stacks_0.txt").read_text()
    assert dumped.count("in stall") == 1
    assert "step 3 takes over" in dumped
    assert "step 3 takes over" in capfd.readouterr().err


HANGS = """
import sys, time
from pathlib import Path
from kdjax.runtime.watchdog import watchdog

def wait_for_a_peer():
    time.sleep(60)

with watchdog(Path(sys.argv[1]), 0.3, every_seconds=0.05) as watch:
    watch.begins(5)
    wait_for_a_peer()
"""


def test_a_hang_ends_with_its_own_exit_code(tmp_path):
    """A real process that hangs in Python: code 124, one line, and where it hung."""
    command = [sys.executable, "-c", HANGS, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == EXIT_CODE == 124
    assert ended.stderr.count("\n") == 1
    assert ended.stderr.startswith("kdjax: step 5 takes longer than faults.step_limit_seconds 0.3")
    assert "in wait_for_a_peer" in (tmp_path / "stacks_0.txt").read_text()
