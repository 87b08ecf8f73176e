"""Training from a folder of trajectories: what it must share with the config, how it is read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kdjax.base import PrefixSource
from kdjax.config.schema import Config, teacher_models
from kdjax.errors import ConfigError
from kdjax.losses.combinators import runs_on
from kdjax.losses.composition import describe as describe_function
from kdjax.rollouts.prefix import from_trajectories
from kdjax.runtime.files import differences
from kdjax.storage import trajectories as folders
from kdjax.train.parts.precompute import NOTHING, Asked, Keep, of_tag, parse_keep, settings_of
from kdjax.train.parts.roles import Roles


class Stored(NamedTuple):
    """A folder that a config reads its responses from."""

    path: Path
    settings: dict[str, Any]
    keep: Keep


def open_stored(config: Config) -> dict[str, Stored]:
    """Tag -> the folder that holds its trajectories; {} where they are drawn.

    Errors: DataError where a folder is none or not complete, ConfigError where this config can't be
    trained from it, whatever its models are.
    """
    if config.trajectories is None:
        return {}
    found = {}
    for tag, teacher in teacher_models(config).items():
        path = of_tag(Path(config.trajectories), tag)
        settings = folders.read_settings(path)
        folders.require_complete(path, settings)
        found[tag] = Stored(path, settings, parse_keep(settings.get("keep")))
        for trouble in _troubles(config, teacher, found[tag]):
            raise ConfigError(f"trajectories {path} {trouble}")
    if len({stored.keep.kind for stored in found.values()}) > 1:
        kept = ", ".join(f"{stored.path} {stored.keep}" for stored in found.values())
        raise ConfigError(f"trajectories keep different things of the teachers: {kept}; keep one")
    return found


def kept_of(stored: dict[str, Stored]) -> Keep:
    """What the folders keep of the teachers, of the first tag where k differs."""
    return next((s.keep for s in stored.values()), NOTHING)


def _troubles(config: Config, teacher: str | None, stored: Stored) -> Iterator[str]:
    keep, lengths = stored.keep, config.curriculum.lengths
    if lengths[-1] > stored.settings["max_new_tokens"]:
        yield (
            f"end at {stored.settings['max_new_tokens']} tokens, and curriculum.lengths reach"
            f" {lengths[-1]}; lower those, or draw longer ones"
        )
    if keep == NOTHING and teacher is None and not runs_on(config.objective):
        yield (
            f"keep nothing of a teacher, and objective {describe_function(config.objective)} needs"
            " one; set teacher, or draw with --keep states or --keep top_k=64"
        )
    if keep.kind == "top_k" and not runs_on(config.objective, *BY_TOP_K):
        yield (
            f"keep the teacher's top {keep.k}, and objective {describe_function(config.objective)}"
            " needs more than its divergences; draw with --keep states"
        )
    if keep.kind == "states" and teacher is None:
        yield (
            "keep the teacher's states, which its LM head turns into probabilities; set teacher to"
            f" the model of weights {stored.settings.get('teacher')}"
        )
    if keep.kind == "top_k" and config.stops == "merge":
        yield (
            f"keep the teacher's top {keep.k}, and stops merge needs its whole vocabulary; use"
            " stops raw or mask, or draw with --keep states"
        )
    if keep != NOTHING and config.layout.teacher_devices:
        yield (
            f"keep {keep}, so no teacher is loaded, and layout.teacher_devices is"
            f" {config.layout.teacher_devices}; set it to 0"
        )


BY_TOP_K = ("divergence", "forward_kl", "reverse_kl", "top1_agreement")
"""The `Scores` that a top-k teacher gives."""


def stop_ids(stored: dict[str, Stored]) -> tuple[int, ...]:
    """Those of the teachers whose outputs were kept."""
    return tuple(i for s in stored.values() for i in s.settings.get("teacher_stop_ids", ()))


def limited(roles: Roles, stored: dict[str, Stored]) -> Roles:
    """The roles with the vocabulary of the kept outputs, where there is no teacher whose own would
    say it."""
    if any(roles.teachers.values()) or kept_of(stored) == NOTHING:
        return roles
    return roles.limited(min(s.settings["vocabulary"] for s in stored.values()))


DECISIVE = (
    "prefix", "problems", "tokenizer", "template", "tag", "rows", "weights", "sampling", "stop_ids",
)  # fmt: skip
OF_TEACHER = ("teacher", "vocabulary", "dtype", "teacher_weights", "teacher_stop_ids")
"""Settings that a config must share with a folder of responses, and of kept teacher outputs."""


def from_stored(asked: Asked, stored: Stored) -> PrefixSource:
    """The responses of a folder, once its settings are known to be those of the config.

    Errors: ConfigError naming the settings that differ.
    """
    wanted = settings_of(asked, stored.keep)
    names = DECISIVE if stored.keep == NOTHING else (*DECISIVE, *OF_TEACHER)
    unknown: tuple[str, ...] = ()
    if asked.teacher.role is None:  # its files may be elsewhere
        of_it = ("weights", "stop_ids") if asked.prefix == "teacher" else ()
        unknown = ("teacher", "teacher_weights", "teacher_stop_ids", *of_it)
    old, new = (
        {n: s[n] for n in names if n in s and n not in unknown} for s in (stored.settings, wanted)
    )
    changed = differences(old, new)
    if changed:
        raise ConfigError(
            f"trajectories {stored.path} are not this config's: {'; '.join(changed)};"
            " set the old values, or draw others: kdjax rollouts CONFIG --out FOLDER"
        )
    read = folders.reader(stored.path, stored.settings)
    return from_trajectories(lambda rows: read(np.searchsorted(asked.rows, rows)))


def identities(config: Config) -> dict[str, str]:
    """The identities of the folders that a config reads its responses from."""
    if config.trajectories is None:
        return {}
    path = Path(config.trajectories)
    return {
        f"trajectories {tag}".strip(): folders.identity(of_tag(path, tag))
        for tag in teacher_models(config)
    }


def describe(config: Config, stored: dict[str, Stored]) -> str | None:
    """What of a run is read from its folders, for people; None where nothing is.

    >>> settings = {"prefix": "student", "rows": 9, "max_new_tokens": 8}
    >>> describe(Config(trajectories="f"), {"": Stored(Path("f"), settings, Keep("top_k", 64))})
    '9 responses of the student, up to 8 tokens, from f; kept of the teacher: top_k=64'
    """
    if not stored:
        return None
    first, keep = next(iter(stored.values())).settings, kept_of(stored)
    rows = sum(s.settings["rows"] for s in stored.values())
    return (
        f"{rows} responses of the {first['prefix']}, up to {first['max_new_tokens']} tokens, from"
        f" {config.trajectories}; kept of the teacher: {keep}"
    )
