"""A run -> its trained parameters, and a Hugging Face folder of them."""

from __future__ import annotations

from pathlib import Path

from kdjax import models, report
from kdjax.base import DataError, Params
from kdjax.checkpoint import open_checkpoints
from kdjax.config import Config, from_dict
from kdjax.optimizer import make_optimizer
from kdjax.step import init_state


def export(run: str | Path, out: str | Path) -> None:
    """Write the newest checkpoint's student to `out`, with the config and tokenizer of the model it
    began as.

    Errors: DataError when `run` holds no checkpoint, StorageError when `out` exists and is not
    empty.
    """
    config, params = load_run(run)
    models.write_folder(Path(out), params, models.find(config.student))


def load_run(run: str | Path) -> tuple[Config, Params]:
    """The config and the newest trained parameters of a run."""
    folder = Path(run)
    if not (folder / "checkpoints").is_dir():
        raise DataError(f"{folder} is not a run: it holds no checkpoints")
    config = from_dict(report.read_json(folder / report.CONFIG))
    checkpoints = open_checkpoints(folder / "checkpoints")
    try:
        if not checkpoints.steps():
            raise DataError(f"{folder} holds no checkpoint yet; let it train to its first save")
        _, params = models.load(config.student)
        like = init_state(
            params, make_optimizer(learning_rate=1.0, steps=1, lengths=config.curriculum.lengths)
        )
        state = checkpoints.restore(checkpoints.steps()[-1], like)
    finally:
        checkpoints.close()
    return config, state.params
