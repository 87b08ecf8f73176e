"""The start-up report on teachers of another tokenizer: what of the vocabularies is shared, and how
much of the first responses is aligned."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kdjax.errors import ConfigError
from kdjax.runtime import processes
from kdjax.sharding import rows_on_host
from kdjax.training.feed import draw, own_batch_at
from kdjax.training.parts.build import Parts
from kdjax.training.parts.programs import jitted_score
from kdjax.training.parts.roles import title
from kdjax.training.parts.startup import PROMPT


def about_alignment(parts: Parts) -> str:
    """Lines on each teacher, and on the rollout of the first step that it teaches; "" where all
    have one tokenizer. Errors: ConfigError where less of that rollout is aligned than
    `least_aligned`."""
    if parts.config.least_aligned is None:
        return ""
    first: dict[str, int] = {}
    for step in range(parts.config.steps):
        first.setdefault(own_batch_at(parts, step)[0], step)
        if len(first) == len(parts.teachers):
            break
    lines = [*_about_teachers(parts), *(_about_step(parts, step) for step in first.values())]
    return "".join(f"{line}\n" for line in lines)


def _about_teachers(parts: Parts) -> Iterator[str]:
    for tag, teacher in parts.teachers.items():
        role, name = teacher.role, title(tag)
        if role is None or role.shared is None:
            continue
        own = role.tokenizer
        yield f"prompt as the {name} reads it, in its own tokens: {own.render(PROMPT)!r}"
        yield f"tokenizers: student and {name} have their own; {role.shared}"
        if any(role.shared.stops):
            stops = ", ".join(f"{i} {own.token(i)!r}" for i in own.stop_ids)
            yield f"stop tokens: the {name}'s {stops} are one event, and so are the student's"


def _about_step(parts: Parts, step: int) -> str:
    """The shares of positions and of the teacher's probability in the rollout of a step, drawn with
    the student as it starts."""
    programs, student, least = parts.programs, parts.student, parts.config.least_aligned
    rollout = draw(parts, student.trained, step, parts.config.curriculum.lengths[0], 0)
    tag = own_batch_at(parts, step)[0]
    teacher = parts.teachers[tag]
    read = teacher.programs.read(teacher.params, rollout)
    scores = jitted_score(
        programs.student.model, teacher.programs.guide, programs.head,
        student.whole(student.trained), teacher.given, read,
    )  # fmt: skip
    shared = scores.mask if scores.teacher_shared is None else scores.teacher_shared
    own = rows_on_host((scores.mask, rollout.response_length_b, shared))
    aligned, tokens, kept = np.sum(processes.gather([float(x.sum()) for x in own]), axis=0)
    share = aligned / max(1.0, tokens)
    said = (
        f"of the first responses {share:.1%} of the tokens are aligned with the {title(tag)}'s, and"
        f" {kept / max(1.0, aligned):.2%} of its probability there is of tokens that the student"
        " has"
    )
    if share < least:
        raise ConfigError(
            f"least_aligned is {least}, and {said}; lower it, or take a teacher whose tokenizer"
            " cuts text more like the student's"
        )
    return f"alignment: {said}"
