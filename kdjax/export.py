"""A run -> its trained parameters, and a Hugging Face folder of them."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp

from kdjax import models, report
from kdjax.base import ConfigError, DataError, Params
from kdjax.checkpoint import open_checkpoints
from kdjax.config import Config
from kdjax.config_json import from_dict
from kdjax.models import DecoderConfig
from kdjax.models.lora import adapter_of, write_adapter
from kdjax.sharding import make_mesh
from kdjax.step import abstract_state
from kdjax.student import Student, lora_of, optimizer_of
from kdjax.validation import check_types


def export(run: str | Path, out: str | Path, dtype=jnp.float32) -> None:
    """Write the newest checkpoint's student to `out` in `dtype`, with the config and tokenizer of
    the model it began as.

    Errors: DataError when `run` holds no checkpoint, StorageError when `out` exists and is not
    empty.
    """
    config, params = load_run(run)
    models.write_folder(Path(out), params, models.find(config.student), dtype)


def export_adapter(run: str | Path, out: str | Path) -> None:
    """Write the newest checkpoint's adapter to `out`, as peft reads it onto the model it began as.

    Errors: DataError when `run` holds no checkpoint or trained no adapter, StorageError as above.
    """
    config, decoder, student, trained = _restore(run)
    if student.lora is None:
        raise DataError(f"{run} trained the whole student, no adapter; kdjax export writes that")
    adapter, base = jax.device_get(trained), models.find(config.student)
    write_adapter(Path(out), adapter, decoder, student.lora, base)


def load_run(run: str | Path) -> tuple[Config, Params]:
    """The config and the newest trained parameters of a run, an adapter merged into its base."""
    config, _, student, trained = _restore(run)
    return config, student.whole(trained)


def _restore(run: str | Path) -> tuple[Config, DecoderConfig, Student, Params]:
    """(config, the student's shape, how its parameters are divided, the trained ones)."""
    folder = Path(run)
    if not (folder / "checkpoints").is_dir():
        raise DataError(f"{folder} is not a run: it holds no checkpoints")
    try:
        check_types(config := from_dict(report.read_json(folder / report.CONFIG)))
    except ConfigError as error:
        raise DataError(f"{folder / report.CONFIG} is damaged: {error}") from error
    checkpoints = open_checkpoints(folder / "checkpoints")
    try:
        if not checkpoints.steps():
            raise DataError(f"{folder} holds no checkpoint yet; let it train to its first save")
        mesh, decoder = make_mesh(1), models.read_config(models.find(config.student))
        lora = lora_of(config, decoder)
        trained = models.abstract_params(decoder, jnp.float32, mesh, lora)
        frozen = None
        if lora is not None:
            trained = adapter_of(trained)
            _, frozen = models.load(config.student)
        like = abstract_state(trained, optimizer_of(config), mesh)
        state = checkpoints.restore(checkpoints.steps()[-1], like)
    finally:
        checkpoints.close()
    return config, decoder, Student(state.params, frozen, lora), state.params
