"""Signals: the step is finished and saved, the second interrupt is at once, all processes agree."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from kdjax.errors import PreemptedError
from kdjax.runtime.signals import stop_at_once, stop_between_steps

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def handlers_are_given_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize("number", SIGNALS)
def test_a_loop_is_told_after_the_step(number):
    """Nothing is raised in the step; where nobody asks any more, the end of the loop says it."""

    def loop():
        with stop_between_steps() as asked:
            assert not asked(1)
            signal.raise_signal(number)
            assert asked(2)

    with pytest.raises(PreemptedError) as caught:
        loop()
    assert caught.value.exit_code == 85


def test_the_second_interrupt_is_at_once(capfd):
    """Ctrl-C twice; a second SIGTERM adds nothing to the first."""

    def loop():
        with stop_between_steps() as asked:
            for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
                signal.raise_signal(number)
            assert asked(1)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        loop()
    assert "once more stops at once" in capfd.readouterr().err


def test_elsewhere_sigterm_is_at_once_and_through_finally(capfd):
    """Exit code 85 by an exception that `except Exception` does not hold, and a second one does not
    end what is ending."""
    cleaned = []

    def command():
        with stop_at_once():
            try:
                try:
                    signal.raise_signal(signal.SIGTERM)
                except Exception:
                    pytest.fail("taken for a fault")
            finally:
                signal.raise_signal(signal.SIGTERM)
                cleaned.append(True)

    with pytest.raises(SystemExit) as caught:
        command()
    assert caught.value.code == 85
    assert cleaned
    assert "the same command" in capfd.readouterr().err


def test_another_thread_takes_no_signals():
    """Python lets the main thread alone handle signals: training elsewhere still works."""
    told = []

    def train():
        with stop_at_once(), stop_between_steps() as asked:
            told.append(asked(1))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert told == [False]


PARENT = """
import sys
from pathlib import Path
from kdjax.__main__ import main
from kdjax.runtime import jobs
sleep = [sys.executable, "-c", sys.argv[2]]
from kdjax.commands import study
commands = {"a": sleep, "b": sleep}
study.run = lambda args: jobs.run_commands(commands, [{}, {}], Path(sys.argv[1]))
sys.exit(main(["study", "x"]))
"""
SLEEPER = """
import os, pathlib, time
place = pathlib.Path(PLACE)
(place / f"began{os.getpid()}").touch()
try:
    time.sleep(60)
except KeyboardInterrupt:
    (place / f"saved{os.getpid()}").touch()
"""


def wait_for(condition, seconds: float = 100.0):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "it did not happen"
        time.sleep(0.02)


def test_sigterm_to_a_study_reaches_its_runs(tmp_path):
    """The parent of several processes ends with 85, and leaves none of them behind."""
    sleeper = SLEEPER.replace("PLACE", repr(str(tmp_path)))
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path / "logs"), sleeper])
    wait_for(lambda: len(list(tmp_path.glob("began*"))) == 2)
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(60) == 85
    assert len(list(tmp_path.glob("saved*"))) == 2


PROCESS = """
import sys, time
import jax
from kdjax.runtime.signals import stop_at_once, stop_between_steps

address, number = sys.argv[1:]
with stop_at_once():
    jax.distributed.initialize(address, 2, int(number), local_device_ids=[0])
    with stop_between_steps() as asked:
        for step in range(2000):
            if asked(step):
                print("stops at", step, flush=True)
                break
            if step == 3:
                print("runs", flush=True)
            time.sleep(0.02 + 0.01 * int(number))
    jax.distributed.shutdown()
"""


@pytest.mark.release
def test_two_processes_stop_at_the_same_step():
    """One of two is interrupted, which it passes on as SIGTERM: both are told, after one and the
    same step, by JAX's own notice, although a handler of SIGTERM was there before."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    both = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, address, str(index)],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
        )
        for index in range(2)
    ]
    try:
        assert [process.stdout.readline() for process in both] == ["runs\n", "runs\n"]
        both[1].send_signal(signal.SIGINT)
        said = [process.communicate(timeout=100)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    assert said[0] == said[1]
    assert said[0].startswith("stops at ")
    assert [process.returncode for process in both] == [0, 0]
