"""Export: a run's trained parameters, and a Hugging Face folder of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from kdjax import models
from kdjax.base import Params
from kdjax.config.as_json import from_dict, trained_by
from kdjax.config.schema import Config
from kdjax.config.teachers import teacher_models
from kdjax.config.validation import check_types
from kdjax.data.tokenizer import Wording, load_tokenizer
from kdjax.data.tokenizer_folder import read_tokenizer, stop_ids
from kdjax.errors import ConfigError, DataError
from kdjax.models.lora import Student, adapter_of, make_lora, write_adapter
from kdjax.models.shape import DecoderConfig
from kdjax.runtime import files
from kdjax.runtime.console import announce
from kdjax.sharding import make_mesh
from kdjax.storage import run_folder
from kdjax.storage.restore import (
    About,
    DamagedError,
    measured,
    read_about,
    read_params,
    saved_steps,
)
from kdjax.storage.retention import best_step

NEWEST, BEST = "newest", "best"
"""Names of checkpoints, which also have the numbers of their steps."""


def export(
    run: str | Path, out: str | Path, dtype: DTypeLike = jnp.float32, step: str = NEWEST
) -> None:
    """Write a checkpoint's student to `out` in `dtype`, with its initial model's config and
    tokenizer, the chat template that it was trained with, and all stop ids that stops merge made
    one; step as in `load_run`.

    Errors: DataError when `run` holds no such checkpoint, StorageError when `out` exists and is not
    empty.
    """
    config, params = load_run(run, step)
    folder = models.find(config.student)
    models.write_folder(
        Path(out),
        params,
        folder,
        dtype,
        chat_template=_template(config, folder),
        stop_ids=_merged_stops(config, folder),
    )


def _template(config: Config, folder: Path) -> str | None:
    """The chat template of a run whose student has none of its own; None: it is the student's."""
    named, first = config.data.chat_template, next(iter(teacher_models(config).values()))
    if named is None and (first is None or read_tokenizer(folder).chat_template):
        return None
    spare = models.find(first) if named is None and first is not None else None
    wording = Wording(chat_template=named)
    return load_tokenizer(folder, wording, spare_template=spare).template


def _merged_stops(config: Config, folder: Path) -> tuple[int, ...]:
    """The stop ids of student and teachers, which stops merge trained as one event, so that the
    student may write any of them; () under another policy."""
    if config.stops != "merge":
        return ()
    teachers = (models.find(name) for name in teacher_models(config).values() if name is not None)
    ends = (i for each in (folder, *teachers) for i in stop_ids(each, read_tokenizer(each)))
    return tuple(dict.fromkeys(ends))


def export_adapter(run: str | Path, out: str | Path, step: str = NEWEST) -> None:
    """Write a checkpoint's adapter to `out`, which peft loads onto the student's initial model.

    Errors: DataError when `run` holds no such checkpoint or trained no adapter, StorageError as
    above.
    """
    config, decoder, student, trained = _restore(run, step)
    if student.lora is None:
        raise DataError(f"{run} trained the whole student, no adapter; kdjax export writes that")
    adapter, base = jax.device_get(trained), models.find(config.student)
    write_adapter(Path(out), adapter, decoder, student.lora, base)


def load_run(run: str | Path, step: str = NEWEST) -> tuple[Config, Params]:
    """The config and the trained parameters of a run, an adapter merged into its base. step: the
    newest intact checkpoint, the best (by the run's checkpoints.best), or one by its number. The
    optimizer is not read, and nothing of the run is changed. Errors: DataError."""
    config, _, student, trained = _restore(run, step)
    return config, student.whole(trained)


def _restore(run: str | Path, step: str) -> tuple[Config, DecoderConfig, Student, Params]:
    """(config, the student's shapes, its parameters split into trained and frozen, the trained
    ones). Errors: DataError, also where config or initial model are not those of the training."""
    folder = Path(run)
    if not (folder / "checkpoints").is_dir():
        raise DataError(f"{folder} is not a run: it holds no checkpoints")
    try:
        check_types(config := from_dict(fields := files.read_json(folder / run_folder.CONFIG)))
    except ConfigError as error:
        raise DataError(f"{folder / run_folder.CONFIG} is damaged: {error}") from error
    mesh, decoder = make_mesh(1), models.read_config(models.find(config.student))
    lora = make_lora(decoder, config.lora.rank, config.lora.alpha, config.lora.targets)
    like, frozen = models.abstract_params(decoder, jnp.float32, mesh, lora), None
    if lora is not None:
        like = adapter_of(like)
        _, frozen = models.load(config.student)
    check = functools.partial(_check_same, folder, fields, config.student)
    trained = _params(folder, step, config.checkpoints.best, like, check)
    return config, decoder, Student(trained, frozen, lora), trained


def _check_same(run: Path, fields: dict[str, Any], student: str, about: About) -> None:
    """Errors: DataError where a checkpoint is of another config, or of another initial model."""
    changed = files.differences(trained_by(about["config"]), trained_by(fields))
    if changed:
        raise DataError(
            f"{run / run_folder.CONFIG} is not what the run was trained by: {'; '.join(changed)}."
            " Put the old values back"
        )
    saved, now = about["identities"]["student"], models.identity(models.find(student))
    if saved != now:
        raise DataError(
            f"{run} was trained from another student: the files of {student} were {saved} and are"
            f" {now}. Put those back"
        )


def _params(
    run: Path, step: str, best: str | None, like: Params, check: Callable[[About], None]
) -> Params:
    """The parameters of a checkpoint that check(about) has not refused."""
    folder = run / "checkpoints"
    steps = saved_steps(folder)
    if not steps:
        raise DataError(f"{run} holds no checkpoint yet; let it train to its first save")

    def read(number: int) -> Params:
        check(read_about(folder, number))
        return read_params(folder, number, like)

    if step != NEWEST:
        return read(_chosen(folder, step, best, steps))
    for newest in reversed(steps):
        try:
            return read(newest)
        except DamagedError as error:
            if newest not in saved_steps(folder):  # a run that trains has deleted it meanwhile
                return _params(run, step, best, like, check)
            announce(f"{error}; the one before it is tried")
    raise DataError(f"{folder} holds no intact checkpoint, of steps {steps}")


def _chosen(folder: Path, step: str, best: str | None, steps: list[int]) -> int:
    """The step number of a checkpoint by its name or number."""
    if step == BEST and best is None:
        raise DataError(
            f"{folder.parent} keeps no best checkpoint (checkpoints.best); give --step {NEWEST}, or"
            f" one of {steps}"
        )
    found = best_step(measured(folder), best) if step == BEST and best else None
    number = found[0] if found else int(step) if step.isdecimal() else None
    if number not in steps:
        raise DataError(f"{folder.parent} has no checkpoint {step}; it has {steps} (--step)")
    return number
