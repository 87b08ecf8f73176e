"""Orbax: arrays and JSON into a folder and back. Its own kinds of error go to the caller."""

from __future__ import annotations

import contextlib
import functools
import logging
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from kdjax.runtime import processes
from kdjax.runtime.files import strict_json

DELETED = "deleted"
"""Where retention moves a step before it is deleted: a kill then never leaves half of one under its
own name."""

JSON_FILE = "metadata"
"""What Orbax calls the file of a JSON value."""


def read_json(place: Path) -> Any:
    """What `save` wrote of a JSON value: Orbax's is a plain file."""
    return strict_json(place / JSON_FILE)


def read_arrays(place: Path, like: Any) -> Any:
    """What `save` wrote of a tree, in the shardings of `like`; it may be of other dtypes."""
    ocp, alone = _orbax(), _alone()
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
    reader = ocp.Checkpointer(handler, multiprocessing_options=alone)
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    return reader.restore(place.absolute(), args=ocp.args.StandardRestore(abstract))


class Writer(NamedTuple):
    """save(step, arrays, value): trees and JSON values by name, asynchronously, as one commit;
    wait() until it is there; close()."""

    save: Callable[[int, dict[str, Any], dict[str, Any]], None]
    wait: Callable[[], None]
    close: Callable[[], None]


def open_writer(folder: Path, keep: Callable[[list[int]], set[int]]) -> Writer:
    """A writer of steps, of which keep(steps) stay. What an interrupted save left is deleted."""
    ocp = _orbax()
    options = ocp.CheckpointManagerOptions(
        preservation_policy=_Policy(keep),
        todelete_subdir=DELETED,
        cleanup_tmp_directories=True,
        lightweight_initialize=True,  # reads no file of the steps, which may be damaged
    )
    manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def empty() -> None:
        processes.by_first(lambda: shutil.rmtree(folder / DELETED, ignore_errors=True))

    def save(step: int, arrays: dict[str, Any], values: dict[str, Any]) -> None:
        items = {name: ocp.args.StandardSave(tree) for name, tree in arrays.items()}
        items |= {name: ocp.args.JsonSave(value) for name, value in values.items()}
        if not manager.save(step, args=ocp.args.Composite(**items), force=True):
            raise OSError("Orbax declined to save it")

    def wait() -> None:
        manager.wait_until_finished()
        empty()

    empty()
    return Writer(save, wait, manager.close)


def remove_partial(folder: Path, step: int, *, folder_too: bool) -> None:
    """Delete what a save that failed has written, so that a full disk has room for other files; for
    a few seconds again and again, as writes that Orbax left behind may add to it meanwhile. Of a
    folder that was deleted under it (folder_too), also what it has made anew of that."""
    limit = time.monotonic() + 5
    steps = "*" if folder_too else str(step)
    while left := list(folder.glob(f"{steps}.orbax-checkpoint-tmp*")):
        for place in left:
            shutil.rmtree(place, ignore_errors=True)
        if time.monotonic() > limit:
            break
    for place in (folder / DELETED, folder) if folder_too else ():
        with contextlib.suppress(OSError):
            place.rmdir()


class _Policy(NamedTuple):
    """An Orbax preservation policy of a function of the steps."""

    keep: Callable[[list[int]], set[int]]

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        stay = self.keep([checkpoint.step for checkpoint in checkpoints])
        return [checkpoint.step in stay for checkpoint in checkpoints]


def _alone():
    """Reading waits for no other process: one that can't read would keep them waiting."""
    here = jax.process_index()
    return _orbax().options.MultiprocessingOptions(
        primary_host=here, active_processes={here}, barrier_sync_key_prefix=f"read{here}"
    )


def _orbax():
    """Orbax, which takes a second to load, and quiet: what fails is raised here and told in one
    line. Its log would add a stack a thread, and the reads and writes that it leaves behind when
    one of them fails report to nobody, each with a stack."""
    import orbax.checkpoint as ocp

    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").addFilter(_was_awaited)
    if getattr(sys.unraisablehook, "func", None) is not _unless_left_behind:
        sys.unraisablehook = functools.partial(_unless_left_behind, sys.unraisablehook)
    return ocp


def _was_awaited(record: logging.LogRecord) -> bool:
    return "exception was never retrieved" not in record.getMessage()


def _unless_left_behind(report: Callable[[Any], Any], unraisable: Any) -> None:
    code = getattr(unraisable.object, "cr_code", None)
    left = code is not None and "orbax" in code.co_filename
    if not left and str(unraisable.exc_value) != "Event loop is closed":
        report(unraisable)
