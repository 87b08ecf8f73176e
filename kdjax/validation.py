"""What of a config can't be: a mistake is one line with the field, its value and the remedy."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, Literal

from kdjax.base import ConfigError
from kdjax.config import Config, Lora, Turn, methods, teacher_models
from kdjax.objective import divergence
from kdjax.sampler import check_sampling
from kdjax.symbolic import check_installed


def validate(config: Config) -> Config:
    """The config itself, or a ConfigError naming the field, what it got and the remedy."""
    _check_types(config, "")
    positive = (
        "steps",
        "batch_size",
        "micro_batches",
        "save_every_steps",
        "log_every_steps",
        "head_memory_mib",
    )
    for name in positive:
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise ConfigError(f"{name} must be at least 1, got {getattr(config, name)}")
    if config.layout.tensor < 1 or (config.layout.fsdp or 1) < 1:
        raise ConfigError(
            f"layout.fsdp and layout.tensor must be at least 1, got {config.layout.fsdp} and"
            f" {config.layout.tensor}"
        )
    if not 0 <= config.seed < 2**32:
        raise ConfigError(f"seed must be in 0..{2**32 - 1}, got {config.seed}")
    if config.data.max_prompt_tokens < 1:
        raise ConfigError(
            f"data.max_prompt_tokens must be at least 1, got {config.data.max_prompt_tokens}"
        )
    if config.batch_size % config.micro_batches:
        raise ConfigError(
            f"batch_size {config.batch_size} is not a multiple of"
            f" micro_batches {config.micro_batches}"
        )
    _check_turns(config)
    for method in methods(config):
        _check_teachers(method)
    if config.rollouts.rows < 1 or not (config.rollouts.cache_gib or 1.0) > 0:
        raise ConfigError(
            f"rollouts.rows and rollouts.cache_gib must be over 0, got {config.rollouts.rows} and"
            f" {config.rollouts.cache_gib}"
        )
    check_sampling(config.sampling, "sampling.")
    check_sampling(config.evaluation.sampling, "evaluation.sampling.")
    if config.data.file is not None and config.evaluation.file is None:
        raise ConfigError(
            "data.file needs evaluation.file beside it: problems that are not trained on"
        )
    if (
        config.data.file is not None
        and len(config.curriculum.lengths) > 1
        and config.curriculum.heldout_file is None
    ):
        raise ConfigError(
            "a curriculum on data.file needs curriculum.heldout_file: problems for the entropy gate"
        )
    _check_measurements(config)
    _check_lora(config.lora)
    return config


def _check_turns(config: Config) -> None:
    for turn in config.turns:
        if not 0 < turn.share <= 1:
            raise ConfigError(f"turns: share must be in (0, 1], got {turn.share}")
        if not 0 <= turn.from_step < config.steps:
            raise ConfigError(
                f"turns: from_step must be in 0..{config.steps - 1} (steps - 1), got"
                f" {turn.from_step}"
            )
    if config.turns and config.trajectories is not None:
        raise ConfigError(
            "turns and trajectories are both set, and a folder holds the responses of one prefix;"
            " leave trajectories out (the teacher's are drawn once, into the cache)"
        )


def _check_teachers(config: Config) -> None:
    taught = any(teacher_models(config).values())
    if config.layout.teacher_devices < 0 or (config.layout.teacher_devices and not taught):
        raise ConfigError(
            f"layout.teacher_devices is {config.layout.teacher_devices}; set it to 0, or beside a"
            " teacher to a number of devices"
        )
    stored = config.trajectories is not None  # what is stored there may be all that is needed
    if not taught and not stored and config.prefix == "teacher":
        raise ConfigError("prefix teacher needs a teacher; set teacher, or prefix dataset")
    if not taught and not stored and config.objective is divergence:
        raise ConfigError(
            "objective divergence needs a teacher; set teacher,"
            " or objective negative_log_likelihood"
        )
    if not taught and config.teacher_weights != "compute":
        raise ConfigError(
            f"teacher_weights {config.teacher_weights} needs a teacher; set teacher,"
            " or teacher_weights compute"
        )


def _check_measurements(config: Config) -> None:
    """The gate's held-out measurements, and the evaluation."""
    if config.curriculum.measure_every_steps < 1 or config.curriculum.heldout_problems < 1:
        raise ConfigError("curriculum.measure_every_steps and heldout_problems must be at least 1")
    evaluation = config.evaluation
    if not evaluation.k or not all(1 <= k <= evaluation.samples for k in evaluation.k):
        raise ConfigError(
            f"evaluation.k must lie in 1..samples ({evaluation.samples}), got {evaluation.k}"
        )
    if min(evaluation.problems, evaluation.max_new_tokens, evaluation.batch_size) < 1:
        raise ConfigError("evaluation.problems, max_new_tokens and batch_size must be at least 1")
    if evaluation.grader.startswith("math"):
        check_installed(f"evaluation.grader {evaluation.grader}")  # before the run, not at its end


def _check_lora(lora: Lora) -> None:
    if lora.rank:
        from kdjax.models.linear import LoRA  # loads flax

        LoRA(lora.rank, lora.alpha, lora.targets)
    elif lora != Lora():
        raise ConfigError(f"lora.rank is 0, so nothing else of {lora} has an effect; set lora.rank")


def _check_types(node: Any, prefix: str) -> None:
    for name, kind in typing.get_type_hints(type(node)).items():
        value = getattr(node, name)
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            if not isinstance(value, kind):
                raise ConfigError(f"{prefix}{name} must be a {kind.__name__}, got {value!r}")
            _check_types(value, f"{prefix}{name}.")
        elif not _fits(value, kind):
            raise ConfigError(f"{prefix}{name} must be {_spelled(kind)}, got {value!r}")
        elif kind == tuple[Turn, ...]:
            for turn in value:
                _check_types(turn, f"{prefix}{name}.")


def _fits(value: Any, kind: Any) -> bool:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return value in args
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, option) for option in args)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(v, args[0]) for v in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if isinstance(kind, type):
        return isinstance(value, kind)
    return callable(value)


def _spelled(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
