"""The checkpoints of a run that trains: saved as it goes, restored from the newest intact one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax

from kdjax.base import TrainState
from kdjax.errors import DataError, StorageError
from kdjax.runtime import processes
from kdjax.runtime.console import announce
from kdjax.storage.orbax import Writer, open_writer, remove_partial
from kdjax.storage.restore import (
    About,
    DamagedError,
    about_of,
    items_of,
    measured,
    read_about,
    read_state,
    reason,
    saved_steps,
)
from kdjax.storage.retention import Tests, kept

QUARANTINE = "quarantine"
"""The folder beside the steps that damaged ones are moved to; nothing deletes them there."""


class Checkpoints:
    """The checkpoints of a run that trains; every process makes the same calls.

    Of each read, what is asked is answered when the save that is under way has ended. A save that
    fails is told at the next call, or at close, and stops the run or does not (failed_save).
    """

    def __init__(
        self, folder: Path, keep: Callable[[list[int], Tests], set[int]], failed_save: str
    ):
        self._folder, self._keep, self._failed_save = folder, keep, failed_save
        self._writer: Writer | None = None
        self._written: os.stat_result | None = None  # the folder that the writer was opened in
        self._pending: int | None = None  # the step that is being written
        self._tests: Tests = {}

    def steps(self) -> list[int]:
        """The steps that are saved and committed, ascending."""
        self._wait()
        return saved_steps(self._folder)

    def save(self, step: int, state: TrainState, about: About) -> None:
        """Begin to save a step. about is JSON-able (cursor, config, identities), its "tests" are
        what was measured at this step, by name."""
        self._wait()
        beside = about_of(step, state, about)
        try:
            _require(lambda: not self._is_gone(), "the folder is gone")
            if self._writer is None:
                self._tests.update(measured(self._folder))
                self._written = self._folder.stat() if processes.is_first() else None
                self._writer = open_writer(
                    self._folder, lambda steps: self._keep(steps, self._tests)
                )
            self._tests[step] = about.get("tests", {})
            self._writer.save(step, items_of(state), {"about": beside})
            self._pending = step
        except Exception as error:  # Orbax and TensorStore raise kinds of their own
            self._failed(step, error)

    def read_about(self, step: int) -> About:
        """As `restore.read_about`."""
        self._wait()
        return read_about(self._folder, step)

    def restore(self, step: int, like: TrainState) -> TrainState:
        """As `restore.read_state`."""
        self._wait()
        return read_state(self._folder, step, like)

    def newest(
        self, like: TrainState, accept: Callable[[About], None]
    ) -> tuple[TrainState, About] | None:
        """(state, about) of the newest intact step, or None where no step is saved. Damaged ones
        are named and moved into QUARANTINE; accept(about) may refuse."""
        self._wait()
        return _newest(self._folder, like, accept)

    def close(self) -> None:
        """Wait for what is being written."""
        self._wait()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _wait(self) -> None:
        if self._writer is None or self._pending is None:
            return
        step, self._pending = self._pending, None
        try:
            self._writer.wait()
            _require(lambda: step in saved_steps(self._folder), "the folder is gone")
        except Exception as error:
            self._failed(step, error)

    def _failed(self, step: int, error: Exception) -> None:
        """Say it, by policy as an error. The writer would tell of it again: it is left behind."""
        folder = self._folder
        if self._writer is not None:
            with contextlib.suppress(Exception):
                self._writer.close()
        gone = processes.from_first(self._is_gone)
        processes.by_first(lambda: remove_partial(folder, step, folder_too=gone))
        self._writer, good = None, saved_steps(folder)
        left = f"the last good one is {good[-1]}" if good else "there is no other"
        why = "the folder is gone" if gone else reason(error)
        told = f"step {step} was not saved to {folder} ({why}); {left}"
        if self._failed_save == "stop":
            raise StorageError(
                f"{told}. The same command goes on from there; with checkpoints.failed_save go_on"
                " training would not have stopped"
            ) from error
        announce(f"{told}. Training goes on, as checkpoints.failed_save says")

    def _is_gone(self) -> bool:
        """Whether the folder was deleted, also where Orbax, which went on, has made it anew (a disk
        that is mounted again has its steps)."""
        try:
            now = self._folder.stat()
        except OSError:
            return True
        same = self._written is None or os.path.samestat(now, self._written)
        return not same and not saved_steps(self._folder)


def open_checkpoints(
    folder: Path,
    *,
    last: int = 2,
    every_steps: int = 0,
    best: str | None = None,
    failed_save: Literal["stop", "go_on"] = "stop",
) -> Checkpoints:
    """Checkpoints in `folder`.

    Args:
        folder: made where it is not there.
        last, every_steps, best: which stay (`kdjax.storage.retention.kept`).
        failed_save: what follows a save that fails: stop, or go on.

    Errors: StorageError where a save fails and failed_save is stop, DataError (`read_state`).
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"can't write checkpoints to {folder}: {error}") from error

    def keep(steps: list[int], tests: Tests) -> set[int]:
        return kept(steps, tests, last=last, every_steps=every_steps, best=best)

    return Checkpoints(folder, keep, failed_save)


def _require(holds: Callable[[], bool], problem: str) -> None:
    """An OSError in every process where this does not hold in the first."""
    if any(processes.gather(jax.process_index() == 0 and not holds())):
        raise OSError(problem)


def _newest(
    folder: Path, like: TrainState, accept: Callable[[About], None]
) -> tuple[TrainState, About] | None:
    steps = processes.from_first(lambda: saved_steps(folder))
    aside = processes.from_first(lambda: saved_steps(folder / QUARANTINE))
    for step in reversed(steps):
        try:
            about = read_about(folder, step)
            accept(about)
            return read_state(folder, step, like), about
        except DamagedError as error:
            place = _quarantine(folder, step)
            announce(f"{error}; it is kept in {place}, and the one before it is tried")
    if steps or aside:
        raise DataError(
            f"{folder} holds no intact checkpoint: {sorted({*steps, *aside})} are in"
            f" {folder / QUARANTINE}. Train under another --run, or delete them to begin anew"
        )
    return None


def _quarantine(folder: Path, step: int) -> Path:
    """Move a damaged step aside, so that the step can be saved again."""
    place = folder / QUARANTINE / str(step)
    while place.exists():
        place = place.with_name(f"{place.name}.again")

    def move() -> None:
        try:
            place.parent.mkdir(exist_ok=True)
            (folder / str(step)).rename(place)
        except OSError as error:
            raise StorageError(f"can't move the damaged {folder}/{step} aside: {error}") from error

    processes.by_first(move)
    return place
