"""The models of a run by their roles: student, teachers and reference, each resolved once."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import NamedTuple

from kdjax import models
from kdjax.config.schema import Config, Data
from kdjax.config.teachers import teacher_models
from kdjax.data.alignment import SharedVocabulary, share
from kdjax.data.chat.named import PLAIN
from kdjax.data.tokenizer import Tokenizer, Wording, load_pair, load_tokenizer
from kdjax.errors import ConfigError
from kdjax.models.shape import DecoderConfig
from kdjax.runtime import files


@dataclasses.dataclass(frozen=True, eq=False)
class Role:
    """A model of a run: its name in the config, its folder, its tokenizer, and what of it a teacher
    of another tokenizer shares with the student's."""

    name: str
    folder: Path
    tokenizer: Tokenizer
    shared: SharedVocabulary | None = None

    @functools.cached_property
    def shape(self) -> DecoderConfig:
        """Its shapes, read from the folder when they are first asked for."""
        return models.read_config(self.folder)

    @property
    def identity(self) -> str:
        """A hash of everything that decides what it computes (`models.identity`)."""
        return models.identity(self.folder)


class Roles(NamedTuple):
    """The models of a run by role. teachers: by tag, None where there is none; a model that several
    tags name is one Role. All tokenizers have the size of the vocabulary that they share, but for
    teachers whose tokens are aligned: theirs is their own."""

    student: Role
    teachers: dict[str, Role | None]
    reference: Role | None = None

    def by_model(self) -> dict[str | None, Role | None]:
        """Each teacher once, by the name of its model."""
        return {role.name if role else None: role for role in self.teachers.values()}


def resolve(config: Config, at_most: int | None = None) -> Roles:
    """The roles of a config, with its model names resolved to folders.

    at_most: tokens in use where there is no teacher whose own would say it. Where the student has
    no chat template, the first teacher's is used. Under stops merge the student ends at its own
    stop ids and its teachers', wherever it draws: in the loss they are one event, and to draw on
    behind one of them would be to draw on behind the end (arXiv 2609.20511).

    Errors: DataError for a missing model, as `load_pair` for each teacher, and ConfigError where
    one stops at a token that another doesn't have, or the reference has fewer tokens than are in
    use.
    """
    folder, wording = models.find(config.student), wording_of(config.data)
    names = teacher_models(config)
    held = weights_held(config)
    folders = {name: models.find(name, held) for name in names.values() if name is not None}
    if config.least_aligned is not None:
        return _resolve_aligned(config, folders)
    pairs = {name: load_pair(folder, other, wording) for name, other in folders.items()}
    if pairs:
        size = _shared_size(pairs)
        own = next(iter(pairs.values()))[0]._replace(size=size)
    else:
        own = load_tokenizer(folder, wording)
        own = own._replace(size=min(own.size, at_most or own.size))
    if config.stops == "merge":
        theirs = (i for _, teacher in pairs.values() for i in teacher.stop_ids)
        own = own._replace(stop_ids=tuple(dict.fromkeys((*own.stop_ids, *theirs))))
    teachers = {
        name: Role(name, folders[name], tokenizer._replace(size=size))
        for name, (_, tokenizer) in pairs.items()
    }
    by_tag = {tag: None if name is None else teachers[name] for tag, name in names.items()}
    return Roles(
        Role(config.student, folder, own),
        by_tag,
        _reference(config.reference, folder, own.size, wording),
    )


def weights_held(config: Config) -> bool:
    """Whether teachers' weights are read here: of one that is served, its other files are."""
    return config.served.url is None or config.served.check_rows > 0


def _resolve_aligned(config: Config, folders: dict[str, Path]) -> Roles:
    """The roles where each teacher has a tokenizer, and a chat template, of its own."""
    folder, wording = models.find(config.student), wording_of(config.data)
    own = load_tokenizer(folder, wording)
    teachers = {}
    for name, other in folders.items():
        tokenizer = load_tokenizer(other, wording)
        teachers[name] = Role(name, other, tokenizer, share(own, tokenizer))
    by_tag = {t: None if n is None else teachers[n] for t, n in teacher_models(config).items()}
    reference = _reference(config.reference, folder, own.size, wording)
    return Roles(Role(config.student, folder, own), by_tag, reference)


def _shared_size(pairs: dict[str, tuple[Tokenizer, Tokenizer]]) -> int:
    """The number of tokens that the student and all teachers share, their stop ids among them."""
    size = min(student.size for student, _ in pairs.values())
    for name, (student, teacher) in pairs.items():
        beyond = [i for i in (*student.stop_ids, *teacher.stop_ids) if i >= size]
        if beyond:
            raise ConfigError(
                f"teacher {name} stops at id {beyond[0]} ({teacher.token(beyond[0])!r}), beyond the"
                f" {size} tokens that all teachers have; use teachers of one vocabulary"
            )
    return size


def _reference(name: str | None, student: Path, size: int, wording: Wording) -> Role | None:
    if name is None:
        return None
    folder = models.find(name)
    own, theirs = load_pair(student, folder, wording)
    if own.size < size:
        raise ConfigError(
            f"reference {name} has {own.size} of the {size} tokens that"
            " student and teacher share; choose one of their family"
        )
    return Role(name, folder, theirs)


def identities(config: Config) -> dict[str, str]:
    """The identity of each model of a config, by the name of its role, and of a chat template that
    is a file; no weight is loaded."""
    named = {"student": config.student, "reference": config.reference}
    taught = {title(tag): name for tag, name in teacher_models(config).items()}
    found = {
        role: models.identity(models.find(name, weights))
        for roles, weights in ((named, True), (taught, weights_held(config)))
        for role, name in roles.items()
        if name is not None
    }
    template = config.data.chat_template
    if template not in (None, PLAIN):
        found["data.chat_template"] = files.digest(files.read_text(Path(template)))
    return found


def wording_of(data: Data) -> Wording:
    """The wording of a config's prompts."""
    return Wording(data.prompt_template, data.system_prompt, data.thinking, data.chat_template)


def title(tag: str) -> str:
    """The name of a tag's teacher in messages.

    >>> title(""), title("math")
    ('teacher', 'teacher math')
    """
    return f"teacher {tag}".strip()
