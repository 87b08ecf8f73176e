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


class Checkpoints(NamedTuple):
    """The checkpoints of one run.

    steps() -> the steps that are saved and committed, ascending. save(step, state, about):
    asynchronous; about is a JSON-able dict (cursor, config, identities). restore(step, like) ->
    (state, about): exactly the tree, shapes and dtypes of `like`, in its sharding. close(): wait
    for what is being written.
    """

    steps: Callable[[], list[int]]
    save: Callable[[int, TrainState, dict[str, Any]], None]
    restore: Callable[[int, TrainState], tuple[TrainState, dict[str, Any]]]
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

    def restore(step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        try:
            read = manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))
            _check_leaves(read["about"]["leaves"], like)
            args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
            return manager.restore(step, args=args)["state"], read["about"]
        except Exception as error:  # Orbax wraps every failure in kinds of its own
            reason = str(error.__cause__ or error).splitlines()[0][:200]
            raise DataError(
                f"checkpoint {folder}/{step} can't be restored ({reason});"
                " delete it to use an older one"
            ) from error

    def close() -> None:
        manager.wait_until_finished()
        manager.close()

    return Checkpoints(lambda: sorted(manager.all_steps()), save, restore, close)


def _leaves(state: TrainState) -> dict[str, str]:
    """Path -> dtype and shape of every leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def _check_leaves(have: dict[str, str], like: TrainState) -> None:
    """Names, shapes and dtypes must agree: Orbax would cast a dtype without a word."""
    want = _leaves(like)
    for name in sorted({*have, *want}):
        if have.get(name) != want.get(name):
            raise ValueError(
                f"it has {name} as {have.get(name)}, the config wants {want.get(name)}"
            )
