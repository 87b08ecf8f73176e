"""A real Slurm of one node for a test (one_node_slurm.sh): jobs are submitted and watched."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
PATH = f"{os.environ['PATH']}:/usr/sbin"
HAS_SLURM = os.geteuid() == 0 and all(
    shutil.which(daemon, path=PATH) for daemon in ("munged", "slurmctld", "slurmd", "sbatch")
)
CAN_INSTALL = os.geteuid() == 0 and shutil.which("apt-get") is not None
NO_SLURM = "LEFT OUT: launch/slurm.sh on a real Slurm (as root, with slurm-wlm and munge installed)"


@contextmanager
def one_node(folder: Path) -> Iterator[dict[str, str]]:
    """The environment in which Slurm's commands find a Slurm that runs in `folder`."""
    script = ROOT / "tests" / "support" / "one_node_slurm.sh"
    ports = [str(free_port()) for _ in range(2)]
    subprocess.run([script, "start", folder, *ports], check=True)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    environment["SLURM_CONF"] = str(folder / "slurm.conf")
    try:
        yield environment
    finally:
        subprocess.run(["scancel", "--user=root"], env=environment, check=False)
        subprocess.run([script, "stop", folder], check=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def said(environment: dict[str, str], *command: str | Path) -> str:
    """What a command of Slurm's prints."""
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def job(environment: dict[str, str], number: str) -> dict[str, str]:
    """The fields of a job, as `JobState`, `ExitCode` and `Restarts`."""
    line = said(environment, "scontrol", "--oneliner", "show", "job", number)
    return dict(field.split("=", 1) for field in line.split() if "=" in field)


def until(true: Callable[[], object], seconds: float) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.1)
