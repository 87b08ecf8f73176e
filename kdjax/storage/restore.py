"""Reading of checkpoints: what was saved, or what is wrong with it; nothing is changed on disk."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax

from kdjax.base import Params, TrainState
from kdjax.errors import DataError, StorageError
from kdjax.runtime import processes
from kdjax.runtime.files import differences
from kdjax.storage.fingerprint import fingerprints, kinds
from kdjax.storage.orbax import read_arrays, read_json
from kdjax.storage.retention import Tests

T = TypeVar("T")
About = dict[str, Any]


class DamagedError(DataError):
    """A checkpoint whose files are not what was saved (exit code 65)."""


def saved_steps(folder: Path) -> list[int]:
    """The steps that are saved and committed, ascending: a folder has its number for a name when
    all of it is written."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(int(path.name) for path in found if path.name.isdecimal())


def measured(folder: Path) -> Tests:
    """What was measured at each saved step; nothing of a step whose `about` is damaged."""
    found: Tests = {}
    for step in processes.from_first(lambda: saved_steps(folder)):
        with contextlib.suppress(DamagedError):
            found[step] = read_about(folder, step).get("tests", {})
    return found


def about_of(step: int, state: TrainState, about: About) -> dict[str, str]:
    """What is saved beside the arrays: what the trainer says, step, leaves (path -> dtype and
    shape), fingerprints (path -> `kdjax.storage.fingerprint`); as a text with its sha256."""
    own = {"step": step, "leaves": kinds(state), "fingerprints": fingerprints(state)}
    text = json.dumps({**about, **own})
    return {"text": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def read_about(folder: Path, step: int) -> About:
    """What `about_of` made of a step. Errors: DamagedError."""

    def read() -> About:
        saved = read_json(folder / str(step) / "about")
        if hashlib.sha256(saved["text"].encode()).hexdigest() != saved["sha256"]:
            raise ValueError("it does not have its checksum")
        about = json.loads(saved["text"])
        if about["step"] != step:
            raise ValueError(f"it is step {about['step']} under another name")
        return about

    return _intact(folder, step, "about", read)


def items_of(state: TrainState) -> dict[str, Any]:
    """What of a state is saved in a folder of its own, by name; nothing of parts that are None."""
    training = {"step": state.step, "opt_state": state.opt_state}
    items = {"params": state.params, "training": training}
    return {name: item for name, item in items.items() if jax.tree.leaves(item)}


def read_state(folder: Path, step: int, like: TrainState) -> TrainState:
    """The state of a step with the tree, shapes, dtypes and shardings of `like`, on any mesh bit
    for bit as it was saved.

    Errors: DamagedError, naming what does not have its fingerprint; DataError where the checkpoint
    is of other shapes.
    """
    about = read_about(folder, step)
    parts = tuple(f".{name}" for name, part in like._asdict().items() if part is not None)
    saved = {name: kind for name, kind in about["leaves"].items() if name.startswith(parts)}
    for change in differences(saved, kinds(like)):  # Orbax would cast a dtype without a word
        raise DataError(f"checkpoint {folder}/{step} does not fit the config: {change}")

    items = {
        name: _intact(
            folder, step, name, functools.partial(read_arrays, folder / str(step) / name, item)
        )
        for name, item in items_of(like).items()
    }
    state = like._replace(params=items["params"], **items.get("training", {}))
    found = fingerprints(state)  # by all processes together

    def verify() -> None:
        changed = [name for name, value in found.items() if value != about["fingerprints"][name]]
        if changed:
            more = f" and {len(changed) - 1} arrays more" if len(changed) > 1 else ""
            raise ValueError(f"{changed[0]}{more} changed after it was saved")

    _intact(folder, step, "values", verify)
    return state


def read_params(folder: Path, step: int, like: Params) -> Params:
    """The parameters of a step alone: no file of the optimizer is read. Errors: `read_state`."""
    nothing: Any = None
    return read_state(folder, step, TrainState(nothing, like, nothing)).params


def _intact(folder: Path, step: int, part: str, read: Callable[[], T]) -> T:
    """read() of every process, or a DamagedError in all where one of them can't."""
    found: Any = None
    problem = ""
    try:
        found = read()
    except Exception as error:  # each library has kinds of its own for a broken file
        problem = reason(error).replace(f"{folder.absolute()}/{step}/", "")
        if _is_no_damage(error):
            raise StorageError(f"can't read checkpoint {folder}/{step}: {problem}") from error
    if any(processes.gather(bool(problem))):
        problem = problem or "another process could not read it"
        raise DamagedError(f"checkpoint {folder}/{step} is damaged: {part}: {problem}")
    return found


def _is_no_damage(error: Exception) -> bool:
    """Whether what failed is this machine."""
    words = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED")
    own = isinstance(error, MemoryError | PermissionError)
    return own or any(word in str(error) for word in words)


def reason(error: BaseException) -> str:
    """The root cause of a failure, on one line.

    >>> reason(ValueError("Error writing x: Failed: Too large [os_error_code='28'] [y]"))
    'No space left on device'
    >>> reason(ValueError("DATA_LOSS: Error reading a: Error decoding b: No header [spec='...']"))
    'Error decoding b: No header'
    """
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    number = re.search(r"os_error_code='(\d+)'", text)
    if number is not None:
        return os.strerror(int(number[1]))
    if isinstance(error, LookupError):
        return f"{type(error).__name__} {text}"
    said = re.split(r" \[[\w ]+(?:\[\d+\])?=", text)[0]  # TensorStore's specifications follow
    return ": ".join(said.split(": ")[-2:])[:300] or type(error).__name__
