"""Checks of a config: a mistake is one line with the field, its value and the remedy."""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any, Literal

from kdjax.base import Objective
from kdjax.config.aligned import check_aligned
from kdjax.config.engines import check_rollouts, check_served
from kdjax.config.evaluated import check_evaluation
from kdjax.config.schema import (
    RL,
    Config,
    Data,
    Faults,
    Lora,
    Study,
    Turn,
)
from kdjax.config.teachers import FIELD, check_teacher_prompts, check_teachers
from kdjax.config.timetable import timetable
from kdjax.data.chat.named import PLAIN, SUFFIX
from kdjax.data.sources.mapping import mapping_of
from kdjax.errors import ConfigError, without_secrets
from kdjax.grading.rewards import math as math_reward
from kdjax.grading.symbolic import check_installed
from kdjax.losses.composition import composition_of, walk
from kdjax.losses.grpo import importance
from kdjax.rollouts.choose import check_sampling
from kdjax.step.gate import entropy_gate


def validate(config: Config) -> Config:
    """The config itself, or a ConfigError naming the field, what it got and the remedy."""
    check_types(config)
    for name in ("run", "cache"):  # an empty one would be the present folder
        if not getattr(config, name).strip():
            raise ConfigError(f"{name} must name a folder, got {getattr(config, name)!r}")
    positive = "steps", "batch_size", "micro_batches", "save_every_steps", "log_every_steps"
    for name in (*positive, "head_memory_mib"):
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
    if min(config.curriculum.lengths, default=0) < 1:
        raise ConfigError(
            f"curriculum.lengths must be one or more, each over 0, got {config.curriculum.lengths}"
        )
    _check_rl(config)
    for method in timetable(config).methods:
        check_teachers(config, method)
        check_aligned(config, method)
    check_rollouts(config.rollouts, config.save_every_steps)
    check_served(config, timetable(config).methods)
    _check_faults(config.faults)
    check_sampling(config.sampling, "sampling.")
    check_evaluation(config.evaluation)
    _check_problems(config)
    _check_prompts(config.data)
    check_teacher_prompts(config)
    _check_measurements(config)
    _check_checkpoints(config)
    _check_lora(config.lora)
    return config


def validate_study(study: Study) -> Study:
    """The study itself, or a ConfigError naming the cell and its field, or what of the study."""
    check_types(study, "study ")
    for name, config in study.cells.items():
        try:
            validate(config)
        except ConfigError as error:
            raise ConfigError(f"cell {name}: {error}") from error
    for claim in study.claims:
        check_types(claim, f"claim {claim.name}: ")
    return study


def _check_problems(config: Config) -> None:
    """Each purpose has one source, and what is measured on is not what is trained on."""
    data, evaluation, curriculum = config.data, config.evaluation, config.curriculum
    sources = {
        "data.": (data.name, data.file),
        "evaluation.": (evaluation.name, evaluation.file),
        "curriculum.heldout_": (curriculum.heldout_name, curriculum.heldout_file),
    }
    for field, (name, file) in sources.items():
        if "" in (name, file):  # it would be the present folder
            raise ConfigError(f"{field}{'name' if name == '' else 'file'} is empty; leave it out")
        if name is not None and file is not None:
            raise ConfigError(f"{field}name {name} and {field}file {file} are both set; choose one")
    trained, measured, held = (name or file for name, file in sources.values())
    own = "data.file" if data.file else "data.name"
    if trained and not measured:
        raise ConfigError(
            f"{own} needs {own.replace('data', 'evaluation')} beside it: problems that are not"
            " trained on"
        )
    if trained and len(curriculum.lengths) > 1 and not held:
        raise ConfigError(
            f"a curriculum on {own} needs {own.replace('data.', 'curriculum.heldout_')}: problems"
            " for the entropy gate"
        )
    for field, columns, source in (
        ("data", data.columns, trained),
        ("evaluation", evaluation.columns, measured),
    ):
        if columns and not source:
            raise ConfigError(
                f"{field}.columns {columns} has no file to be of; set {field}.file, or leave it out"
            )
        mapping_of(columns)


def _check_prompts(data: Data) -> None:
    """The template has the prompt once, and no field that nothing fills."""
    template = data.prompt_template
    if template.count("{prompt}") != 1:
        raise ConfigError(
            f"data.prompt_template must hold {{prompt}} exactly once, got {template!r}"
        )
    others = [field for field in FIELD.findall(template) if field != "{prompt}"]
    if others:
        raise ConfigError(
            f"data.prompt_template has the field {others[0]}, and only {{prompt}} is filled in"
            " (braces of a LaTeX command are text)"
        )
    if data.system_prompt is not None and not data.system_prompt.strip():
        raise ConfigError(
            f"data.system_prompt must be a text, got {data.system_prompt!r}; leave it out for none"
        )
    named = data.chat_template
    if named is not None and named != PLAIN and not named.endswith(SUFFIX):
        raise ConfigError(
            f"data.chat_template must be {PLAIN} or the path of a {SUFFIX} file, got {named!r}"
        )


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


def _check_rl(config: Config) -> None:
    rl = config.rl
    for name in ("group_size", "epochs"):
        if getattr(rl, name) < 1:
            raise ConfigError(f"rl.{name} must be at least 1, got {getattr(rl, name)}")
    if rl.redraws < 0:
        raise ConfigError(f"rl.redraws must be at least 0, got {rl.redraws}")
    if config.rollouts.reward_workers < 1 or not config.rollouts.reward_seconds > 0:
        raise ConfigError(
            f"rollouts.reward_workers and reward_seconds must be over 0, got"
            f" {config.rollouts.reward_workers} and {config.rollouts.reward_seconds}"
        )
    if not 0 <= rl.overlong_buffer_tokens <= config.curriculum.lengths[0]:
        raise ConfigError(
            f"rl.overlong_buffer_tokens must be in 0..{config.curriculum.lengths[0]} (the shortest"
            f" of curriculum.lengths), got {rl.overlong_buffer_tokens}"
        )
    if rl.group_size == 1 and rl != RL():
        raise ConfigError("rl is set, and rl.group_size 1 rewards nothing; set it to 2 or more")
    if rl.reward is math_reward:
        check_installed("rl.reward math")
    table = timetable(config)
    weighed = any(_uses(method.objective, importance) for method in table.methods)
    if config.stops == "merge" and (config.rollouts.ahead or weighed):
        raise ConfigError(
            "stops merge makes events of tokens whose log-probability the sampler does not know;"
            " leave out rollouts.ahead and importance, or use stops raw or mask"
        )
    if config.batch_size % rl.group_size:
        raise ConfigError(
            f"batch_size {config.batch_size} is not a multiple of rl.group_size {rl.group_size}"
        )
    drawn = config.trajectories is None and table.draws("student")
    if rl.group_size > 1 and not drawn:
        raise ConfigError(
            f"rl.group_size {rl.group_size} rewards what the student draws; set prefix student, and"
            " no trajectories, or rl.group_size 1"
        )


def _uses(objective: Objective, combinator: Callable) -> bool:
    made = (composition_of(one) for one in walk(objective))
    return any(one is not None and one.combinator is combinator for one in made)


def _check_measurements(config: Config) -> None:
    """The gate's held-out measurements."""
    curriculum = config.curriculum
    entropy_gate(
        curriculum.lengths,
        curriculum.entropy_threshold_nats,
        entropy_threshold_share=curriculum.entropy_threshold_share,
    )
    if curriculum.measure_every_steps < 1 or curriculum.heldout_problems < 1:
        raise ConfigError("curriculum.measure_every_steps and heldout_problems must be at least 1")


def _check_checkpoints(config: Config) -> None:
    """What is to stay is saved: steps that are kept, and every test that the best is chosen by."""
    kept, saved = config.checkpoints, config.save_every_steps
    if kept.last < 1 or kept.every_steps < 0:
        raise ConfigError(
            "checkpoints.last must be at least 1 and checkpoints.every_steps at least 0, got"
            f" {kept.last} and {kept.every_steps}"
        )
    if kept.best and not config.evaluation.every_steps:
        raise ConfigError(
            f"checkpoints.best {kept.best} needs tests during training; set"
            f" evaluation.every_steps to a multiple of save_every_steps ({saved})"
        )
    asked = {"checkpoints.every_steps": kept.every_steps}
    if kept.best:
        asked["evaluation.every_steps"] = config.evaluation.every_steps
    for name, every in asked.items():
        if every % saved:
            raise ConfigError(
                f"{name} {every} is not a multiple of save_every_steps {saved}, so that what"
                " checkpoints would keep is not saved; change one of them"
            )


def _check_faults(faults: Faults) -> None:
    if faults.skipped_in_a_row < 1:
        raise ConfigError(
            f"faults.skipped_in_a_row must be at least 1, got {faults.skipped_in_a_row}"
        )
    if faults.step_limit_seconds is not None and not faults.step_limit_seconds > 0:
        raise ConfigError(
            f"faults.step_limit_seconds must be over 0, got {faults.step_limit_seconds}; leave it"
            " out for no limit"
        )


def _check_lora(lora: Lora) -> None:
    if lora.rank:
        from kdjax.models.layers.linear import LoRA  # loads flax

        LoRA(lora.rank, lora.alpha, lora.targets)
    elif lora != Lora():
        raise ConfigError(f"lora.rank is 0, so nothing else of {lora} has an effect; set lora.rank")


def check_types(node: Any, prefix: str = "") -> None:
    """ConfigError unless each field of a config holds what its annotation says, and nothing that no
    device or file could hold."""
    for name, kind in typing.get_type_hints(type(node)).items():
        value = getattr(node, name)
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            if not isinstance(value, kind):
                raise ConfigError(f"{prefix}{name} must be a {kind.__name__}, got {value!r}")
            check_types(value, f"{prefix}{name}.")
        elif not _fits(value, kind):
            raise ConfigError(f"{prefix}{name} must be {_spelled(kind)}, got {value!r}")
        elif kind == tuple[Turn, ...]:
            for turn in value:
                check_types(turn, f"{prefix}{name}.")
        else:
            for one in value if isinstance(value, tuple) else (value,):
                for wanted in _unmet(one):
                    raise ConfigError(f"{prefix}{name} must be {wanted}, got {value!r}")


def _unmet(value: Any) -> Iterator[str]:
    if isinstance(value, float) and math.isnan(value):
        yield "a number"
    if isinstance(value, int) and abs(value) >= 2**32:
        yield "under 2**32"
    if isinstance(value, str) and ("\0" in value or any("\ud800" <= c <= "\udfff" for c in value)):
        yield "text without NUL and halves of characters"
    if isinstance(value, str) and without_secrets(value) != value:
        yield "text without a password, as it is written into the run's files"


def _fits(value: Any, kind: Any) -> bool:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return value in args
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, option) for option in args)
    if origin is dict:
        return isinstance(value, dict) and all(
            _fits(name, args[0]) and _fits(one, args[1]) for name, one in value.items()
        )
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
    return (
        kind.__name__
        if isinstance(kind, type)
        else re.sub(r"(typing|kdjax[\w.]*)\.", "", str(kind))
    )
