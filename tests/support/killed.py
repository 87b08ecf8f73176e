"""Runs `kdjax` commands in children that are killed: at a named point, or after a time.

As a program it is a server that has imported everything and started no device: it forks a child for
each command, so that only a run's own work is paid for again and again. `Server` is its other end.
Several processes of one run are several servers, each with the flags of its process in `args`.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from typing import NamedTuple

HEARTBEAT_SECONDS, WAIT_SECONDS = 6, 20
"""Of the processes of one run: shorter than a user's, so that a survivor ends sooner."""

FUNCTIONS = {
    "measurement": "kdjax.training.loop.mean_entropy",  # the held-out responses are drawn
    "rollout": "kdjax.training.feed.trim",  # the responses are drawn, nothing was trained on them
    "rewards": "kdjax.grading.rewards.reward_all",
    "step": "kdjax.training.loop.record_of",  # the update is on its way on the device
    "test": "kdjax.training.evaluation.progress",
    "evaluation": "kdjax.training.evaluation.evaluate",
    "loop": "kdjax.training.loop._loop",
}
"""Points of a run, each by a function that is called there."""
A_STEP = r"/checkpoints/(\w+/)?\d+(/|$)"
FILES = {
    "save": (("os.rename",), r"/checkpoints/[^/]*tmp"),
    "retention": (("os.rename", "os.remove", "os.rmdir", "shutil.rmtree"), A_STEP),
    "cache": (("os.rename",), r"/cache/"),
}
"""Points of a run, each by what is done there to which file: audit events, and the path."""


class Kill(NamedTuple):
    """Kill a process of a run at its call-th time at a point, `after_seconds` later."""

    point: str
    call: int = 1
    after_seconds: float = 0.0
    process: int = 0


class Server:
    """A process that runs commands in children, one at a time; `with` ends it."""

    def __init__(self, hash_seed: int, **environment: str):
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONHASHSEED": str(hash_seed)} | environment,
        )

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_) -> None:
        self._process.stdin.close()
        self._process.wait()

    def begin(self, args: list[str], log: Path, kill: Kill | None = None, seed: int = 0) -> None:
        """Run `kdjax ARGS` in a child; its output goes to `log`."""
        job = {"args": args, "log": str(log), "kill": kill, "seed": seed}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()

    def end(self) -> int:
        """Wait for the child: its exit code, or less the signal that ended it."""
        return int(self._process.stdout.readline())

    def run(self, args: list[str], log: Path, kill: Kill | None = None, seed: int = 0) -> int:
        self.begin(args, log, kill, seed)
        return self.end()


IMPORTED = (
    "kdjax.study", "kdjax.__main__", "orbax.checkpoint", "tensorboardX", "jinja2",
    "matplotlib.figure", "matplotlib.backends.backend_svg",
)  # fmt: skip


def _serve() -> None:
    for name in IMPORTED:
        importlib.import_module(name)
    from transformers import AutoTokenizer  # noqa: F401  loads what it needs at its first use

    assert threading.active_count() == 1, "a fork takes no threads with it"
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _child(**json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _child(args: list[str], log: str, kill: list | None, seed: int) -> None:
    """Run the command with other global seeds, and never return."""
    code = 70
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number in (1, 2):
            os.dup2(output, number)
        import numpy as np

        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002  whoever draws from it must not matter
        if kill is not None:
            _arm(Kill(*kill))
        from kdjax.__main__ import main
        from kdjax.runtime import processes

        processes.HEARTBEAT_SECONDS = HEARTBEAT_SECONDS
        processes.start = functools.partial(processes.start, wait_seconds=WAIT_SECONDS)
        code = main(args)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _arm(kill: Kill) -> None:
    reached = 0

    def reach() -> None:
        nonlocal reached
        reached += 1
        if reached == kill.call and kill.after_seconds:
            threading.Timer(kill.after_seconds, die).start()
        elif reached == kill.call:
            die()

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if kill.point == "start":
        reach()
    elif kill.point in FUNCTIONS:
        place, _, name = FUNCTIONS[kill.point].rpartition(".")
        module = importlib.import_module(place)
        function = getattr(module, name)

        def reaching(*given, **named):
            reach()
            return function(*given, **named)

        setattr(module, name, reaching)
    else:
        events, path = FILES[kill.point]

        def hook(event: str, given: tuple) -> None:
            if event in events and re.search(path, str(given[0])):
                reach()

        sys.addaudithook(hook)


if __name__ == "__main__":
    _serve()
