"""Several processes of one run: which one this is, its share of the work, what all must know.

The engine is JAX's own multi-controller runtime: every process runs the same program on its own
devices, and all call the functions here in the same order. In a run of one process each of them is
the plain thing that its name says.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np

from kdjax.errors import ConfigError, RendezvousError
from kdjax.runtime.output import say

HEARTBEAT_SECONDS = 30
"""So long after a process was last heard of the others stop."""

T = TypeVar("T")


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    wait_seconds: int = 300,
) -> None:
    """Join the processes of this run, before JAX is asked for a device; without arguments they are
    found as JAX finds them (Slurm, Cloud TPU, GKE). Where not all have come within wait_seconds
    this process ends, with RendezvousError's line and exit code.

    Errors: ConfigError where nothing says who they are, RendezvousError where they can't be joined.
    """
    where = f" at {coordinator}" if coordinator else ""
    if coordinator and process == 0:
        _check_address(coordinator)
    say(f"waiting for all processes of this run{where}, for up to {wait_seconds} s")
    late = threading.Timer(wait_seconds, _end_as_late, (where, wait_seconds))
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            initialization_timeout=wait_seconds + 60,  # it would end this process with a dump
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            coordinator_bind_address=coordinator,  # not on every network of the machine
        )
    except ValueError as error:
        raise ConfigError(
            f"JAX found no other processes ({str(error).splitlines()[0]}); outside Slurm, Cloud TPU"
            " and GKE give --coordinator HOST:PORT --processes N --process I"
        ) from error
    except RuntimeError as error:
        raise RendezvousError(
            f"the processes of this run could not be joined{where} ({str(error).splitlines()[0]})"
        ) from error
    finally:
        late.cancel()


def _check_address(address: str) -> None:
    """That this process can listen there; where it can't, JAX's service ends it without a word."""
    host, _, port = address.rpartition(":")
    try:
        family, *_, place = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        socket.create_server(place[:2], family=family).close()
    except OSError as error:
        raise RendezvousError(
            f"process 0 can't listen at {address} ({error}); --coordinator is an address of its"
            " machine with a free port"
        ) from error


def _end_as_late(where: str, seconds: float) -> None:
    error = RendezvousError(
        f"not all processes of this run have come{where} within {seconds} s; start all of them,"
        " with a coordinator address that every one can reach"
    )
    say(str(error))
    os._exit(error.exit_code)  # the thread that waits is in JAX, and can't be told


def end() -> None:
    """Leave when all processes have come to their end."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


def abandon(exit_code: int) -> None:
    """Leave at once where this run has several processes: JAX then stops the others, and says in
    each of them which it lost."""
    if not jax.distributed.is_initialized():
        return
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0:  # the others may be about to fail of the same: let them say it
        time.sleep(2)
    os._exit(exit_code)


def is_first() -> bool:
    """Whether this process writes what is written once. No device is asked for."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def share(total: int) -> np.ndarray:
    """This process's places of 0 .. total - 1: a block, in the order of processes, without gap or
    overlap; the sizes of two differ by at most one.

    >>> share(3)
    array([0, 1, 2])
    """
    return np.array_split(np.arange(total), jax.process_count())[jax.process_index()]


def gather(value: T) -> list[T]:
    """The JSON value of every process, in their order, known to all.

    >>> gather({"loss": 0.5})
    [{'loss': 0.5}]
    """
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    return [json.loads(own.tobytes()) for own in _all_arrays(text)]


def from_first(make: Callable[[], T]) -> T:
    """What process 0 makes, a JSON value, known to all; the others make nothing.

    >>> from_first(lambda: 42)
    42
    """
    return gather(make() if is_first() else None)[0]  # type: ignore[return-value]


def by_first(act: Callable[[], None]) -> None:
    """Do it in the first process, while the others wait."""
    try:
        if is_first():
            act()
    finally:
        gather(None)


def draw_apart(draw: Callable[[np.ndarray], Any], total: int) -> Any:
    """Host arrays of `total` rows: every process draws its share (draw(places) -> their rows, which
    no other place decides), and all know all of them.

    >>> draw_apart(lambda places: 10 * places, 3)
    array([ 0, 10, 20])
    """
    if jax.process_count() == 1:
        return draw(np.arange(total))
    own = share(total)
    drawn = draw(own if len(own) else np.arange(1))  # a sampler of nothing is none
    return gather_rows(jax.tree.map(lambda x: np.asarray(x)[: len(own)], drawn))


def gather_rows(tree: Any) -> Any:
    """Host arrays whose rows are this process's (`share`) -> the rows of all processes, in order.

    >>> gather_rows(np.arange(2))
    array([0, 1])
    """
    if jax.process_count() == 1:
        return tree
    return jax.tree.map(lambda x: np.concatenate(_all_arrays(np.asarray(x))), tree)


def _all_arrays(own: np.ndarray) -> list[np.ndarray]:
    """Every process's array; they may differ in their number of rows, and in nothing else."""
    from jax.experimental.multihost_utils import process_allgather

    rows = process_allgather(np.int32(len(own)))
    most = 1 << int(rows.max() - 1).bit_length() if rows.max() else 1  # few sizes, few programs
    padded = np.zeros((most, *own.shape[1:]), own.dtype)
    padded[: len(own)] = own
    return [array[:count] for array, count in zip(process_allgather(padded), rows, strict=True)]


LOST = "gloo|nccl|connection (reset|closed)|coordination service|heartbeat|unavailable"
"""What JAX's errors of several kinds say where a collective has lost a process."""


def is_lost(error: BaseException) -> bool:
    """Whether an error means that another process is gone. JAX's service says which as soon as it
    has not heard of it for HEARTBEAT_SECONDS, and ends this process; that is waited for."""
    if not jax.distributed.is_initialized() or not re.search(LOST, str(error), re.IGNORECASE):
        return False
    say(
        "another process of this run is gone, or failed; which one is said within"
        f" {HEARTBEAT_SECONDS} s. The same command resumes from the last checkpoint"
    )
    time.sleep(HEARTBEAT_SECONDS + 10)
    return True
