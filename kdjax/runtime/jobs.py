"""Several commands at once, each with its share of the devices, until all have ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from kdjax.errors import ConfigError, PreemptedError, StorageError
from kdjax.runtime.console import announce
from kdjax.runtime.output import say

PARENT = "KDJAX_PARENT"
"""Names, to a command that `run_commands` starts, the pipe that ends when its parent does."""
SECONDS_TO_END = 30  # what an interrupted command may take to leave by itself
PROBE = "import jax; print(jax.default_backend(), len(jax.local_devices()))"

Slot = Mapping[str, str]
"""Environment variables of the commands that run in one of the places: which devices they see."""


class Failure(NamedTuple):
    """A command that did not end well: its exit code, and the last line that it printed."""

    exit_code: int
    message: str


def slots(jobs: int) -> list[Slot]:
    """Places for `jobs` commands at once: on CPUs as many processes, on GPUs the visible devices
    shared out among them. Errors: ConfigError for more jobs than GPUs, and on other devices."""
    if jobs < 1:
        raise ConfigError(f"--jobs must be at least 1, got {jobs}")
    asked = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, encoding="utf-8", errors="replace"
    )
    if asked.returncode:
        raise ConfigError(f"--jobs {jobs}: JAX finds no devices ({_last_line(asked.stderr)})")
    backend, count = asked.stdout.split()[-2:]
    if backend == "cpu":
        return [{} for _ in range(jobs)]
    if backend != "gpu":
        raise ConfigError(f"--jobs is for CPUs and GPUs, not for {backend}s; leave it out")
    if jobs > int(count):
        raise ConfigError(f"--jobs {jobs} is over the {count} GPUs; a GPU takes one run at a time")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(int(count))))
    return [{"CUDA_VISIBLE_DEVICES": ",".join(visible.split(",")[n::jobs])} for n in range(jobs)]


def run_commands(
    commands: Mapping[str, Sequence[str]], places: Sequence[Slot], logs: Path
) -> dict[str, Failure]:
    """Run every command, as many at once as there are places; those that failed, by name. What
    each prints goes to logs/NAME.txt (/ becomes a space). One that fails does not stop the others;
    an interrupt or a SIGTERM (`signals.stop_at_once`) ends them all, and so does the end of this
    process, whatever it is, where they are `kdjax` commands (`end_with_parent`).
    """
    waiting, free = list(commands), list(places)
    running: dict[str, tuple[subprocess.Popen, Slot]] = {}
    failures = {}
    lives, told = os.pipe()  # nothing is written to it: the kernel closes it with this process
    try:
        while waiting or running:
            while waiting and free:
                name, slot = waiting.pop(0), free.pop(0)
                own = {**slot, PARENT: str(lives)}
                running[name] = _start(commands[name], own, lives, log_of(logs, name)), slot
                announce(f"{name}: started")
            for name in [n for n, (process, _) in running.items() if process.poll() is not None]:
                process, slot = running.pop(name)
                free.append(slot)
                if process.returncode:
                    text = log_of(logs, name).read_text(encoding="utf-8", errors="replace")
                    failures[name] = Failure(process.returncode, _last_line(text))
                left = len(waiting) + len(running)
                announce(f"{name}: {'failed' if name in failures else 'done'}, {left} to go")
            time.sleep(0.1)
    finally:
        _end([process for process, _ in running.values()])
        os.close(lives)
        os.close(told)
    return failures


def log_of(logs: Path, name: str) -> Path:
    """Where a command's output goes."""
    return logs / f"{name.replace('/', ' ')}.txt"


def end_with_parent() -> None:
    """Of a command that `run_commands` started: end as by SIGTERM when its parent has ended, be it
    by SIGKILL; nothing otherwise."""
    pipe = os.environ.pop(PARENT, None)
    if pipe is not None:
        os.set_inheritable(int(pipe), False)
        waits = threading.Thread(
            target=_wait_for_end, args=(int(pipe),), name="parent", daemon=True
        )
        waits.start()


def _wait_for_end(pipe: int) -> None:
    with contextlib.suppress(OSError):
        os.read(pipe, 1)
    say("what started this command is gone: it ends, too")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(SECONDS_TO_END)
    os._exit(PreemptedError.exit_code)


def _start(command: Sequence[str], slot: Slot, pipe: int, log: Path) -> subprocess.Popen:
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        file = log.open("w", encoding="utf-8")
    except OSError as error:
        raise StorageError(f"can't write {log}: {error}") from error
    with file:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONIOENCODING": "utf-8", **slot},
            pass_fds=(pipe,),
            start_new_session=True,  # a terminal's Ctrl-C is ours to pass on, once
        )


def _end(processes: Sequence[subprocess.Popen]) -> None:
    for process in processes:
        process.send_signal(signal.SIGTERM)  # not SIGINT, which jobs of a script ignore
    limit = time.monotonic() + SECONDS_TO_END
    for process in processes:
        try:
            process.wait(max(0.0, limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _last_line(text: str) -> str:
    """Without the program's name; errors are told on the last line."""
    lines = text.strip().splitlines() or ["it said nothing"]
    return lines[-1].removeprefix("kdjax: ")
