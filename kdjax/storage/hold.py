"""The hold on a run's folder: one run at a time trains in it.

It is flock's on a file of the folder: the kernel lets go of it however its process ends, so that
nothing that was killed keeps a folder. How far it reaches is the file system's: across hosts on
NFS, whose clients make it a lock of the server, and on Lustre mounted with `flock`; on this host
alone on local disks and where locks are kept local (`nolock`, `localflock`).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from kdjax.errors import BusyError, KdjaxError, StorageError
from kdjax.runtime import processes
from kdjax.runtime.console import announce

LOCK = "lock"
"""The file that is locked; it says who holds the folder, and is empty when nobody does."""


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold a folder, which is made where there is none, for the `with` block, by the first process
    of a run. One that was made and got nothing in it is removed again.

    Errors, in every process: BusyError naming who holds it, StorageError.
    """
    with contextlib.ExitStack() as ends:
        refused = processes.from_first(lambda: _refusal(lambda: _take(folder, ends)))
        if refused is not None:
            raise {BusyError.exit_code: BusyError}.get(refused[0], StorageError)(refused[1])
        yield


def _refusal(act: Callable[[], None]) -> tuple[int, str] | None:
    try:
        act()
    except KdjaxError as error:
        return error.exit_code, str(error)
    return None


def _take(folder: Path, ends: contextlib.ExitStack) -> None:
    try:
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        file = _locked(folder)
        ends.callback(_let_go, file, folder if made else None)
        _tell(folder, os.read(file, 1000))
        own = {"process": os.getpid(), "host": socket.gethostname(), "since": _now()}
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(own).encode(), 0)
        os.fsync(file)  # for readers on other hosts
    except OSError as error:
        raise StorageError(
            f"can't write the run folder {folder}: {error}; choose another --run"
        ) from error


def _locked(folder: Path) -> int:
    """The file LOCK of a folder, open and locked. Errors: BusyError, OSError."""
    while True:
        file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(os.read(file, 1000))
            os.close(file)
            raise BusyError(
                f"{holder or 'another process'} trains in {folder}: wait for it to end, or choose"
                " another --run; nothing was touched"
            ) from None
        except OSError as error:
            announce(
                f"{folder}: this file system has no locks ({error.strerror}), so nothing keeps a"
                " second run out of it: see to it that this is the only one"
            )
        if _is_there(folder / LOCK, file):
            return file
        os.close(file)  # removed before it was locked


def _is_there(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file))
    except FileNotFoundError:
        return False


def _tell(folder: Path, left: bytes) -> None:
    """Say it where the one before did not end, and this host can't know that it is gone."""
    holder = _holder(left)
    if holder is not None and f" on {socket.gethostname()} " not in holder:
        announce(
            f"{folder}: {holder} trained here last and did not end of itself. No lock of it is seen"
            " from here: if it can still be running, on a file system whose locks don't reach other"
            " hosts, stop it first"
        )


def _holder(text: bytes) -> str | None:
    """Who wrote this into LOCK, in words; None where nobody did."""
    try:
        found = json.loads(text)
        words = f"process {found['process']} on {found['host']} (since {found['since']})"
        return words if words.isprintable() else None
    except (ValueError, TypeError, KeyError):
        return None


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())


def _let_go(file: int, made: Path | None) -> None:
    """Empty LOCK and close it; a folder that was made, and got nothing else, is removed first."""
    with contextlib.suppress(OSError):
        os.ftruncate(file, 0)
        if made is not None and os.listdir(made) == [LOCK]:
            (made / LOCK).unlink()
            made.rmdir()
    with contextlib.suppress(OSError):
        os.close(file)
