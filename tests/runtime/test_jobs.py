"""Several commands at once: all run, failures are told apart, an interrupt ends them."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from kdjax.errors import ConfigError
from kdjax.runtime import jobs


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_all_run_and_failures_are_named(tmp_path):
    """Five commands in two places: each runs once, in the environment of its place, with its output
    in its log; those that fail give their exit code and last line."""
    commands = {
        f"a/{n}": python(f"import os; print(os.environ['PLACE']); exit({n} if {n} > 2 else 0)")
        for n in range(5)
    }
    commands["says"] = python("import sys; print('no'); print('kdjax: the error'); sys.exit(64)")
    failures = jobs.run_commands(commands, [{"PLACE": "first"}, {"PLACE": "second"}], tmp_path)
    assert {name: f.exit_code for name, f in failures.items()} == {"a/3": 3, "a/4": 4, "says": 64}
    assert failures["says"].message == "the error"
    assert failures["a/3"].message in ("first", "second")
    places = {(tmp_path / f"a {n}.txt").read_text().strip() for n in range(5)}
    assert places == {"first", "second"}


def test_they_run_at_once(tmp_path):
    """Two that wait for one another end only if both are started."""
    wait = (
        "import pathlib, time; pathlib.Path('{0}').touch()\n"
        "while not pathlib.Path('{1}').exists(): time.sleep(0.01)"
    )
    a, b = tmp_path / "a", tmp_path / "b"
    commands = {"a": python(wait.format(a, b)), "b": python(wait.format(b, a))}
    assert jobs.run_commands(commands, [{}, {}], tmp_path / "logs") == {}


@pytest.mark.parametrize("obeys", [True, False])
def test_an_interrupt_ends_them(tmp_path, monkeypatch, obeys):
    """Ctrl-C reaches a command as a SIGTERM; one that does not obey is killed."""
    started, begun = [], jobs.subprocess.Popen

    def remember(*args, **settings):
        started.append(begun(*args, **settings))
        return started[-1]

    def interrupt(seconds):
        if (tmp_path / "up").exists():
            raise KeyboardInterrupt
        time.sleep(0.01)

    monkeypatch.setattr(jobs, "SECONDS_TO_END", 0.5)
    monkeypatch.setattr(jobs.subprocess, "Popen", remember)
    ignore = "" if obeys else "signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    sleeper = python(
        f"import pathlib, signal, time; {ignore} pathlib.Path({str(tmp_path / 'up')!r}).touch();"
        " time.sleep(60)"
    )
    monkeypatch.setattr(
        jobs, "time", type("Clock", (), {"sleep": interrupt, "monotonic": time.monotonic})
    )
    with pytest.raises(KeyboardInterrupt):
        jobs.run_commands({"a": sleeper, "b": sleeper}, [{}], tmp_path / "logs")
    assert [process.returncode for process in started] == [-15 if obeys else -9]


@pytest.mark.parametrize(
    ("devices", "visible", "count", "expected"),
    [
        ("cpu 8", None, 3, [{}, {}, {}]),
        ("gpu 4", None, 2, ["0,2", "1,3"]),
        ("gpu 3", "4,6,7", 2, ["4,7", "6"]),
        ("gpu 2", None, 3, "--jobs 3 is over the 2 GPUs"),
        ("tpu 4", None, 2, "--jobs is for CPUs and GPUs, not for tpus"),
        ("cpu 8", None, 0, "--jobs must be at least 1, got 0"),
    ],
)
def test_devices_are_dealt(monkeypatch, devices, visible, count, expected):
    """Processes on CPUs, disjoint shares of the visible GPUs, one clear line for anything else."""
    told = subprocess.CompletedProcess([], 0, devices + "\n", "")
    monkeypatch.setattr(jobs.subprocess, "run", lambda *_, **__: told)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if isinstance(expected, str):
        with pytest.raises(ConfigError, match=expected):
            jobs.slots(count)
        return
    own = [{"CUDA_VISIBLE_DEVICES": x} if isinstance(x, str) else x for x in expected]
    assert jobs.slots(count) == own


def test_this_machine_s_devices():
    """The probe runs: forced CPU devices are seen by the process that counts them."""
    assert jobs.slots(2) == [{}, {}]
