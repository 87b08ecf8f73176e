"""Who teaches which problem: teachers by tag; one alone is everybody's, under the tag ""."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from kdjax import models
from kdjax.base import Params, Rollout
from kdjax.config.schema import Config, teacher_models
from kdjax.data.tokenizer import Tokenizer, Wording, load_pair, load_tokenizer
from kdjax.errors import ConfigError
from kdjax.models import DecoderConfig
from kdjax.train.parts.programs import Programs, TeacherPrograms, jitted_logp, logp_settings
from kdjax.train.parts.shapes import TEACHER_WEIGHTS


class Teacher(NamedTuple):
    """One teacher, resident: its model's name, its programs, weights and tokenizer; given is what
    the step takes of the weights (`TeacherPrograms.give`).

    Without a teacher, name, params and given are None, and the tokenizer is the student's.
    """

    name: str | None
    programs: TeacherPrograms
    params: Params | None
    given: Params | None
    tokenizer: Tokenizer


def load_teachers(
    config: Config, programs: Programs, tokenizers: dict[str | None, Tokenizer]
) -> dict[str, Teacher]:
    """Tag -> its teacher, in the compute dtype; a model that several tags name is loaded once. Of
    one whose programs have no model, its head is loaded if they are guided by it, or nothing."""
    loaded = {}
    for name, own in programs.teachers.items():
        params, given, dtype = None, None, jnp.dtype(config.dtype)
        if name is not None and own.model is not None:
            hold = TEACHER_WEIGHTS[config.teacher_weights]
            folder, mesh = models.find(name), programs.teacher_mesh
            _, params = models.load(folder, mesh, params_dtype=dtype, hold=hold)
            given = own.give(params)
        elif name is not None and own.guide is not None:
            folder = models.find(name)
            given = models.read_head(folder, models.read_config(folder), dtype, programs.mesh)
        loaded[name] = Teacher(name, own, params, given, tokenizers[name])
    return {tag: loaded[name] for tag, name in teacher_models(config).items()}


def load_tokenizers(config: Config) -> tuple[Tokenizer, dict[str | None, Tokenizer]]:
    """(the student's tokenizer, each teacher's by the name of its model), all with the size of the
    vocabulary that every one of them has.

    Where the student has no chat template, the first teacher's serves. Errors: as `load_pair` for
    each teacher, and ConfigError where one stops at a token that another doesn't have.
    """
    folder, wording = models.find(config.student), wording_of(config)
    names = tuple(dict.fromkeys(teacher_models(config).values()))
    if names == (None,):
        alone = load_tokenizer(folder, wording)
        return alone, {None: alone}
    pairs = {name: load_pair(folder, models.find(name), wording) for name in names if name}
    size = min(student.size for student, _ in pairs.values())
    for name, (student, teacher) in pairs.items():
        beyond = [i for i in (*student.stop_ids, *teacher.stop_ids) if i >= size]
        if beyond:
            raise ConfigError(
                f"teacher {name} stops at id {beyond[0]} ({teacher.token(beyond[0])!r}), beyond the"
                f" {size} tokens that all teachers have; use teachers of one vocabulary"
            )
    own = next(iter(pairs.values()))[0]._replace(size=size)
    return own, {name: teacher._replace(size=size) for name, (_, teacher) in pairs.items()}


def wording_of(config: Config) -> Wording:
    """How a config puts every problem."""
    return Wording(config.data.prompt_template, config.data.system_prompt, config.data.thinking)


def read_shapes(config: Config) -> dict[str | None, DecoderConfig | None]:
    """The teachers' shapes by the names of their models, from their folders."""
    names = teacher_models(config).values()
    return {name: name and models.read_config(models.find(name)) for name in names}  # type: ignore[misc]


def title(tag: str) -> str:
    """How a tag's teacher is called where people read it.

    >>> title(""), title("math")
    ('teacher', 'teacher math')
    """
    return f"teacher {tag}".strip()


def read_reference(config: Config) -> DecoderConfig | None:
    """The reference's shape, from its folder."""
    return None if config.reference is None else models.read_config(models.find(config.reference))


def open_reference(
    config: Config, programs: Programs, tokenizer: Tokenizer
) -> Callable[[Rollout], Rollout]:
    """refer(rollout) -> the rollout with the reference's log-probability of each response token,
    under the stop policy of the run; the rollout itself where the config has no reference.

    Errors: ConfigError for a reference with fewer tokens than are in use.
    """
    model, mesh = programs.reference, programs.mesh
    if config.reference is None or model is None:
        return lambda rollout: rollout
    own, _ = load_pair(models.find(config.student), models.find(config.reference))
    if own.size < tokenizer.size:
        raise ConfigError(
            f"reference {config.reference} has {own.size} of the {tokenizer.size} tokens that"
            " student and teacher share; choose one of their family"
        )
    folder = models.find(config.reference)
    _, params = models.load(folder, mesh, params_dtype=jnp.dtype(config.dtype))
    settings = logp_settings(config, programs, tokenizer.size)

    def refer(rollout: Rollout) -> Rollout:
        return rollout._replace(reference_logp_bt=jitted_logp(model, params, rollout, **settings))

    return refer
