"""Everything that a run leaves on disk, besides checkpoints: the only writer of results."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from kdjax.errors import DataError, StorageError
from kdjax.runtime import processes
from kdjax.runtime.console import announce
from kdjax.runtime.files import as_json, read_json, read_text, write_json, write_text
from kdjax.storage.trackers import open_trackers

CONFIG, VERSIONS, METRICS = "config.json", "versions.json", "metrics.jsonl"
STARTUP, PROFILE = "startup.txt", "profile"
EVALUATION, SAMPLES, PAGE = "evaluation.json", "samples.jsonl", "report.html"
MARKDOWN, TABLE = "report.md", "report.csv"

FILES = (CONFIG, VERSIONS, STARTUP, METRICS, EVALUATION, SAMPLES, PAGE, MARKDOWN, TABLE)
UNFINISHED = re.compile(rf"({'|'.join(map(re.escape, FILES))})(\.[0-9a-f]{{8}})?\.partial")
"""What a killed process may leave of a file that it was writing (`files.whole_file`)."""


class MetricsWriter(NamedTuple):
    """write(step, {name: number}) appends to metrics.jsonl, TensorBoard and (if asked for) W&B;
    close() ends it. Lists are kept in metrics.jsonl alone. Every number is finite."""

    write: Callable[[int, dict[str, Any]], None]
    close: Callable[[], None]


def open_run_folder(folder: Path) -> None:
    """Make the folder of a run, or find one; files that a killed process left unfinished are
    deleted. Errors: StorageError if it holds something else."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = {path.name for path in folder.iterdir()}
        unfinished = {name for name in found if UNFINISHED.fullmatch(name)}
        foreign = found - unfinished - {"checkpoints", VERSIONS, STARTUP}
    except OSError as error:
        raise StorageError(
            f"can't write the run folder {folder}: {error}; choose another --run"
        ) from error
    if foreign and CONFIG not in foreign:
        raise StorageError(
            f"{folder} holds {sorted(foreign)[:3]} but no run; choose another --run,"
            " nothing was overwritten"
        )
    for name in unfinished if processes.is_first() else ():
        (folder / name).unlink(missing_ok=True)


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
        digest, _, value = file.read_text().partition("\n")
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
    kept = [r for r in read_metrics(folder) if r["step"] <= from_step]
    write_text(path, "".join(as_json(r) + "\n" for r in kept))
    try:
        file = path.open("a", buffering=1)
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
    'unknown'."""
    here = Path(__file__).parent

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *args], capture_output=True, text=True, check=True
        ).stdout

    try:
        dirty = git("status", "--porcelain", "--untracked-files=no").strip()
        return git("rev-parse", "--short=12", "HEAD").strip() + ("+" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
