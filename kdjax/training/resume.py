"""The start of a run: fresh, or from the newest checkpoint that this very config has made."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from kdjax.base import TrainState
from kdjax.config.as_json import as_dict, trained_by
from kdjax.config.schema import Config
from kdjax.config.timetable import timetable
from kdjax.errors import ConfigError, DataError
from kdjax.runtime import processes
from kdjax.runtime.files import differences, read_json
from kdjax.storage.checkpoints import Checkpoints
from kdjax.storage.restore import DamagedError, read_about, saved_steps
from kdjax.storage.run_folder import VERSIONS
from kdjax.training.parts.build import Parts, fresh_state, identities


def start(parts: Parts, checkpoints: Checkpoints) -> tuple[TrainState, dict[str, Any]]:
    """(a fresh state, or that of the newest intact checkpoint; the checkpoint's record of the
    steps before, by `about_step`). Errors: as `_check_same`."""

    def accept(about: dict[str, Any]) -> None:
        _check_same(parts.config, parts.identities, about)

    found = checkpoints.newest(parts.programs.student.state, accept)
    return found if found is not None else (fresh_state(parts), {"seconds": 0.0, "records": []})


def check_resumable(config: Config, folder: Path) -> None:
    """Refuse a config that is not that of a folder's newest checkpoint, before models are loaded.
    Errors: as `_check_same`."""
    for step in sorted(processes.from_first(lambda: saved_steps(folder)), reverse=True):
        with contextlib.suppress(DamagedError):  # `start` says it, and takes the one before
            about = read_about(folder, step)
            _check_same(config, identities(config, timetable(config)), about)
            return


def _check_same(config: Config, identities: dict[str, str], about: dict[str, Any]) -> None:
    """Errors: ConfigError where a checkpoint is of another config, of other weights or data."""
    run = config.run
    changed = differences(trained_by(about["config"]), trained_by(as_dict(config)))
    if changed:
        raise ConfigError(
            f"{run} was started with another config: {'; '.join(changed)}."
            " Choose another --run, or the old values"
        )
    if about["identities"] != identities:
        other = "; ".join(differences(about["identities"], identities))
        raise ConfigError(f"{run} was trained with other weights or data: {other}")
    if about["position"] != about["step"] * config.batch_size:
        raise DataError(f"{run}: the checkpoint's data position does not belong to its step")


def about_version(run: Path, now: dict[str, str]) -> str:
    """What to say where a run goes on with another kdjax than it was last trained by, "" otherwise.
    now: `run_folder.versions` of this process."""
    try:
        before = read_json(run / VERSIONS)
    except DataError:
        before = None
    if not isinstance(before, dict):
        return ""
    own = {name: now[name] for name in ("kdjax", "git_commit")}
    changed = differences({name: before.get(name) for name in own}, own)
    if not changed:
        return ""
    return (
        f"{run}: warning: another kdjax goes on with it ({'; '.join(changed)}): problems may come"
        " in another order, and prompts as other tokens, than in the steps before"
    )


def about_step(parts: Parts, done: int, seconds: float, record: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's record of the `done` steps before it, in so many seconds; record: the step's
    metrics."""
    tested = {name: value for name, value in record.items() if name.startswith("test_")}
    return {
        "config": as_dict(parts.config),
        "identities": parts.identities,
        "position": done * parts.config.batch_size,
        "seconds": seconds,
        "tests": {name: value for name, value in tested.items() if isinstance(value, float)},
    }
