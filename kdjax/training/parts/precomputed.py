"""Folders of trajectories that a run is trained from: what they hold, and whether it is enough."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import quote

from kdjax.base import KNOWN_BEFORE
from kdjax.config.schema import Config
from kdjax.config.teachers import SELF, teacher_models
from kdjax.errors import ConfigError
from kdjax.losses.combinators import runs_on
from kdjax.losses.composition import describe as describe_function
from kdjax.losses.reductions import ranked_by
from kdjax.losses.topk import BY_SAMPLED, BY_TOP_K
from kdjax.storage import trajectories as folders
from kdjax.training.parts.roles import title


class Keep(NamedTuple):
    """The teacher's outputs that are stored at each response token: nothing, its last hidden state
    in the compute dtype (states), or its k most probable tokens and their tail (top_k)."""

    kind: Literal["nothing", "states", "top_k"] = "nothing"
    k: int = 0

    def __str__(self) -> str:
        return f"top_k={self.k}" if self.kind == "top_k" else self.kind


NOTHING = Keep()


def parse_keep(text: str | None) -> Keep:
    """The value of --keep. Errors: ConfigError.

    >>> parse_keep("top_k=64")
    Keep(kind='top_k', k=64)
    """
    if text in (None, "nothing"):
        return NOTHING
    if text == "states":
        return Keep("states")
    found = re.fullmatch(r"top_k=([1-9]\d*)", text or "")
    if not found:
        raise ConfigError(f"--keep is states or top_k=K, such as top_k=64, got {text!r}")
    return Keep("top_k", int(found[1]))


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
    """The teachers' outputs that the folders hold; where k differs, those of the first tag."""
    return next((s.keep for s in stored.values()), NOTHING)


def _troubles(config: Config, teacher: str | None, stored: Stored) -> Iterator[str]:
    keep, lengths = stored.keep, config.curriculum.lengths
    if lengths[-1] > stored.settings["max_new_tokens"]:
        yield (
            f"end at {stored.settings['max_new_tokens']} tokens, and curriculum.lengths reach"
            f" {lengths[-1]}; lower those, or draw longer ones"
        )
    own = config.teacher == SELF
    if own and keep != NOTHING:
        yield (
            f"keep {keep} of a teacher, and teacher self reads rows anew at each step; draw without"
            " --keep, or set teacher"
        )
    if keep == NOTHING and teacher is None and not own and not runs_on(config.objective):
        yield (
            f"keep nothing of a teacher, and objective {describe_function(config.objective)} needs"
            " one; set teacher, or draw with --keep states or --keep top_k=64"
        )
    known = BY_SAMPLED if stored.settings.get("sampled_logp") else BY_TOP_K
    read = {"objective": [config.objective], "reduction": ranked_by(config.reduction)[1]}
    for field, one in ((field, one) for field, ones in read.items() for one in ones):
        if keep.kind == "top_k" and not runs_on(one, *known, *KNOWN_BEFORE):
            yield (
                f"keep the teacher's top {keep.k}, and {field} {describe_function(one)} needs more"
                " of the teacher than is kept; draw with --keep states"
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


def stop_ids(stored: dict[str, Stored]) -> tuple[int, ...]:
    """The stop ids of the teachers whose outputs are stored."""
    return tuple(i for s in stored.values() for i in s.settings.get("teacher_stop_ids", ()))


def vocabulary(stored: dict[str, Stored]) -> int | None:
    """Tokens of the kept outputs; None where none were kept."""
    if kept_of(stored) == NOTHING:
        return None
    return min(s.settings["vocabulary"] for s in stored.values())


def of_tag(folder: Path, tag: str) -> Path:
    """The folder of a tag's trajectories: one below, except for the tag ""."""
    return folder / quote(title(tag), safe=" ") if tag else folder


def identities(config: Config) -> dict[str, str]:
    """The identities of the folders that a config reads its responses from."""
    if config.trajectories is None:
        return {}
    path = Path(config.trajectories)
    return {
        f"trajectories {tag}".strip(): folders.identity(of_tag(path, tag))
        for tag in teacher_models(config)
    }


def describe(folder: str | None, stored: dict[str, Stored]) -> str | None:
    """What a run reads from its folders, in words; None where nothing is.

    >>> settings = {"prefix": "student", "rows": 9, "max_new_tokens": 8}
    >>> describe("f", {"": Stored(Path("f"), settings, Keep("top_k", 64))})
    '9 responses of the student, up to 8 tokens, from f; kept of the teacher: top_k=64'
    """
    if not stored:
        return None
    first, keep = next(iter(stored.values())).settings, kept_of(stored)
    rows = sum(s.settings["rows"] for s in stored.values())
    return (
        f"{rows} responses of the {first['prefix']}, up to {first['max_new_tokens']} tokens, from"
        f" {folder}; kept of the teacher: {keep}"
    )
