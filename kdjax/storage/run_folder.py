"""Everything that a run leaves on disk, besides checkpoints: the only writer of results."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kdjax.errors import DataError, StorageError
from kdjax.runtime import processes
from kdjax.runtime.console import announce
from kdjax.runtime.files import (
    as_json,
    is_partial,
    read_json,
    read_text,
    strict_json,
    write_json,
    write_text,
)
from kdjax.storage.hold import LOCK, hold
from kdjax.storage.trackers import open_trackers

CONFIG, VERSIONS, METRICS = "config.json", "versions.json", "metrics.jsonl"
STARTUP, PROFILE = "startup.txt", "profile"
EVALUATION, SAMPLES, PAGE = "evaluation.json", "samples.jsonl", "report.html"
MARKDOWN, TABLE = "report.md", "report.csv"

FILES = (CONFIG, VERSIONS, STARTUP, METRICS, EVALUATION, SAMPLES, PAGE, MARKDOWN, TABLE)
OWN = re.compile(rf"{'|'.join(map(re.escape, FILES))}|{LOCK}|stacks_\d+\.txt")
"""The files of a run folder."""
BEFORE_CONFIG = {"checkpoints", VERSIONS, STARTUP, LOCK}
"""What a run may have in its folder before its config."""


class MetricsWriter(NamedTuple):
    """write(step, {name: number}) appends to metrics.jsonl, TensorBoard and (if asked for) W&B;
    close() ends it. Lists are kept in metrics.jsonl alone. Every number is finite."""

    write: Callable[[int, dict[str, Any]], None]
    close: Callable[[], None]


@contextlib.contextmanager
def open_run_folder(folder: Path) -> Iterator[None]:
    """Hold the folder of a run for the `with` block, a new one or one that is there; files that a
    killed process left unfinished are deleted.

    Errors: StorageError if it holds something else, or has links where files are to be; BusyError
    where another run trains in it. Nothing is touched then.
    """
    _check_is_run(folder)
    with hold(folder):
        remove_unfinished(folder)
        yield


def _check_is_run(folder: Path) -> None:
    try:
        found = {path.name: path for path in folder.iterdir()} if folder.exists() else {}
        links = sorted(n for n, path in found.items() if OWN.fullmatch(n) and path.is_symlink())
    except OSError as error:
        raise StorageError(
            f"can't write the run folder {folder}: {error}; choose another --run"
        ) from error
    foreign = {n for n in found if not is_partial(n, FILES)} - BEFORE_CONFIG
    if foreign and not _is_run(folder):
        raise StorageError(
            f"{folder} holds {sorted(foreign)[:3]} but no run; choose another --run,"
            " nothing was overwritten"
        )
    if links:
        raise StorageError(
            f"{folder / links[0]} is a link; a run's files are files of its own: put the file"
            " itself there, or delete the link"
        )


def _is_run(folder: Path) -> bool:
    """Whether a folder is a run's: by the fields of its config.json (a model has one as well), or
    by what lies beside it where that can't be read."""
    try:
        config = strict_json(folder / CONFIG)
    except (OSError, ValueError):
        beside = (folder / CONFIG, folder / VERSIONS, folder / "checkpoints")
        return all(path.exists() for path in beside)
    return isinstance(config, dict) and config.keys() >= {"student", "token_loss", "steps"}


def remove_unfinished(folder: Path, names: Sequence[str] = FILES) -> None:
    """Delete what killed processes left in a folder of files of these names."""
    left = [p for p in folder.iterdir() if is_partial(p.name, names)] if folder.is_dir() else ()
    for path in left if processes.is_first() else ():
        path.unlink(missing_ok=True)


def run_name(folder: Path) -> str:
    """How a run is called where people read it; in a study, by its cell and seed.

    >>> run_name(Path("runs/mine")), run_name(Path("runs/study/forward/seed_0"))
    ('mine', 'forward/seed_0')
    """
    in_study = folder.name.startswith("seed_")
    return f"{folder.parent.name}/{folder.name}" if in_study else folder.name


def write_evaluation(
    folder: Path, key: dict[str, Any], report: dict[str, Any], samples: Iterable[dict[str, Any]]
) -> None:
    """Keep an evaluation with the key of everything that decides it; the report is written last."""
    text = "".join(as_json(s, ensure_ascii=False) + "\n" for s in samples)
    write_text(folder / SAMPLES, text)
    write_json(folder / EVALUATION, {"key": key, "report": report})


def read_evaluation(folder: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    """The report kept in a folder, if there is one and it has this key."""
    if not (folder / EVALUATION).exists():
        return None
    saved = read_json(folder / EVALUATION)
    if not isinstance(saved, dict) or not isinstance(saved.get("report"), dict):
        raise DataError(f"{folder / EVALUATION} is damaged (no report); delete it to evaluate anew")
    return saved["report"] if saved.get("key") == json.loads(as_json(key)) else None


def read_chunk(folder: Path, number: int) -> Any:
    """The JSON value that `write_chunk` kept; None where there is none, or it is damaged."""
    file = _chunk_file(folder, number)
    try:
        digest, _, value = file.read_text(encoding="utf-8").partition("\n")
    except (OSError, ValueError):
        return None
    return json.loads(value) if digest == hashlib.sha256(value.encode()).hexdigest() else None


def write_chunk(folder: Path, number: int, value: Any) -> Any:
    """Keep a JSON value under its number; gives what would be read again. Errors: StorageError."""
    text = json.dumps(value, ensure_ascii=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    write_text(_chunk_file(folder, number), f"{digest}\n{text}")
    return json.loads(text)


def _chunk_file(folder: Path, number: int) -> Path:
    return folder / f"chunk-{number:05d}"


def open_metrics(folder: Path, from_step: int, wandb_project: str | None = None) -> MetricsWriter:
    """A writer for the steps after `from_step`; what was logged beyond it is dropped first. The
    first process of a run writes, the others write nothing."""
    if not processes.is_first():
        return MetricsWriter(lambda step, values: None, lambda: None)
    path = folder / METRICS
    write_text(path, _lines(r for r in read_metrics(folder) if r["step"] <= from_step))
    try:
        file = path.open("a", buffering=1, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"can't write metrics to {folder}: {error}") from error
    trackers = open_trackers(folder, from_step, wandb_project, announce)

    def write(step: int, values: dict[str, Any]) -> None:
        try:
            file.write(as_json({"step": step, **values}) + "\n")
        except OSError as error:
            raise StorageError(f"can't write {path}: {error}") from error
        numbers = {n: value for n, value in values.items() if not isinstance(value, list)}
        for tracker in trackers:
            tracker.write(step, numbers)

    def close() -> None:
        with contextlib.suppress(OSError):  # it would try again what could not be written
            file.close()
        for tracker in trackers:
            tracker.close()

    return MetricsWriter(write, close)


def restored_metrics(
    folder: Path, step: int, kept: list[dict[str, Any]] | None
) -> list[dict[str, Any]]:
    """The records up to a step: those that its checkpoint has kept (None: it has none), of which
    metrics.jsonl is written anew where it holds others. Errors: as `read_metrics`."""
    if kept is None:
        return [r for r in read_metrics(folder) if r["step"] <= step]
    try:
        found: list[dict[str, Any]] | None = read_metrics(folder)[: len(kept)]
    except DataError:
        found = None
    if found != kept and processes.is_first():
        announce(
            f"{folder / METRICS} was not what this run has written; up to step {step} it is written"
            " anew, from the checkpoint"
        )
        write_text(folder / METRICS, _lines(kept))
    return list(kept)


def _lines(records: Iterable[dict[str, Any]]) -> str:
    return "".join(as_json(record) + "\n" for record in records)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl, by rising steps; a last line that a kill cut short is left out.
    Errors: DataError naming another line that is no record."""
    path = folder / METRICS
    return list(_records(path, _is_metric)) if path.exists() else []


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """The samples of a finished run. Errors: DataError naming a line that is none."""
    return list(_records(folder / SAMPLES, lambda record, before: True))


def _records(path: Path, follows: Callable[[dict, dict], bool]) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file's lines, each of which follows the one before it."""
    lines = read_text(path).split("\n")
    before: dict[str, Any] = {}
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict) or not follows(record, before):
            if number == len(lines):  # nothing, or what a kill left of a line
                return
            raise DataError(f"{path}, line {number}: no record; delete it and what follows")
        yield record
        before = record


def _is_metric(record: dict[str, Any], before: dict[str, Any]) -> bool:
    numbers = all(isinstance(value, int | float | list) for value in record.values())
    return numbers and type(record.get("step")) is int and record["step"] > before.get("step", -1)


def versions() -> dict[str, str]:
    """What produced a run: packages, Python, device kind and count, git commit."""
    from importlib.metadata import version

    import jax

    names = ("kdjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
    devices, count = jax.devices(), jax.process_count()
    over = f" over {count} processes" if count > 1 else ""
    return {
        **{name: version(name) for name in names},
        "python": platform.python_version(),
        "devices": f"{len(devices)} x {devices[0].device_kind} ({jax.default_backend()}){over}",
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "git_commit": git_commit(),
    }


def git_commit() -> str:
    """The commit of the checkout that this package runs from, with + when it has changes; or
    'unknown', also where it is installed below another project's checkout."""
    home = Path(__file__).parents[2].resolve()
    others = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*args: str) -> str:
        command = ["git", "-C", str(home), *args]
        return subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", check=True, env=others
        ).stdout

    try:
        if Path(git("rev-parse", "--show-toplevel").strip()).resolve() != home:
            return "unknown"
        dirty = git("status", "--porcelain", "--untracked-files=no").strip()
        return git("rev-parse", "--short=12", "HEAD").strip() + ("+" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
