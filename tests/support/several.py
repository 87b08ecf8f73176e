"""Start the processes of one run on this machine, for the tests of several of them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from kdjax.config import Config
from kdjax.config.as_json import as_dict

ROOT = Path(__file__).parents[2]


def begin(arguments: Sequence[str], count: int, devices: int) -> list[subprocess.Popen]:
    """`python ARGUMENTS` with the flags of `count` processes of so many CPU devices each."""
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(ROOT)}
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, *arguments, *flags_of(n, count, port)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in range(count)
    ]


def flags_of(process: int, count: int, port: int) -> list[str]:
    """What tells a process which of `count` it is; one alone is told nothing."""
    if count == 1:
        return []
    address = f"127.0.0.1:{port}"
    return [
        "--coordinator", address, "--processes", str(count), "--process", str(process)
    ]  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def finish(started: Sequence[subprocess.Popen], seconds: float = 600) -> list[tuple[int, str, str]]:
    """(exit code, what it printed, and on standard error) of each; none is left behind."""
    try:
        said = [process.communicate(timeout=seconds) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(p.returncode, out, err) for p, (out, err) in zip(started, said, strict=True)]


def train_by(config: Config, count: int, devices: int, restore: Sequence[Path] = ()) -> list[dict]:
    """What each process says of a training by `count` of them (see `main`)."""
    asked = json.dumps({"config": as_dict(config), "restore": [str(run) for run in restore]})
    ended = finish(begin([__file__, asked], count, devices))
    for code, _, err in ended:
        assert code == 0, err[-3000:]
    return [json.loads(out.splitlines()[-1]) for _, out, _ in ended]


def main(asked: str, flags: list[str]) -> None:
    """Of one process: restore the newest checkpoints of other runs, train, and print what they and
    the trained parameters are, and which problems were drawn here."""
    import jax

    from kdjax.config.as_json import from_dict
    from kdjax.config.overrides import join_processes
    from kdjax.runtime import processes
    from kdjax.storage.checkpoints import open_checkpoints
    from kdjax.storage.fingerprint import fingerprint
    from kdjax.training import feed
    from kdjax.training.loop import train
    from kdjax.training.parts.build import build

    join_processes("train", flags)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    given = json.loads(asked)
    config = from_dict(given["config"])
    found, parts = [], build(config)
    for run in given["restore"]:
        checkpoints = open_checkpoints(Path(run) / "checkpoints")
        state = checkpoints.restore(checkpoints.steps()[-1], parts.programs.student.state)
        found.append(fingerprint(state.params))
        checkpoints.close()
    drawn, own_batch_at = [], feed.own_batch_at

    def seen(parts, number, redraw=0):
        tag, rows = own_batch_at(parts, number, redraw)
        if not redraw:
            drawn.append((number, rows))
        return tag, rows

    feed.own_batch_at = seen
    report = train(config)
    said = {"restored": found, "drawn": drawn, "avg": report.avg.mean, "tokens": report.tokens}
    print(json.dumps(said | {"process": jax.process_index(), "devices": jax.device_count()}))
    processes.end()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
