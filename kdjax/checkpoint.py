"""Save and restore through Orbax: parameters, optimizer state with the gate, step, cursor and
config.

The teacher is not saved: its name and the identity of its weights are. Only this module imports
orbax.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from kdjax.base import DataError, StorageError, TrainState
from kdjax.config_json import differences


class Checkpoints(NamedTuple):
    """The checkpoints of one run, as functions.

    - steps() -> the steps that are saved and committed, ascending.
    - save(step, state, about): asynchronous; about is JSON-able (cursor, config, identities).
    - read_about(step) -> what was saved beside the arrays.
    - restore(step, like) -> state: the tree, shapes, dtypes and sharding of `like`, or an error.
    - close(): wait for what is being written.
    """

    steps: Callable[[], list[int]]
    save: Callable[[int, TrainState, dict[str, Any]], None]
    read_about: Callable[[int], dict[str, Any]]
    restore: Callable[[int, TrainState], TrainState]
    close: Callable[[], None]


def open_checkpoints(folder: Path, keep: int = 2) -> Checkpoints:
    """Checkpoints in `folder`, the newest `keep` of them. Errors: StorageError, DataError."""
    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(max_to_keep=keep, todelete_subdir="deleted", create=True)
    try:
        manager = ocp.CheckpointManager(folder.absolute(), options=options)
    except OSError as error:
        raise StorageError(f"can't write checkpoints to {folder}: {error}") from error

    def save(step: int, state: TrainState, about: dict[str, Any]) -> None:
        about = {**about, "leaves": _leaves(state)}
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about)
        )
        try:
            if not manager.save(step, args=args, force=True):
                raise StorageError(f"step {step} was not saved to {folder}; is the disk full?")
        except OSError as error:
            raise StorageError(f"can't save step {step} to {folder}: {error}") from error

    def read(step: int, **args: Any) -> Any:
        try:
            return manager.restore(step, args=ocp.args.Composite(**args))
        except Exception as error:  # Orbax wraps every failure in kinds of its own
            reason = str(error.__cause__ or error).splitlines()[0][:200]
            raise DataError(
                f"checkpoint {folder}/{step} can't be restored ({reason});"
                " delete it to use an older one"
            ) from error

    def read_about(step: int) -> dict[str, Any]:
        return read(step, about=ocp.args.JsonRestore())["about"]

    def restore(step: int, like: TrainState) -> TrainState:
        _check_leaves(f"{folder}/{step}", read_about(step)["leaves"], like)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        return read(step, state=ocp.args.StandardRestore(abstract))["state"]

    def close() -> None:
        manager.wait_until_finished()
        manager.close()

    return Checkpoints(lambda: sorted(manager.all_steps()), save, read_about, restore, close)


def _leaves(state: TrainState) -> dict[str, str]:
    """Path -> dtype and shape of every leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def _check_leaves(name: str, have: dict[str, str], like: TrainState) -> None:
    """Names, shapes and dtypes must agree: Orbax would cast a dtype without a word."""
    for change in differences(have, _leaves(like)):
        raise DataError(f"checkpoint {name} does not fit the config: {change}")
