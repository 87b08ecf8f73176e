"""The teachers of a config: their models, the student as its own, and what each may read."""

from __future__ import annotations

import re

from kdjax.config.schema import Config
from kdjax.config.timetable import Method
from kdjax.data.teacher_prompts import FIELDS, fields_of
from kdjax.errors import ConfigError
from kdjax.losses.objectives import divergence

SELF = "self"
"""The teacher that is the student itself."""

FIELD = re.compile(r"(?<![\w\\}])\{\w+\}")
"""A name in braces that no LaTeX command stands before."""


def teacher_models(config: Config) -> dict[str, str | None]:
    """Tag -> the model that teaches its problems. One teacher is everybody's, under the tag "" (and
    None is no other model than the student).

    Errors: ConfigError where `teachers` can't be read, or stands beside `teacher`.

    >>> teacher_models(Config(teacher=None, teachers=("math=org/m", "code=folder")))
    {'math': 'org/m', 'code': 'folder'}
    """
    if not config.teachers:
        return {"": None if config.teacher == SELF else config.teacher}
    if config.teacher is not None:
        raise ConfigError(
            f"teacher {config.teacher} and teachers {config.teachers} are both set;"
            " set teacher None, or no teachers"
        )
    models: dict[str, str | None] = {}
    for text in config.teachers:
        tag, _, model = text.partition("=")
        if not tag or not model:
            raise ConfigError(f'teachers: each is written "tag=model", got {text!r}')
        if model == SELF:
            raise ConfigError(
                f"teachers: {text} is for teacher alone; name the student's model, which is it as"
                " it is at the start"
            )
        if tag in models:
            raise ConfigError(f"teachers: tag {tag!r} has two; name one model a tag")
        models[tag] = model
    return models


def check_teachers(config: Config, method: Method) -> None:
    """Errors: ConfigError where a method needs a teacher that the config lacks, or a field one."""
    own = config.teacher == SELF
    taught = any(teacher_models(config).values())
    if config.layout.teacher_devices < 0 or (config.layout.teacher_devices and not taught):
        raise ConfigError(
            f"layout.teacher_devices is {config.layout.teacher_devices}; set it to 0, or beside a"
            " teacher of its own weights to a number of devices"
        )
    stored = config.trajectories is not None  # what is stored there may be all that is needed
    if own and method.prefix == "teacher":
        raise ConfigError(
            "prefix teacher draws once, and teacher self is the student of each step: set prefix"
            f" student, or teacher {config.student} (it as it is at the start)"
        )
    if not taught and not stored and method.prefix == "teacher":
        raise ConfigError("prefix teacher needs a teacher; set teacher, or prefix dataset")
    if not taught and not own and not stored and method.objective is divergence:
        raise ConfigError(
            "objective divergence needs a teacher; set teacher,"
            " or objective negative_log_likelihood"
        )
    if config.teacher_shares != "problems" and len(config.teachers) < 2:
        raise ConfigError(
            f"teacher_shares {config.teacher_shares} is of teachers of several tags, got"
            f" {config.teachers}; set teachers, or teacher_shares problems"
        )
    if not taught and config.teacher_weights != "compute":
        lacks = "a teacher of its own weights" if own else "a teacher"
        raise ConfigError(
            f"teacher_weights {config.teacher_weights} needs {lacks}; set teacher, or"
            " teacher_weights compute"
        )
    if own and config.served.url is not None:
        raise ConfigError(
            "served.url scores as another teacher; set teacher to its model, not self"
        )
    if not 0 <= config.self_decay <= 1:
        raise ConfigError(f"self_decay must be in [0, 1], got {config.self_decay}")
    if config.self_decay and not own:
        raise ConfigError(
            f"self_decay {config.self_decay} is of teacher self, and teacher is {config.teacher};"
            " set teacher self, or leave it out"
        )
    if own and config.self_decay == 0 and config.data.teacher_prompt_template is None:
        raise ConfigError(
            "teacher self with self_decay 0 is the student, and reads what it reads: set"
            " data.teacher_prompt_template, or self_decay over 0"
        )


def check_teacher_prompts(config: Config) -> None:
    """Errors: ConfigError for a template of other fields or of none, or that nobody reads."""
    data, taught = config.data, config.teacher == SELF or any(teacher_models(config).values())
    template, limit = data.teacher_prompt_template, data.max_teacher_prompt_tokens
    if template is None:
        if limit is not None:
            raise ConfigError(
                f"data.max_teacher_prompt_tokens is {limit}, and there is no"
                " data.teacher_prompt_template; set it, or leave both out"
            )
        return
    if limit is not None and limit < 1:
        raise ConfigError(f"data.max_teacher_prompt_tokens must be at least 1, got {limit}")
    known = ", ".join(f"{{{field}}}" for field in FIELDS)
    others = sorted({f[1:-1] for f in FIELD.findall(template)} - {*FIELDS})
    if others or not fields_of(template):
        got = f"the field {{{others[0]}}}" if others else f"none, in {template!r}"
        raise ConfigError(f"data.teacher_prompt_template has {got}; its fields are {known}")
    elsewhere = {"served.url": config.served.url, "least_aligned": config.least_aligned}
    for field, value in elsewhere.items():
        if value is not None:
            raise ConfigError(
                f"data.teacher_prompt_template and {field} are both set, and such a teacher reads"
                " the student's prompt; leave one of them out"
            )
    if not taught and config.trajectories is None:
        raise ConfigError(
            "data.teacher_prompt_template needs a teacher that reads it; set teacher (self: the"
            " student), or leave it out"
        )
