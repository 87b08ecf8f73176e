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

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_elsewhere_a_stop_is_at_once_and_through_finally(capfd, number):
    """Exit code 85 by an exception that `except Exception` does not hold, and a second one does not
    end what is ending."""
    cleaned = []

    def command():
        with stop_at_once():
            try:
                try:
                    signal.raise_signal(number)
                except Exception:
                    pytest.fail("taken for a fault")
            finally:
                signal.raise_signal(signal.SIGTERM)
                cleaned.append(True)

    with pytest.raises(SystemExit) as caught:
        command()
    assert caught.value.code == 85
    assert cleaned
    assert f"stopped by {number.name}; the same command" in capfd.readouterr().err


def test_the_last_save_is_waited_for(capfd):
    """Whoever asks again while a stopped loop saves does not end the save."""

    def command():
        with stop_at_once():
            try:
                with stop_between_steps() as asked:
                    signal.raise_signal(signal.SIGTERM)
                    assert asked(1)
                    raise PreemptedError("saving")
            finally:
                signal.raise_signal(signal.SIGTERM)
                signal.raise_signal(signal.SIGHUP)
                saved.append(True)

    saved = []
    with pytest.raises(PreemptedError, match="saving"):
        command()
    assert saved


def test_nohup_is_respected():
    """A SIGHUP that was ignored before stays ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_at_once(), stop_between_steps() as asked:
            signal.raise_signal(signal.SIGHUP)
            assert not asked(1)
    finally:
        signal.signal(signal.SIGHUP, before)


BUSY = """
import contextlib, ctypes, os, sys, threading, time
from kdjax.runtime import signals
signals.SECONDS_TO_OBEY = 0.05
numbers, loop = [int(n) for n in sys.argv[2:]], sys.argv[1] == "loop"
waits = ctypes.CDLL(None)
def send():
    for number in numbers:
        time.sleep(0.3)  # the main thread is in the call by then
        os.kill(os.getpid(), number)
with signals.stop_at_once():
    with signals.stop_between_steps() if loop else contextlib.nullcontext():
        threading.Thread(target=send, daemon=True).start()
        lock = ctypes.create_string_buffer(64)
        waits.pthread_mutex_lock(lock)
        waits.pthread_mutex_lock(lock)  # as a call of XLA: not Python's, and not interrupted
"""


@pytest.mark.parametrize(
    ("place", "numbers", "code", "says"),
    [
        ("elsewhere", [signal.SIGTERM], 85, "stopped by SIGTERM; the same command goes on"),
        ("elsewhere", [signal.SIGHUP], 85, "stopped by SIGHUP; the same command goes on"),
        ("elsewhere", [signal.SIGINT], 130, "interrupted; the same command resumes"),
        ("loop", [signal.SIGTERM, signal.SIGINT, signal.SIGINT], 130, "interrupted; the same"),
    ],
)
def test_a_call_that_does_not_return_is_ended(place, numbers, code, says):
    """The main thread waits in C for ever, where no handler of Python's runs."""
    sent = [str(int(number)) for number in numbers]
    command = [sys.executable, "-c", BUSY, place, *sent]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert ended.returncode == code, ended.stderr
    assert ended.stderr.startswith(f"kdjax: {says}")
    assert ended.stderr.count("\n") == 1


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


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 85), (signal.SIGINT, 130)])
def test_what_still_runs_is_not_waited_for(number, code):
    """Told to stop at once, a process does not wait a minute for what it computes at its exit."""
    program = f"""
import atexit, os, signal, time
from kdjax.runtime import signals
signals.SECONDS_TO_OBEY = 0.2
signal.signal(signal.SIGINT, signal.default_int_handler)
atexit.register(time.sleep, 45)
try:
    with signals.stop_at_once():
        os.kill(os.getpid(), {int(number)})
        time.sleep(45)
except BaseException:
    signals.end_in_time({code})
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=40
    )
    assert ended.returncode == code, ended.stderr
    assert "did not end" not in ended.stderr


def test_what_does_not_end_is_left():
    """A thread that Python would wait for, and one more thing at its exit."""
    code = """
import atexit, threading, time
from kdjax.runtime import signals
signals.SECONDS_TO_EXIT = 0.2
atexit.register(time.sleep, 60)
threading.Thread(target=time.sleep, args=(60,)).start()
signals.end_in_time(86)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert ended.returncode == 86
    assert ended.stderr == "kdjax: something did not end within 0.2 s, and is left\n"


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
import pathlib, os, time
from kdjax.runtime.jobs import end_with_parent
from kdjax.runtime.signals import stop_at_once
place = pathlib.Path(PLACE)
end_with_parent()
with stop_at_once():
    (place / f"began{os.getpid()}").touch()
    try:
        time.sleep(60)
    finally:
        (place / f"saved{os.getpid()}").touch()
"""


def wait_for(condition, seconds: float = 100.0):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "it did not happen"
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_the_end_of_a_study_is_that_of_its_runs(tmp_path, number):
    """The parent of several processes leaves none of them behind, whatever ends it."""
    sleeper = SLEEPER.replace("PLACE", repr(str(tmp_path)))
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path / "logs"), sleeper])
    wait_for(lambda: len(list(tmp_path.glob("began*"))) == 2)
    parent.send_signal(number)
    assert parent.wait(60) == (-9 if number == signal.SIGKILL else 85)
    wait_for(lambda: len(list(tmp_path.glob("saved*"))) == 2)


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
