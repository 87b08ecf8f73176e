"""Checks of a config whose teacher has another tokenizer."""

from __future__ import annotations

from kdjax.config.schema import Config
from kdjax.config.teachers import teacher_models
from kdjax.config.timetable import Method
from kdjax.errors import ConfigError


def check_aligned(config: Config, method: Method) -> None:
    """What aligned tokens can't be combined with. Errors: ConfigError with the remedy."""
    least = config.least_aligned
    if least is None:
        return
    if not 0 < least <= 1:
        raise ConfigError(f"least_aligned must be a share in (0, 1], got {least}")
    if not any(teacher_models(config).values()):
        raise ConfigError("least_aligned is of a teacher's tokens; set teacher, or leave it out")
    if method.prefix == "teacher":
        raise ConfigError(
            "prefix teacher draws tokens of the teacher's own tokenizer; with least_aligned use"
            " prefix student or dataset"
        )
    if config.trajectories is not None:
        raise ConfigError(
            f"trajectories {config.trajectories} and least_aligned are both set; a teacher of"
            " another tokenizer reads responses as they are drawn: leave trajectories out"
        )
    if config.layout.tensor > 1:
        raise ConfigError(
            f"layout.tensor {config.layout.tensor} shards one vocabulary, and least_aligned is for"
            " two; use layout.fsdp"
        )
