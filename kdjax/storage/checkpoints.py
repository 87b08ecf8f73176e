"""The checkpoints of a run that trains: saved as it goes, restored from the newest intact one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

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

T = TypeVar("T")

QUARANTINE = "quarantine"
"""The folder beside the steps that damaged ones are moved to; nothing deletes them there."""


class Checkpoints(NamedTuple):
    """The checkpoints of a run that trains, as functions; every process makes the same calls.

    - steps() -> the steps that are saved and committed, ascending.
    - save(step, state, about): asynchronous; about is JSON-able (cursor, config, identities), its
      "tests" are what was measured at this step, by name. A save that fails is told at the next
      one, or at close, and stops the run or does not (failed_save).
    - read_about(step), restore(step, like): as `read_about` and `read_state`.
    - newest(like, accept) -> (state, about) of the newest intact step, or None where no step is
      saved. Damaged ones are named and moved into QUARANTINE; accept(about) may refuse.
    - close(): wait for what is being written.
    """

    steps: Callable[[], list[int]]
    save: Callable[[int, TrainState, About], None]
    read_about: Callable[[int], About]
    restore: Callable[[int, TrainState], TrainState]
    newest: Callable[[TrainState, Callable[[About], None]], tuple[TrainState, About] | None]
    close: Callable[[], None]


def open_checkpoints(
    folder: Path,
    *,
    last: int = 2,
    every_steps: int = 0,
    best: str | None = None,
    failed_save: Literal["stop", "go_on"] = "stop",
) -> Checkpoints:
    """Checkpoints in `folder`; which ones stay says `kdjax.storage.retention.kept`.

    Errors: StorageError where a save fails and failed_save is stop, DataError (`read_state`).
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"can't write checkpoints to {folder}: {error}") from error
    writer: Writer | None = None
    pending: int | None = None  # the step that is being written
    tests: Tests = {}

    def keep(steps: list[int]) -> set[int]:
        return kept(steps, tests, last=last, every_steps=every_steps, best=best)

    def save(step: int, state: TrainState, about: About) -> None:
        nonlocal writer, pending
        wait()
        beside = about_of(step, state, about)
        try:
            _require(folder.is_dir, "the folder is gone")
            if writer is None:
                tests.update(measured(folder))
                writer = open_writer(folder, keep)
            tests[step] = about.get("tests", {})
            writer.save(step, items_of(state), {"about": beside})
            pending = step
        except Exception as error:  # Orbax and TensorStore raise kinds of their own
            failed(step, error)

    def wait() -> None:
        nonlocal pending
        if writer is None or pending is None:
            return
        step, pending = pending, None
        try:
            writer.wait()
            _require(lambda: step in saved_steps(folder), "the folder is gone")
        except Exception as error:
            failed(step, error)

    def failed(step: int, error: Exception) -> None:
        """Say it, by policy as an error. The writer would tell of it again: it is left behind."""
        nonlocal writer
        if writer is not None:
            with contextlib.suppress(Exception):
                writer.close()
        processes.by_first(lambda: remove_partial(folder, step))
        writer, good = None, saved_steps(folder)
        left = f"the last good one is {good[-1]}" if good else "there is no other"
        told = f"step {step} was not saved to {folder} ({reason(error)}); {left}"
        if failed_save == "stop":
            raise StorageError(
                f"{told}. The same command goes on from there; with checkpoints.failed_save go_on"
                " training would not have stopped"
            ) from error
        announce(f"{told}. Training goes on, as checkpoints.failed_save says")

    def close() -> None:
        nonlocal writer
        wait()
        if writer is not None:
            writer.close()
            writer = None

    def written(read: Callable[..., T]) -> Callable[..., T]:
        """read(folder, ...) of what is there when the save that is under way has ended."""

        def read_then(*args: Any) -> T:
            wait()
            return read(folder, *args)

        return read_then

    return Checkpoints(
        written(saved_steps),
        save,
        written(read_about),
        written(read_state),
        written(_newest),
        close,
    )


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
